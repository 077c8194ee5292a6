"""The step as graphs: equal to the step, bit for bit; chosen by `train.graphs`."""

from pathlib import Path

import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms
from nrat_scale.optim import set_rates
from nrat_scale.recipe import load_recipe
from nrat_scale.train.graphs import StepGraphs
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import train_step
from tests.support.captured import capture_fx


def _trained(recipe_path: Path, run: Path, options: list[str], *, graphs: bool, num_steps: int = 6) -> TrainState:
    """The state after some steps."""
    state = start(load_recipe(recipe_path, [*options, f"run_dir={run}"]))
    if graphs:
        state.graphs = StepGraphs(state, required=True, capture=capture_fx)
    momenta = {layer: layer.momentum for layer in batchnorms(state.base)}
    for batch in state.data.batches(0, num_steps):
        set_rates(state.optimizer, 0.01 * (1 + state.step), 0.9)
        for layer, usual in momenta.items():
            layer.momentum = 1.0 if state.step == 0 else usual
        train_step(state, batch)
        state.step += 1
    return state


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "captured"),
    [
        (["objective.name=nrat"], (True, True)),
        (["objective.name=dm_at"], (True, True)),
        (["objective.name=pgd_at", "data.augment.cutmix=0.5"], (True, True)),
        (["objective.name=natural", "objective.inner=ce"], (False, True)),
        (["objective.name=mart", "train.accumulate=2", "train.channels_last=false"], (True, True)),
        (["objective.name=trades", "awp.gamma=0.01", "awp.warmup_epochs=0"], (True, True)),
        (["precision=bf16"], (True, True)),
        (["objective.warm_start=1"], (True, False)),
        (["objective.name=adr"], (True, True)),
        (["objective.name=trades_noilin"], (True, True)),
        (["model.bn=groups", "model.bn_group_size=4"], (True, False)),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_a_graphed_step_is_the_step(wide_path: Path, tmp_path: Path, options: list[str], captured: tuple) -> None:
    """Weights, averages, statistics and metrics after replays equal those of launches, with bits."""
    states = [_trained(wide_path, tmp_path / str(g), options, graphs=g) for g in (False, True)]
    for name in ("base", "ema"):
        ours, theirs = (getattr(state, name).state_dict() for state in states)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert torch.equal(states[0].sums, states[1].sums)
    graphs = states[1].graphs
    assert graphs is not None
    assert (graphs.attack.num_captures > 0, graphs.training.num_captures > 0) == captured
    assert graphs.attack.num_captures <= 2 and graphs.training.num_captures <= 2


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
