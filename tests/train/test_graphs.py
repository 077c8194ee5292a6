"""The step as graphs: equal to the step, bit for bit; chosen by `train.graphs`."""

from pathlib import Path

import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms
from nrat_scale.optim import set_rates
from nrat_scale.recipe import load_recipe
from nrat_scale.train import loop
from nrat_scale.train.graphs import StepGraphs
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import train_step
from tests.support.captured import capture_operations
from tests.support.runs import digest

CONSTANT_EMA = ["ema.decay=0.1", "ema.warmup_fraction=0"]  # (1 + t) / (10 + t) is never smaller


def _trained(recipe_path: Path, run: Path, options: list[str], *, graphs: bool, num_steps: int = 7) -> TrainState:
    """The state after some steps; the learning rate changes after four."""
    state = start(load_recipe(recipe_path, [*CONSTANT_EMA, *options, f"run_dir={run}"]))
    if graphs:
        state.graphs = StepGraphs(state, required=True, capture=capture_operations)
    momenta = {layer: layer.momentum for layer in batchnorms(state.base)}
    for batch in state.data.batches(0, num_steps):
        set_rates(state.optimizer, 0.01 * (1 + state.step // 4), 0.9 - 0.1 * (state.step // 4))
        for layer, usual in momenta.items():
            layer.momentum = 1.0 if state.step == 0 else usual
        train_step(state, batch)
        state.step += 1
    return state


def _assert_equal(one: TrainState, other: TrainState) -> None:
    """Weights, averages, statistics, optimizer, metrics and checks have the same bits."""
    for name in ("base", "ema"):
        ours, theirs = (getattr(state, name).state_dict() for state in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = (state.optimizer.state_dict()["state"] for state in (one, other))
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[key][name], theirs[key][name]) for key in ours for name in ours[key])
    pairs = (one.sums, other.sums), (one.guard.sums, other.guard.sums), (one.checks.here != 0, other.checks.here != 0)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "captured"),
    [
        (["objective.name=nrat"], "attack training update"),
        (["objective.name=dm_at", "optim.nesterov=true", "optim.decay_norms=false"], "attack training update"),
        (["objective.name=pgd_at", "data.augment.cutmix=0.5", "optim.name=adamw"], "attack training"),
        (["objective.name=natural", "objective.inner=ce", "train.max_grad_norm=0.1"], "training update"),
        (["objective.name=mart", "train.accumulate=2", "train.channels_last=false"], "attack training update"),
        (["objective.name=trades", "awp.gamma=0.01", "awp.warmup_epochs=0"], "attack training"),
        (["precision=bf16"], "attack training update"),
        (["objective.warm_start=1"], "attack update"),
        (["objective.name=adr"], "attack training update"),
        (["objective.name=trades_noilin"], "attack training update"),
        (["model.bn=groups", "model.bn_group_size=4"], "attack"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_graphed_step_is_the_step(wide_path: Path, tmp_path: Path, options: list[str], captured: str) -> None:
    """Everything after replays equals what launches give, with bits, also after the learning rate has changed."""
    states = [_trained(wide_path, tmp_path / str(g), options, graphs=g) for g in (False, True)]
    _assert_equal(*states)
    graphs = states[1].graphs
    assert graphs is not None
    calls = {"attack": graphs.attack, "training": graphs.training, "update": graphs.update}
    assert [name for name, call in calls.items() if call.num_captures] == captured.split()
    assert all(call.num_captures <= 2 for call in calls.values())


@pytest.mark.medium
def test_an_update_that_changes_in_every_step_is_launched(wide_path: Path, tmp_path: Path) -> None:
    """With another decay of the EMA in each step nothing is captured, nothing is given up, and nothing is said."""
    options = ["ema.decay=0.9", "objective.name=natural", "objective.inner=ce"]
    states = [_trained(wide_path, tmp_path / str(g), options, graphs=g) for g in (False, True)]
    _assert_equal(*states)
    graphs = states[1].graphs
    assert graphs is not None and graphs.update.num_captures == 0 and graphs.update.enabled


def test_a_graph_skips_the_update_of_a_bad_step(recipe_path: Path, tmp_path: Path) -> None:
    """After a failure that the device has noted, a replay leaves the weights and notes what launches note."""
    states = [_trained(recipe_path, tmp_path / str(g), [], graphs=g, num_steps=4) for g in (False, True)]
    before = [parameter.clone() for parameter in states[1].base.parameters()]
    for state in states:
        state.checks.note("attack", torch.tensor(True))
        train_step(state, next(state.data.batches(4, 5)))
    graphs = states[1].graphs
    assert graphs is not None and graphs.update.num_replays == 3
    assert all(torch.equal(*pair) for pair in zip(before, states[1].base.parameters(), strict=True))
    _assert_equal(*states)
    verdicts = [state.checks.read(everything=True) for state in states]
    assert verdicts[0] == verdicts[1] and verdicts[0] is not None and verdicts[0].wrong == ("attack",)


@pytest.mark.medium
def test_a_run_resumes_between_replays(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped twice, a run with graphs ends with the bits of an undisturbed run without."""
    whole = train(load_recipe(recipe_path, [*CONSTANT_EMA, f"run_dir={tmp_path / 'whole'}"]))
    made: list[StepGraphs] = []

    def use_graphs(state: TrainState) -> None:
        state.graphs = StepGraphs(state, required=True, capture=capture_operations)
        made.append(state.graphs)

    monkeypatch.setattr(loop, "use_graphs", use_graphs)
    for stop in (["train.max_steps=3"], ["train.max_steps=7"], []):
        parts = train(load_recipe(recipe_path, [*CONSTANT_EMA, *stop, f"run_dir={tmp_path / 'parts'}"]))
    assert digest(parts) == digest(whole)
    assert all(graphs.update.num_replays for graphs in made)


def test_a_run_without_a_gpu_has_no_graphs(recipe_path: Path, tmp_path: Path) -> None:
    """`auto` and `false` train; `true` says what it needs; the keys are no part of the identity."""
    for value in ("auto", "false"):
        train(load_recipe(recipe_path, [f"train.graphs={value}", "train.max_steps=1", f"run_dir={tmp_path / value}"]))
    with pytest.raises(UserError, match=r"train\.graphs is true, but they need a GPU, and this run is on cpu"):
        train(load_recipe(recipe_path, ["train.graphs=true", f"run_dir={tmp_path / 'true'}"]))
    with pytest.raises(UserError, match=r"train\.graphs is 'maybe'"):
        load_recipe(recipe_path, ["train.graphs=maybe"])
    options = (["train.graphs=false"], ["train.deterministic=true"], ["train.tf32=true"], [])
    assert len({load_recipe(recipe_path, given).identity for given in options}) == 1
    assert load_recipe(recipe_path, ["train.tf32=false"]).identity != load_recipe(recipe_path).identity


def test_deterministic_algorithms_are_chosen_for_each_run(recipe_path: Path, tmp_path: Path) -> None:
    """`train.deterministic` switches torch and cuDNN, and the next run in the process switches back."""
    for value in (True, False):
        run = tmp_path / str(value)
        start(load_recipe(recipe_path, [f"train.deterministic={str(value).lower()}", f"run_dir={run}"]))
        assert torch.are_deterministic_algorithms_enabled() is torch.backends.cudnn.deterministic is value
