"""The engine: the same result for any number of processes, steps that change nothing when they go wrong, and no wasted work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from bench import step as bench_step
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.recovery import save
from nrat_scale.train.setup import start
from nrat_scale.train.step import micro_batches, train_step
from tests.support.runs import RECIPE, ROOT, digest, launch, make_shards

GROUPS = ["model.bn=groups", "model.bn_group_size=4"]
TWENTY_STEPS = ["precision=fp64", "train.epochs=5", "train.keep=20"]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


@pytest.fixture(scope="module")
def wide_path(recipe_path: Path) -> Path:
    """The same with BatchNorm: a WideResNet of depth 10."""
    path = recipe_path.with_name("wide.yaml")
    model = "{name: wrn28_10_silu, kwargs: {depth: 10, width: 1}}"
    path.write_text(recipe_path.read_text().replace("{name: cnn4, kwargs: {width: 4, hidden: 16}}", model))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path, tolerance: float) -> None:
    """Metrics of every epoch, and all tensors of the last checkpoint."""
    assert len(rows(run)) == len(rows(other))
    for ours, theirs in zip(rows(run), rows(other), strict=True):
        for key, value in theirs.items():
            near = pytest.approx(value, abs=tolerance) if isinstance(value, float) else value
            assert ours[key] == near, f"{key} of step {theirs['step']}"
    for name in ("model", "ema", "optimizer"):
        one, two = (named_checkpoint(folder, "last").tensors(name) for folder in (other, run))
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )


# ---- the same for any number of processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("recipe_path", []),
        ("wide_path", [*GROUPS, "awp.gamma=0.005", "awp.warmup_epochs=2"]),
        ("wide_path", [*GROUPS, "objective.name=dm_at", "train.epochs=5"]),  # whose attack reuses the natural forward
    ],
    ids=["no BatchNorm", "groups", "dm_at"],
)
def test_elastic(path: str, model: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One process, then two with workers, then one with other workers: losses and weights of a run by one, to 1e-6."""
    overrides, recipe_path = [*TWENTY_STEPS, *model], request.getfixturevalue(path)
    whole = train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'whole'}"]))
    run = tmp_path / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_recipe(recipe_path, [*overrides, f"run_dir={run}", "train.max_steps=6"]))
    done = launch([str(recipe_path), *overrides, f"run_dir={run}", "train.max_steps=13", "data.workers=1"], processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout, "the launcher must really have started two"
    assert "resuming" in done.stdout
    done = launch([str(recipe_path), *overrides, f"run_dir={run}", "data.workers=3"])
    assert done.returncode == 0, done.stderr
    assert_same(run, whole, 1e-6)


def test_two_processes_with_local_statistics_resume_exactly(wide_path: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, too: running statistics are the same on all ranks after every step."""
    overrides = [str(wide_path), "train.epochs=2"]
    for run, stops in (("whole", []), ("parts", ["train.max_steps=3"])):
        for stop in [stops, []] if stops else [[]]:
            done = launch([*overrides, f"run_dir={tmp_path / run}", *stop], processes=2)
            assert done.returncode == 0, done.stderr
            assert "2 process(es)" in done.stdout
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_groups_do_not_depend_on_accumulation(wide_path: Path, tmp_path: Path, accumulate: int) -> None:
    """Micro-batches of whole groups give the statistics of the whole batch."""
    overrides = [*TWENTY_STEPS, *GROUPS, "train.max_steps=6"]
    one = train(load_recipe(wide_path, [*overrides, f"run_dir={tmp_path / 'one'}"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    other = [*overrides, f"train.accumulate={2 * accumulate}", f"run_dir={tmp_path / 'other'}"]
    assert_same(train(load_recipe(wide_path, other)), one, 1e-9)


@pytest.mark.parametrize("world_size", [2, 4])
def test_images_labels_augmentation_and_noise_are_those_of_the_global_batch(
    recipe_path: Path, tmp_path: Path, world_size: int
) -> None:
    """Exactly, for every rank: they are drawn for the global batch and sliced."""
    overrides = ["data.augment.flip=true", "data.augment.crop=2", f"run_dir={tmp_path / 'run'}"]
    t = start(load_recipe(recipe_path, overrides))
    whole = [micro_batches(t, batch) for batch in t.data.batches(5, 8)]
    ranks = [
        [micro_batches(t, batch) for batch in t.data.batches(5, 8, rank, world_size)] for rank in range(world_size)
    ]
    for number, parts in enumerate(whole):
        (one,) = parts
        slices = [next(iter(rank[number])) for rank in ranks]
        for name in ("x", "y", "clean", "noise"):
            assert torch.equal(torch.cat([getattr(part, name) for part in slices]), getattr(one, name)), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.bn=groups"], "go together"),
        (["model.bn_group_size=4"], "go together"),
        (["model.bn=groups", "model.bn_group_size=3"], "divide the 16 images"),
        (["model.bn=groups", "model.bn_group_size=8", "train.accumulate=4"], "divide the 4 images"),
        (["model.bn=sync"], "needs GPUs"),
        (["model.bn=grups"], "Did you mean 'groups'"),
        (["precision=fp16"], "GPU"),
    ],
)
def test_what_cannot_be_is_refused(wide_path: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    """Before anything is written."""
    with pytest.raises(UserError, match=message):
        train(load_recipe(wide_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


# ---- steps that go wrong --------------------------------------------------------------------------------------------

DIVERGING = ["objective.name=trades", "optim.lr=1e30", "optim.schedule=constant", "train.epochs=2"]


@pytest.mark.parametrize("lag", [0, 1], ids=["read at once", "read a step later"])
def test_a_bad_step_changes_nothing(wide_path: Path, tmp_path: Path, lag: int) -> None:
    """Weights, EMA, statistics and sums stay those of the step before, whenever the host reads the flag."""
    t = start(load_recipe(wide_path, [*DIVERGING, f"run_dir={tmp_path / 'run'}"]))
    assert t.ema is not None
    t.flags._lag = lag  # as on a GPU
    kept = {**t.base.state_dict(), "sums": t.sums, "guard": t.guard.sums}
    kept |= {f"ema.{name}": value for name, value in t.ema.module.state_dict().items()}
    before: dict[str, torch.Tensor] = {}
    for batch in t.data.batches(0, 2 + lag):
        before = {name: value.clone() for name, value in kept.items()} if t.step < 2 else before
        train_step(t, batch)
        t.step += 1
        verdict = t.flags.read()
        assert (verdict is None) == (t.step < 2 + lag)
    assert verdict is not None and verdict.step == 2
    for name, value in kept.items():
        assert torch.equal(value, before[name]), name


def test_divergence_says_what_and_where(recipe_path: Path, tmp_path: Path) -> None:
    """The message names step, images and the file; the file holds the weights before the step, and no checkpoint is of it."""
    good = train(load_recipe(recipe_path, [*DIVERGING, "train.max_steps=1", f"run_dir={tmp_path / 'good'}"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"Step 2 is stopped .*rank 0, images (real|generated) \d+, .*Lower optim"
    ):
        train(load_recipe(recipe_path, [*DIVERGING, f"run_dir={run}"]))
    kept = load_file(run / "bad-step-00000002-rank0.safetensors")
    assert kept["x"].shape == (16, 1, 12, 12) and kept["ids"].shape == kept["generated"].shape == (16,)
    for name, value in named_checkpoint(good, "last").tensors("model").items():
        assert torch.equal(kept[f"model.{name}"], value), name
    assert not list((run / "checkpoints").glob("step-*"))


SABOTAGED = """
import os, sys, torch
from nrat_scale.train.__main__ import main
from nrat_scale.objectives import Objective
loss = Objective.loss
calls = []
def sabotaged(self, *given):
    calls.append(1)
    return loss(self, *given) * (float("nan") if len(calls) == 6 and os.environ["RANK"] == "1" else 1.0)
Objective.loss = sabotaged
from nrat_scale.core.errors import run_cli
run_cli(main)
"""


def test_one_rank_that_goes_wrong_stops_all(recipe_path: Path, tmp_path: Path) -> None:
    """A loss that is NaN on rank 1 only: both stop at that step, rank 1 is named, and its images are kept."""
    script = tmp_path / "sabotaged.py"
    script.write_text(SABOTAGED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(recipe_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode != 0
    assert "Step 6 is stopped" in done.stderr and "(rank 1, images" in done.stderr
    assert [path.name for path in (tmp_path / "run").glob("bad-*")] == ["bad-step-00000006-rank1.safetensors"]
    assert json.loads((tmp_path / "run/checkpoints/last.json").read_text())["step"] == 4


EQUAL = """
import hashlib, sys, torch
from accelerate.utils import gather_object
from nrat_scale.recipe import load_recipe
from nrat_scale.train.step import train_step
from nrat_scale.train.setup import start
t = start(load_recipe(sys.argv[1], sys.argv[2:]))
for batch in t.data.batches(0, 4, t.accelerator.process_index, t.accelerator.num_processes):
    train_step(t, batch)
    t.step += 1
tensors = [*t.base.state_dict().values(), *t.ema.module.state_dict().values()]
mine = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
hashes = gather_object([mine])
assert len(hashes) == 2 and len(set(hashes)) == 1, hashes
t.accelerator.print("equal on", len(hashes), "ranks")
"""


def test_ranks_stay_bit_equal(wide_path: Path, tmp_path: Path) -> None:
    """With AWP, accumulation and BatchNorm: the perturbation comes from the gradient of all ranks, or weights would part."""
    script = tmp_path / "equal.py"
    script.write_text(EQUAL)
    awp = ["awp.gamma=0.005", "awp.warmup_epochs=0", "train.accumulate=2", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(wide_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *awp], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert "equal on 2 ranks" in done.stdout, done.stderr


def test_a_full_disk_costs_checkpoints_not_the_run(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saves that find no room are told and missed; the last one must succeed."""
    import shutil

    real, calls = shutil.disk_usage, []

    def full(path: object) -> Any:
        calls.append(path)
        return real(path)._replace(free=0) if len(calls) < 3 else real(path)

    monkeypatch.setattr("nrat_scale.checkpoint.format.shutil.disk_usage", full)
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    assert capsys.readouterr().out.count("Training continues without the checkpoint") == 2
    assert named_checkpoint(run, "last").step == 12


# ---- no wasted work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "most"), [("nrat", 27), ("trades", 27), ("dm_at", 26)])
def test_the_step_is_the_textbook_step_and_costs_no_more(tmp_path: Path, objective: str, most: int) -> None:
    """In float64 the same adversarial images, pixel for pixel, and the same loss; by torch's FLOP formulas at most 27
    forward passes for each image, and 26 where the natural logits are used twice."""
    bench_step.make_images(tmp_path, 64)
    differing, loss = bench_step.equality(tmp_path, "resnet18_cifar", objective, 2)
    assert differing == 0
    assert abs(loss) < 1e-9
    ours = bench_step.Ours(tmp_path, "resnet18_cifar", objective, 2, f"threat.bn={bench_step.STEPPED[objective]}")
    assert most - 1 < bench_step.forward_equivalents(ours.state.base, ours.first_part().x, ours.step) <= most


def test_mixed_precision_starts_in_float32(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 the first attack step of a divergence from a tiny start is computed in float32, the others are not."""
    t = start(load_recipe(recipe_path, ["precision=bf16", "threat.num_steps=3", f"run_dir={tmp_path / 'run'}"]))
    types: list[torch.dtype] = []
    t.twin.module.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    train_step(t, next(t.data.batches(0, 1)))
    assert types == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]  # natural logits, three steps


def test_the_profile_of_a_run(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--profile` writes a trace that names the sections, and says where the time of a step goes."""
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.epochs=2"]), profile=3)
    out = capsys.readouterr().out
    assert "profile of steps 3 to 5" in out
    shares = {
        line.split()[0]: float(line.split()[-2])
        for line in out.splitlines()
        if line.endswith("%") and "ms a step" in line
    }
    assert set(shares) == {"data", "attack", "outer", "optimizer", "logging", "other"}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    trace = json.loads((run / "profile" / "steps-3-5.json").read_text())
    assert {"attack", "outer"} <= {event.get("name") for event in trace["traceEvents"]}


def test_progress_in_plain_lines(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody watches a terminal: a line every `log_every` steps with speed, shares, rates and accuracies."""
    train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.log_every=5"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["5/12", "10/12"]
    for word in ("epoch", "loss", "natural", "robust", "lr", "img/s", "attack", "gradient", "ETA"):
        assert f"  {word}" in lines[0] or f" {word}" in lines[0], word


def test_saving_does_not_change_what_follows(recipe_path: Path, tmp_path: Path) -> None:
    """A checkpoint that is written while training goes on holds the state of its own step."""
    t = start(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    for batch in t.data.batches(0, 3):
        train_step(t, batch)
        t.step += 1
        if t.step == 2:
            expected = {name: value.clone() for name, value in t.base.state_dict().items()}
            save(t, is_best=True)
    assert t.saver is not None
    t.saver.close()
    saved = named_checkpoint(tmp_path / "run", "best").tensors("model")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_epochs_are_put_aside_for_a_release(
    recipe_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every epoch that the recipe asks for and no other, the evaluated weights of its end, once, whatever was interrupted; and
    where that is not possible the run says so and ends like any other."""
    aside = ["release.every_epochs=1", "train.keep=1"]
    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}", *aside]))
    steps = load_recipe(whole / "recipe.yaml").train.epochs
    for stop in (["train.max_steps=2"], []):
        parts = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'parts'}", *aside, *stop]))
    folders = [sorted((run / "releases").iterdir()) for run in (whole, parts)]
    assert [path.name for path in folders[0]] == [path.name for path in folders[1]]
    assert [path.name for path in folders[0]] == [f"epoch-{epoch:04d}" for epoch in range(1, steps + 1)]
    for first, second in zip(*folders, strict=True):
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    last = named_checkpoint(whole, "last")
    kept = (folders[0][-1] / "model.safetensors").read_bytes()
    assert kept == (last.folder / f"{last.evaluated}.safetensors").read_bytes()
    blocked = tmp_path / "blocked"
    train(load_recipe(recipe_path, [f"run_dir={blocked}", "train.keep=1", "train.max_steps=2"]))
    (blocked / "releases").write_text("in the way")
    train(load_recipe(recipe_path, [f"run_dir={blocked}", *aside]))
    assert digest(blocked) == digest(whole)
    assert "not queued for a release" in "".join(capfd.readouterr())
