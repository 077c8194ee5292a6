"""timing.jsonl: hardware, seconds and throughput, apart from what a resumed run repeats bit for bit."""

from pathlib import Path

import pytest

from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train


def test_a_resumed_run_appends(recipe_path: Path, tmp_path: Path) -> None:
    """Each start adds its rows; metrics.jsonl, which has no times, is that of an uninterrupted run."""
    name = f"run_dir={tmp_path / 'run'}"
    train(load_recipe(recipe_path, [name, "train.max_steps=4"]))
    run = RunFolder(tmp_path / "run")
    with open(run.timing, "ab") as file:
        file.write(b'{"kind": "epo')  # as a killed process leaves it
    train(load_recipe(recipe_path, [name]))
    rows = run.read_timing()
    kinds = [row["kind"] for row in rows]
    assert kinds == ["start", "epoch", "validation", "end", "start", *["epoch", "validation"] * 2, "end"]
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2, 3]
    assert [row["step"] for row in rows if row["kind"] == "start"] == [0, 4]
    start, epoch = rows[0], rows[1]
    assert start["device"] == "cpu" and start["processes"] == 1 and start["device_name"] and start["versions"]["torch"]
    assert epoch["images"] == 64
    assert epoch["images_per_second"] == pytest.approx(64 / epoch["seconds"], rel=0.05)
    train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}"]))
    assert run.metrics.read_bytes() == RunFolder(tmp_path / "whole").metrics.read_bytes()


def test_timing_that_cannot_be_written_ends_nothing(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning, and the run is trained."""
    run = RunFolder(tmp_path / "run")
    train(load_recipe(recipe_path, [f"run_dir={run.path}", "train.max_steps=4"]))
    run.timing.unlink()
    run.timing.mkdir()
    capsys.readouterr()
    train(load_recipe(recipe_path, [f"run_dir={run.path}"]))
    assert capsys.readouterr().err.count("Training continues without timing.") == 1
    assert run.read_timing() == [] and [row["epoch"] for row in run.read_metrics()][-1] == 3
