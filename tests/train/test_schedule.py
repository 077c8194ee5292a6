"""Training through the phases of a schedule, with N-FGSM and with starts per class: rows, resuming, processes, graphs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.class_starts import ClassStarts
from nrat_scale.train.graphs import StepGraphs
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import attacked, micro_batches, train_step
from tests.support.captured import capture_operations
from tests.support.runs import digest, torchrun

SCHEDULE = "threat.schedule=[{until: 0.4, num_steps: 1, step: 0.1}, {until: 0.7, eps: 0.05, step: 0.03}]"
VARIANTS = {
    "schedule": [SCHEDULE],
    "n_fgsm": ["threat.attack=n_fgsm", "threat.num_steps=1", "threat.step=0.1"],
    "class": ["threat.init=per_class"],
    "class in phases": ["threat.init=per_class", SCHEDULE],
}


def _trained(recipe_path: Path, run: Path, options: list[str], *, graphs: bool = False) -> TrainState:
    """The state after all 12 steps."""
    state = start(load_recipe(recipe_path, [*options, f"run_dir={run}"]))
    if graphs:
        state.graphs = StepGraphs(state, required=True, capture=capture_operations)
    for batch in state.data.batches(0, state.total_steps):
        train_step(state, batch)
        state.step += 1
    return state


# ---- what a run says ------------------------------------------------------------------------------------------------


def test_rows_and_lines_name_the_phase(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 steps: the second phase begins after 5, the third after 9; without a schedule nothing is said."""
    given = ["train.log_every=1", f"run_dir={tmp_path / 'run'}"]
    run = train(load_recipe(recipe_path, [SCHEDULE, *given]))
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    assert [row["phase"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert (
        "attack of training: 1 step of 0.1 until 40 % of training, then 2 steps of 0.03 at eps = 0.05 until 70 %"
        in text
    )
    assert "phase 2/3 from step 5: the attack of training takes 2 steps of 0.03" in text
    assert "phase 3/3 from step 9: the attack of training takes 2 steps of 0.05" in text
    shown = [line.split("phase ")[1][:3] for line in text.splitlines() if line.startswith("step ")]
    assert shown == ["1/3"] * 5 + ["2/3"] * 4 + ["3/3"] * 3
    train(load_recipe(recipe_path, ["train.log_every=1", f"run_dir={tmp_path / 'plain'}"]))
    assert "phase" not in capsys.readouterr().out + RunFolder(tmp_path / "plain").metrics.read_text()


def test_each_phase_attacks_within_its_own_radius(recipe_path: Path, tmp_path: Path) -> None:
    """The images of training; N-FGSM goes further than eps."""
    options = {"schedule": (SCHEDULE, [0.1, 0.05, 0.1]), "n_fgsm": (*VARIANTS["n_fgsm"], [0.25])}
    for name, (*overrides, radii) in options.items():
        state = start(load_recipe(recipe_path, [*overrides, "data.augment.crop=0", f"run_dir={tmp_path / name}"]))
        for state.step, radius in zip((0, 5, 9), radii, strict=False):
            (part,) = micro_batches(state, next(state.data.batches(state.step, state.step + 1)))
            moved = (attacked(state, part).x_adv - part.x).abs().max()
            assert 0.8 * radius < float(moved) <= radius * (1 if name == "schedule" else 1.2) + 1e-6


def test_catastrophic_overfitting_is_a_warning(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, when a validation finds it."""
    from nrat_scale.train import loop

    real_close, real_validate = loop.close_epoch, loop.validate
    broken = {"correct": 0, "n": 20, "accuracy": 0.0}
    monkeypatch.setattr(loop, "close_epoch", lambda *given: real_close(*given) | {"robust_accuracy": 0.9})
    monkeypatch.setattr(loop, "validate", lambda state: real_validate(state) | {"robust": broken})
    train(load_recipe(recipe_path, [*VARIANTS["n_fgsm"], f"run_dir={tmp_path / 'run'}"]))
    text = capsys.readouterr().out
    assert (
        text.count(
            "warning: catastrophic overfitting in epoch 1: the model withstands the attack of training, and pgd2"
        )
        == 1
    )
    assert "overfitting in epoch 2" not in text


# ---- exact in every way of running ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_an_interrupted_run_has_the_same_bits(recipe_path: Path, tmp_path: Path, name: str) -> None:
    """Interrupted within a phase and within an epoch: metrics, weights and perturbations."""
    whole = train(load_recipe(recipe_path, [*VARIANTS[name], f"run_dir={tmp_path / 'whole'}"]))
    for stop in (["train.max_steps=3"], ["train.max_steps=6"], []):
        parts = train(load_recipe(recipe_path, [*VARIANTS[name], f"run_dir={tmp_path / 'parts'}", *stop]))
    assert digest(parts) == digest(whole)
    assert ("attack.safetensors" in named_checkpoint(whole, "last").sha256) == name.startswith("class")


def test_a_resumed_run_starts_from_its_perturbations(recipe_path: Path, tmp_path: Path) -> None:
    """Without them in the checkpoint the run would end with other weights; a checkpoint that lacks them is refused."""
    given = [*VARIANTS["class"], f"run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, [*given, "train.max_steps=6"]))
    state = start(load_recipe(recipe_path, given))
    assert state.owner is not None and state.class_starts is not None
    state.owner.release()
    fresh = ClassStarts(10, (1, 12, 12), 0, torch.float32)
    assert not torch.equal(state.class_starts.starts, fresh.starts)
    assert set(state.class_starts.starts.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert float(state.class_starts.momentum.abs().sum()) > 0


@pytest.mark.parametrize("options", [["precision=fp32"], ["precision=bf16"]], ids=str)
@pytest.mark.parametrize("name", ["schedule", "class in phases"])
def test_a_graph_is_captured_for_each_phase(recipe_path: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    """With the bits of the plain step; a graph of another phase would take other steps."""
    states = [_trained(recipe_path, tmp_path / str(g), [*VARIANTS[name], *options], graphs=g) for g in (False, True)]
    for ours, theirs in zip(*(state.base.state_dict().values() for state in states), strict=True):
        assert torch.equal(ours, theirs)
    graphs = states[1].graphs
    assert graphs is not None and graphs.attack.enabled and graphs.attack.num_captures == 3


@pytest.mark.medium
@pytest.mark.parametrize("name", ["n_fgsm", "class in phases"])
def test_two_processes_train_as_one(recipe_path: Path, tmp_path: Path, name: str) -> None:
    """In float64 without BatchNorm: the perturbations are those of the whole batch."""
    given = [*VARIANTS[name], "precision=fp64", "train.max_steps=8"]
    one = train(load_recipe(recipe_path, [*given, f"run_dir={tmp_path / 'one'}"]))
    result = torchrun([str(recipe_path), *given, f"run_dir={tmp_path / 'two'}"])
    assert result.returncode == 0, result.stderr
    ours, theirs = (named_checkpoint(run, "last") for run in (one, tmp_path / "two"))
    for key, value in ours.tensors("model").items():
        assert torch.allclose(value, theirs.tensors("model")[key], rtol=0, atol=1e-6), key
    for key, value in ours.tensors("attack").items():
        assert torch.allclose(value, theirs.tensors("attack")[key], rtol=0, atol=1e-9), key


@pytest.mark.parametrize("options", [["train.accumulate=2"], ["objective.name=mart"], ["threat.bn=batch"]], ids=str)
def test_starts_per_class_with_other_steps(recipe_path: Path, tmp_path: Path, options: list[str]) -> None:
    """Micro-batches share the starts of the step; the natural logits may come from training."""
    state = _trained(recipe_path, tmp_path / "run", [*VARIANTS["class"], *options])
    assert state.class_starts is not None and float(state.class_starts.momentum.abs().sum()) > 0


def test_micro_batches_give_the_perturbations_of_the_batch(recipe_path: Path, tmp_path: Path) -> None:
    """One step in one and in four parts, float64."""
    states = []
    for parts in (1, 4):
        given = [*VARIANTS["class"], "precision=fp64", f"train.accumulate={parts}", f"run_dir={tmp_path / str(parts)}"]
        states.append(start(load_recipe(recipe_path, given)))
        train_step(states[-1], next(states[-1].data.batches(0, 1)))
    one, four = (state.class_starts for state in states)
    assert one is not None and four is not None
    assert torch.equal(one.starts, four.starts) and torch.allclose(one.momentum, four.momentum, rtol=1e-12, atol=0)


# ---- the perturbations ----------------------------------------------------------------------------------------------


def test_the_perturbations_are_those_of_the_authors() -> None:
    """Against the published update, written out with its own radius of 1.25 eps, class by class over 30 batches."""
    k, shape, eps = 3, (1, 4, 4), 8 / 255
    u, generator = 10 / 255, torch.Generator().manual_seed(0)
    ours = ClassStarts(k, shape, 0, torch.float64)
    starts, momentum = u * ours.starts.clone(), torch.zeros(k, *shape, dtype=torch.float64)
    for _ in range(30):
        y = torch.randint(0, k - 1 if _ % 2 else k, (8,), generator=generator)
        gradient = torch.randn(8, *shape, generator=generator, dtype=torch.float64)
        ours.add(gradient[:5], y[:5])
        ours.add(gradient[5:], y[5:])
        ours.update(lambda sums: sums)
        for c in set(y.tolist()):
            momentum[c] = (gradient / torch.norm(gradient, p=1))[y == c].mean(0) + 0.3 * momentum[c]
            starts[c] = (starts[c] + u * momentum[c].sign()).clamp(-u, u)
        assert torch.allclose(eps * ours.starts, starts.clamp(-eps, eps), rtol=0, atol=1e-12)
    assert torch.equal(ours.noise(torch.tensor([2, 0])), ours.starts[[2, 0]])
    assert isinstance(ours, nn.Module) and set(ours.state_dict()) == {"starts", "momentum"}


def test_the_class_is_the_noisy_label(recipe_path: Path, tmp_path: Path) -> None:
    """A start belongs to the label trained on, wrong ones included."""
    state = start(load_recipe(recipe_path, [*VARIANTS["class"], f"run_dir={tmp_path / 'run'}"]))
    (part,) = micro_batches(state, next(state.data.batches(0, 1)))
    known = (part.clean >= 0) & part.clean.ne(part.y)
    assert known.any() and state.class_starts is not None
    assert torch.equal(part.noise, state.class_starts.starts[part.y])


def test_perturbations_of_another_shape_are_refused(recipe_path: Path, tmp_path: Path) -> None:
    """A checkpoint without them, as if another version had written it."""
    given = [*VARIANTS["class"], f"run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, [*given, "train.max_steps=1"]))
    from nrat_scale.train import recovery

    state = start(load_recipe(recipe_path, [*given]))
    assert state.owner is not None
    state.owner.release()
    state.class_starts = ClassStarts(9, (1, 12, 12), 0, torch.float32)
    with pytest.raises(UserError, match="does not fit this version's attack for the recipe"):
        recovery.resume(state)
