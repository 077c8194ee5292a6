"""Runs: the same result for any number of processes; a collapse is reported, stopped with advice, or rewound."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from tests.support.launched import launched
from tests.support.runs import digest

GROUPS = ["model.bn=groups", "model.bn_group_size=4"]
TWENTY_STEPS = ["precision=fp64", "train.epochs=5", "train.keep=20"]


def assert_same(run: Path, other: Path, tolerance: float) -> None:
    """Metrics of every epoch, and all tensors of the last checkpoint."""
    for ours, theirs in zip(RunFolder(run).read_metrics(), RunFolder(other).read_metrics(), strict=True):
        for key, value in theirs.items():
            near = pytest.approx(value, abs=tolerance) if isinstance(value, float) else value
            assert ours[key] == near, f"{key} of step {theirs['step']}"
    for name in ("model", "ema", "optimizer", "objective"):
        one, two = (named_checkpoint(folder, "last").tensors(name) for folder in (other, run))
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )


# ---- any number of processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("recipe_path", []),
        ("wide_path", [*GROUPS, "awp.gamma=0.005", "awp.warmup_epochs=2"]),
        ("wide_path", [*GROUPS, "objective.name=dm_at", "train.epochs=5"]),  # whose attack reuses the natural forward
        ("recipe_path", ["objective.name=trades_ikl", "objective.ikl_gamma=0.2"]),  # with class means over the epoch
        ("wide_path", [*GROUPS, "objective.name=adr"]),
        ("wide_path", [*GROUPS, "objective.name=trades_te", "objective.refine.te_start=0.3"]),
        ("wide_path", [*GROUPS, "objective.name=sglr", "objective.refine.sglr_start=0.3", "train.accumulate=2"]),
        ("recipe_path", ["objective.name=noilin", "objective.refine.noilin_window=1"]),
    ],
    ids=["no BatchNorm", "groups", "dm_at", "GKL", "ADR", "TE", "SGLR", "NoiLIn"],
)
@pytest.mark.medium
def test_elastic(path: str, model: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One process, then two, then one again: losses and weights of a run by one process, to 1e-6."""
    recipe_path, run = request.getfixturevalue(path), tmp_path / "run"
    overrides = [*TWENTY_STEPS, *model]
    whole = train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'whole'}"]))
    overrides += [f"run_dir={run}"]
    train(load_recipe(recipe_path, [*overrides, "train.max_steps=6"]))
    with launched([str(recipe_path), *overrides, "train.max_steps=13"], processes=2) as launch:
        out = launch.succeed()
    assert "2 process(es)" in out and "resuming" in out
    train(load_recipe(recipe_path, overrides))
    assert_same(run, whole, 1e-6)


@pytest.mark.medium
def test_two_processes_with_local_statistics_resume_exactly(wide_path: Path, tmp_path: Path) -> None:
    """Also within an epoch, because running statistics are equal on all ranks after every step."""
    for run, stops in (("whole", [[]]), ("parts", [["train.max_steps=3"], []])):
        for stop in stops:
            arguments = [str(wide_path), "train.epochs=2", f"run_dir={tmp_path / run}", *stop]
            with launched(arguments, processes=2) as launch:
                assert "2 process(es)" in launch.succeed()
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


@pytest.mark.medium
def test_groups_do_not_depend_on_accumulation(wide_path: Path, tmp_path: Path) -> None:
    """Micro-batches of whole groups give the statistics of the whole batch."""
    overrides = [*TWENTY_STEPS, *GROUPS, "train.max_steps=6"]
    one = train(load_recipe(wide_path, [*overrides, f"run_dir={tmp_path / 'one'}"]))
    for accumulate in (2, 4):
        other = [*overrides, f"train.accumulate={accumulate}", f"run_dir={tmp_path / str(accumulate)}"]
        assert_same(train(load_recipe(wide_path, other)), one, 1e-9)


EQUAL = """
import hashlib, sys
from accelerate.utils import gather_object
from nrat_scale.recipe import load_recipe
from nrat_scale.train.step import train_step
from nrat_scale.train.nonfinite import StepChecks
from nrat_scale.train.setup import start
state = start(load_recipe(sys.argv[1], sys.argv[2:]))
for batch in state.data.batches(0, 4, state.accelerator.process_index, state.accelerator.num_processes):
    train_step(state, batch)
    state.step += 1
modules = (state.base, state.ema.module, state.objective)
tensors = [tensor for module in modules for tensor in module.state_dict().values()]
mine = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
hashes = gather_object([mine])
assert len(hashes) == 2 and len(set(hashes)) == 1, hashes
state.accelerator.print("equal on", len(hashes), "ranks")
"""


@pytest.mark.parametrize("objective", ["trades", "te"])
def test_ranks_stay_bit_equal(wide_path: Path, tmp_path: Path, objective: str) -> None:
    """With AWP, accumulation and BatchNorm: the perturbation is computed from the gradient averaged over ranks."""
    changes = ["objective.refine.te_start=0"] if objective == "te" else []
    changes += ["awp.gamma=0.005", "awp.warmup_epochs=0", "train.accumulate=2", f"objective.name={objective}"]
    arguments = [str(wide_path), *changes, f"run_dir={tmp_path / 'run'}"]
    with launched(arguments, processes=2, script=EQUAL) as launch:
        assert "equal on 2 ranks" in launch.succeed()


