"""The progress of a run that has no terminal."""

from pathlib import Path

import pytest

from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train


def test_progress_in_plain_lines(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: a line every `log_every` steps with speed, share of the attack, rate and metrics."""
    train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.log_every=5"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["5/12", "10/12"]
    for word in ("epoch", "loss", "natural", "robust", "lr", "img/s", "attack", "gradient", "ETA"):
        assert f"  {word}" in lines[0] or f" {word}" in lines[0], word
