"""A run that stops within an epoch logs what it has seen, says so, and resumes to the same bytes."""

import json
import os
import signal
from pathlib import Path

import pytest

from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train import loop
from nrat_scale.train.loop import train
from nrat_scale.train.signals import Stopped
from tests.support.runs import digest


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]


def test_a_run_stopped_before_its_first_epoch(recipe_path, tmp_path, capsys):
    """Three of four steps: a row of kind `partial`, the same again when nothing is left to do, and a sentence."""
    overrides = [f"run_dir={tmp_path / 'run'}", "train.max_steps=3"]
    run = train(load_recipe(recipe_path, overrides))
    (row,) = _rows(run)
    assert (row["kind"], row["epoch"], row["step"], row["steps_of_epoch"]) == ("partial", 1, 3, 3)
    assert row["loss"] > 0 and 0 <= row["robust_accuracy"] <= 1
    out = capsys.readouterr().out
    assert "epoch 1: training (step 3, 3 of the epoch) natural" in out
    assert "stopped after 3 of 12 steps, as train.max_steps asks, within epoch 1; the run is saved." in out
    train(load_recipe(recipe_path, overrides))
    assert _rows(run) == [row]
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("stops", [(1, 2, 6), (5,)], ids=str)
def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(recipe_path, tmp_path, stops):
    """The partial rows are gone, bit for bit."""
    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}"]))
    parts = [f"run_dir={tmp_path / 'parts'}"]
    for stop in stops:
        run = train(load_recipe(recipe_path, [*parts, f"train.max_steps={stop}"]))
        assert _rows(run)[-1]["kind"] == "partial"
    assert digest(train(load_recipe(recipe_path, parts))) == digest(whole)


def test_a_signal_within_the_first_epoch(recipe_path, tmp_path, monkeypatch, capsys):
    """What a run stopped by a signal has seen is logged too."""
    step = loop.train_step

    def stopped(state, batch):
        step(state, batch)
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(Stopped):
        train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    (row,) = _rows(tmp_path / "run")
    assert (row["kind"], row["step"]) == ("partial", 2)
    assert "epoch 1: training (step 2, 2 of the epoch)" in capsys.readouterr().out
