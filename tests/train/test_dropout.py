"""Dropout and stochastic depth in training: drawn from (seed, step), so a resumed run repeats them; off in attacks."""

from pathlib import Path

import pytest
import torch

from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.step import train_step
from tests.support.runs import digest

DROPPING = ["model.kwargs.drop_rate=0.5"]


def test_a_resumed_run_draws_the_same_dropout(recipe_path: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch, it ends with the same bits; another seed and no dropout do not."""
    ends = {}
    for name, overrides in (("whole", DROPPING), ("resumed", DROPPING), ("plain", [])):
        options = [*overrides, f"run_dir={tmp_path / name}", "train.epochs=2"]
        if name == "resumed":
            train(load_recipe(recipe_path, [*options, "train.max_steps=3"]))
            torch.manual_seed(99)
        ends[name] = digest(train(load_recipe(recipe_path, options)))
    assert ends["whole"] == ends["resumed"] != ends["plain"]


@pytest.mark.parametrize(("overrides", "reused"), [([], True), (DROPPING, False)])
def test_dm_at_reuses_natural_logits_only_without_dropout(
    wide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], reused: bool
) -> None:
    """The attack compares with logits without dropout; those of the training forward have it."""
    given = []

    def step(state, batch) -> None:
        monkeypatch.setattr("nrat_scale.train.step.attacked", watched)
        train_step(state, batch)

    from nrat_scale.train import step as module

    original = module.attacked

    def watched(state, part, logits=None):
        given.append(logits is not None)
        return original(state, part, logits)

    monkeypatch.setattr("nrat_scale.train.loop.train_step", step)
    options = ["objective.name=dm_at", "train.max_steps=1", f"run_dir={tmp_path / 'run'}", *overrides]
    train(load_recipe(wide_path, options))
    assert given == [reused]