# ---- collapse -----------------------------------------------------------------------------------------------------

# NCE+RCE with a rate that is far too large: within a few steps the model names one class for every image.
COLLAPSING = ["objective.name=nrat", "optim.lr=30", "optim.schedule=constant", "train.epochs=8", "ema.decay=0"]
WATCHING = ["guard.window=4", "guard.patience=2"]


def rows(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).read_metrics()


def test_a_collapse_is_reported_once(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the run continues, but prints what happened and what helps, and its metrics record it."""
    run = train(load_recipe(recipe_path, [*COLLAPSING, *WATCHING, f"run_dir={tmp_path / 'run'}"]))
    out = capsys.readouterr().out
    assert "the paper uses 0.1, and 0.05 or 0.01" in out
    reported = [row for row in rows(run) if row["kind"] == "guard"]
    assert {row["action"] for row in reported} == {"warn"}
    assert 1 <= out.count("Training has collapsed by step") == len(reported) < 32 / 4 - 1, (
        "once per collapse, not once per window"
    )
    last = [row for row in rows(run) if row["kind"] == "train"][-1]
    assert last["natural_accuracy"] < 0.2


def test_a_collapse_can_stop_the_run(recipe_path: Path, tmp_path: Path) -> None:
    """`stop` ends the run with advice instead of training a collapsed model for hours."""
    recipe = load_recipe(recipe_path, [*COLLAPSING, *WATCHING, "guard.action=stop", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"collapsed by step \d+: .* name one class.*Lower optim\.lr"):
        train(recipe)
    assert len([row for row in rows(tmp_path / "run") if row["kind"] == "train"]) < 10


# Learns within forty steps, and collapses under a rate of 3.
LEARNING = [
    "objective.name=pgd_at_apl", "optim.name=adamw", "threat.eps=0.02", "data.real.noise.kind=none", "data.real.noise.rate=0",
    "data.epoch_samples=128", "model.kwargs.width=8", "ema.decay=0", "guard.window=16", "guard.patience=4",
    "guard.top_share=0.6",  # of adversarial predictions, which the attack spreads
]  # fmt: skip


@pytest.mark.medium
def test_the_guard_does_not_change_a_healthy_run(recipe_path: Path, tmp_path: Path) -> None:
    """With and without the guard, the metrics are the same."""
    off, on = (
        [
            *LEARNING,
            "train.epochs=10",
            "optim.schedule=constant",
            f"guard.action={action}",
            f"run_dir={tmp_path / action}",
        ]
        for action in ("none", "rewind")
    )
    first = train(load_recipe(recipe_path, off))
    assert rows(train(load_recipe(recipe_path, on))) == rows(first)


@pytest.mark.medium
def test_a_collapse_can_be_rewound(recipe_path: Path, tmp_path: Path) -> None:
    """From the last good checkpoint with a smaller rate; later checkpoints are set aside, and an interruption after the rewind
    changes nothing."""
    # Right for the first ten epochs, far too large afterwards.
    rates = ["optim.lr=0.01", "optim.schedule=multistep", "optim.milestones=[10]", "optim.gamma=300"]
    overrides = [*LEARNING, *rates, "train.epochs=20", "guard.action=rewind", "guard.lr_factor=0.003", "train.keep=20"]
    run, other = tmp_path / "run", tmp_path / "other"
    train(load_recipe(recipe_path, [*overrides, f"run_dir={run}", "train.max_steps=130"]))
    shutil.copytree(run, other)
    train(load_recipe(recipe_path, [*overrides, f"run_dir={run}"]))
    (row,) = [row for row in rows(run) if row["kind"] == "guard"]
    assert row["action"] == "rewind"
    rewound_to = row["rewound_to"]
    assert 40 < rewound_to <= 96 <= row["step"] - 32
    steps = [r["step"] for r in rows(run) if r["kind"] == "train"]
    assert steps == sorted(set(steps)), "no epoch is in the metrics twice"
    assert named_checkpoint(run, "last").state["guard"]["lr_scale"] == pytest.approx(0.003)
    assert list((run / "checkpoints").glob(".step-*.collapsed-*"))
    accuracy = [r["robust_accuracy"] for r in rows(run) if r["kind"] == "train"]
    assert accuracy[-1] > 0.2, "it continues to learn"
    for stop in ([f"train.max_steps={row['step'] + 6}"], []):  # after the rewind
        train(load_recipe(recipe_path, [*overrides, f"run_dir={other}", *stop]))
    assert rows(other) == rows(run)
    assert digest(other) == digest(run)


def guard_rows(run: Path, action: str) -> list[dict[str, Any]]:
    return [row for row in rows(run) if row["kind"] == "guard" and row["action"] == action]


@pytest.mark.medium
def test_a_collapse_from_the_start_is_rewound_to_the_initial_weights(recipe_path: Path, tmp_path: Path) -> None:
    """A rate that is too large from the first step: there is no good checkpoint, and the run still ends trained, whether or
    not it is interrupted before and after the rewind."""
    rates = ["optim.lr=10", "optim.schedule=constant", "guard.lr_factor=0.001"]
    overrides = [*LEARNING, *rates, "train.epochs=20", "guard.action=rewind", "train.keep=1"]
    run, other = tmp_path / "run", tmp_path / "other"
    train(load_recipe(recipe_path, [*overrides, f"run_dir={run}"]))
    (row,) = guard_rows(run, "rewind")
    assert row["rewound_to"] == 0
    assert [r["epoch"] for r in rows(run) if r["kind"] == "train"] == list(range(1, 21))
    assert [r for r in rows(run) if r["kind"] == "train"][-1]["robust_accuracy"] > 0.2, "it learns"
    for stop in (["train.max_steps=20"], ["train.max_steps=70"], []):
        train(load_recipe(recipe_path, [*overrides, f"run_dir={other}", *stop]))
    assert digest(other) == digest(run)
    plain = [o for o in overrides if not o.startswith(("guard.action", "optim.lr="))]
    slow = train(load_recipe(recipe_path, [*plain, "optim.lr=0.01", f"run_dir={tmp_path / 'slow'}"]))
    ours, theirs = (named_checkpoint(folder, "last").tensors("model") for folder in (run, slow))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items()), "as if it had begun with this rate"


@pytest.mark.medium
def test_a_checkpoint_that_collapses_again_is_not_tried_twice(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a rewind did not help, the next one goes further back, and the last sentence says how many were tried."""
    rates = ["optim.lr=0.01", "optim.schedule=multistep", "optim.milestones=[10]", "optim.gamma=1000"]
    overrides = [*LEARNING, *rates, "train.epochs=20", "guard.action=rewind", "guard.lr_factor=0.9", "train.keep=1"]
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"Lower optim\.lr.* 3 rewinds did not help"):
        train(load_recipe(recipe_path, [*overrides, "guard.patience=1", f"run_dir={run}"]))
    steps = [int(step) for step in re.findall(r"Going back to step (\d+)", capsys.readouterr().out)]
    assert len(steps) == 3 and steps[0] == 80 > steps[1]


