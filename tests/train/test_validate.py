"""Validation that a signal interrupts: the run saves it as due, and the resumed run does it first."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train import validate
from nrat_scale.train.loop import train
from nrat_scale.train.signals import Stopped
from tests.support.runs import digest


@pytest.mark.parametrize("call", [4, 6], ids=["second validation", "last validation"])
def test_a_stop_during_validation(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The interrupted validation is saved as due and done first by the resumed run, also after the last step: metrics and
    checkpoints are those of an uninterrupted run."""
    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}"]))
    real: Callable[..., object] = validate.correct_under
    calls: list[str] = []

    def signalled(attack, model, images, *rest, **options):
        if len(images) == 20:  # all held-out images, not those with another clean label
            calls.append(attack)
            if len(calls) == call:  # `natural` and the attack by turns
                os.kill(os.getpid(), signal.SIGTERM)
        return real(attack, model, images, *rest, **options)

    monkeypatch.setattr(validate, "correct_under", signalled)
    recipe = load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(Stopped):
        train(recipe)
    kinds = [row["kind"] for row in RunFolder(tmp_path / "run").read_metrics()]
    assert kinds == ["train", "validation"] * (call // 2 - 1) + ["train"]
    assert digest(train(recipe)) == digest(whole)
