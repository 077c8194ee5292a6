"""Runs: the same result for any number of processes, and a step that is not finite ends the run on all of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.nonfinite import StepChecks
from nrat_scale.train.setup import start
from nrat_scale.train.step import train_step
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
    for name in ("model", "ema", "optimizer"):
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
    ],
    ids=["no BatchNorm", "groups", "dm_at"],
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
    """In the middle of an epoch, too: running statistics are equal on all ranks after every step."""
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
tensors = [*state.base.state_dict().values(), *state.ema.module.state_dict().values()]
mine = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
hashes = gather_object([mine])
assert len(hashes) == 2 and len(set(hashes)) == 1, hashes
state.accelerator.print("equal on", len(hashes), "ranks")
"""


def test_ranks_stay_bit_equal(wide_path: Path, tmp_path: Path) -> None:
    """With AWP, accumulation and BatchNorm: the perturbation is computed from the gradient averaged over ranks."""
    awp = ["awp.gamma=0.005", "awp.warmup_epochs=0", "train.accumulate=2", f"run_dir={tmp_path / 'run'}"]
    with launched([str(wide_path), *awp], processes=2, script=EQUAL) as launch:
        assert "equal on 2 ranks" in launch.succeed()


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
def test_wrong_settings_are_refused(wide_path: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    """Before anything is written."""
    with pytest.raises(UserError, match=message):
        train(load_recipe(wide_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


# ---- steps that are not finite --------------------------------------------------------------------------------------

DIVERGING = ["objective.name=trades", "optim.lr=1e30", "optim.schedule=constant", "train.epochs=2"]


@pytest.mark.parametrize("lag", [0, 1], ids=["read at once", "read a step later"])
def test_a_bad_step_changes_no_weights(wide_path: Path, tmp_path: Path, lag: int) -> None:
    """Parameters and momentum stay those of the step before, whether the host reads the checks at once or a step later."""
    state = start(load_recipe(wide_path, [*DIVERGING, f"run_dir={tmp_path / 'run'}"]))
    state.checks = StepChecks(torch.device("cpu"), lag=lag)
    before: list[torch.Tensor] = []
    for batch in state.data.batches(0, 2 + lag):
        kept = list(state.base.parameters())
        kept += [value["momentum_buffer"] for value in state.optimizer.state.values()]
        before = [tensor.detach().clone() for tensor in kept] if state.step < 2 else before
        train_step(state, batch)
        state.step += 1
        verdict = state.checks.read()
        assert (verdict is None) == (state.step < 2 + lag)
    assert verdict is not None and verdict.step == 2
    assert all(map(torch.equal, kept, before))


def test_divergence_names_step_images_and_file(recipe_path: Path, tmp_path: Path) -> None:
    """The file holds images and the weights from before the step; the run has no checkpoint of it or of a later one."""
    good = train(load_recipe(recipe_path, [*DIVERGING, "train.max_steps=1", f"run_dir={tmp_path / 'good'}"]))
    run = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"Step 2 was not applied.*rank 0, images (real|generated) \d+, .*Lower optim"
    ):
        train(load_recipe(recipe_path, [*DIVERGING, f"run_dir={run}"]))
    kept = load_file(RunFolder(run).bad_step(2, rank=0))
    assert kept["x"].shape == kept["x_adv"].shape == (16, 1, 12, 12)
    assert kept["ids"].shape == kept["generated"].shape == (16,)
    for name, value in named_checkpoint(good, "last").tensors("model").items():
        assert torch.equal(kept[f"model.{name}"], value), name
    assert not list((run / "checkpoints").glob("step-*"))


SABOTAGED = """
import os
from nrat_scale.core.errors import run_cli
from nrat_scale.objectives import Objective
from nrat_scale.train.__main__ import main
loss, calls = Objective.loss, []
def sabotaged(self, *given):
    calls.append(1)
    return loss(self, *given) * (float("nan") if len(calls) == 6 and os.environ["RANK"] == "1" else 1.0)
Objective.loss = sabotaged
run_cli(main)
"""


def test_a_bad_step_on_one_rank_stops_all(recipe_path: Path, tmp_path: Path) -> None:
    """A loss that is NaN on rank 1 only: both ranks end, rank 1 is named and saves its images, no checkpoint is later."""
    run = tmp_path / "run"
    with launched([str(recipe_path), f"run_dir={run}"], processes=2, script=SABOTAGED) as launch:
        assert launch.wait() == [1, 1]
    assert "Step 6 was not applied" in launch.text("err") and "(rank 1, images" in launch.text("err")
    assert [path.name for path in run.glob("bad-*")] == ["bad-step-00000006-rank1.safetensors"]
    assert named_checkpoint(run, "last").step == 4