def test_a_rewinding_run_keeps_a_good_checkpoint(recipe_path: Path, tmp_path: Path) -> None:
    """With `train.keep=1` too, although the newest ones are of the collapse and the best is older."""
    rates = ["optim.lr=0.01", "optim.schedule=multistep", "optim.milestones=[10]", "optim.gamma=300"]
    overrides = [
        *LEARNING,
        *rates,
        "train.epochs=16",
        "guard.action=rewind",
        "guard.lr_factor=0.003",
        "guard.patience=2",
    ]
    overrides += ["train.keep=1", "train.validate_every=100"]
    run = train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    (row,) = guard_rows(run, "rewind")
    assert 40 < row["rewound_to"] <= 96


def test_a_slow_start_is_not_rewound(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained network names one class, too: one warning, and the same run as without the guard."""
    slow = [*LEARNING, "optim.lr=1e-5", "optim.schedule=constant", "train.epochs=8", "guard.patience=1"]
    runs = [
        train(load_recipe(recipe_path, [*slow, f"guard.action={action}", f"run_dir={tmp_path / action}"]))
        for action in ("none", "rewind")
    ]
    assert capsys.readouterr().out.count("Training has not begun to learn by step 48") == 1
    (row,) = guard_rows(runs[1], "warn")
    assert row["step"] == 48
    one, other = (named_checkpoint(run, "last").tensors("model") for run in runs)
    assert all(torch.equal(one[key], value) for key, value in other.items())


# ---- warm start -----------------------------------------------------------------------------------------------------


def test_a_warm_start_is_a_function_of_the_step(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes the run, the start of the run says so, and an interruption within it changes nothing."""
    warm, parts, usual = tmp_path / "warm", tmp_path / "parts", tmp_path / "usual"
    train(load_recipe(recipe_path, ["objective.warm_start=0.8", f"run_dir={warm}"]))
    assert "nrat, warm start over 80 % of training on cpu" in capsys.readouterr().out
    for stop in (["train.max_steps=3"], ["train.max_steps=7"], []):
        train(load_recipe(recipe_path, ["objective.warm_start=0.8", f"run_dir={parts}", *stop]))
    assert digest(parts) == digest(warm)
    train(load_recipe(recipe_path, [f"run_dir={usual}"]))
    assert digest(usual) != digest(warm)


def test_a_warm_start_without_effect_is_said(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRADES has cross-entropy throughout: the run is the same, and a sentence says so."""
    for value in (0, 0.5):
        arguments = ["objective.name=trades", f"objective.warm_start={value}", f"run_dir={tmp_path / str(value)}"]
        train(load_recipe(recipe_path, arguments))
        said = "objective.warm_start has no effect: trades has cross-entropy throughout" in capsys.readouterr().out
        assert said == bool(value)
    assert digest(tmp_path / "0.5") == digest(tmp_path / "0")
