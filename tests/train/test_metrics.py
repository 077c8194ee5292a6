"""The table of metrics: one entry is enough for a new one."""

import json
from pathlib import Path

import pytest

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.metrics import METRICS, Metric


def test_a_metric_is_one_entry(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Added from outside: it is in metrics.jsonl, in the lines of a run and in checkpoints, and it resumes."""
    confidence = Metric(
        "images", lambda part: part.logits.softmax(1).amax(1), progress="confidence", summary="mean confidence"
    )
    monkeypatch.setitem(METRICS, "confidence", confidence)
    run = tmp_path / "run"
    for stop in (["train.max_steps=6"], []):
        train(load_recipe(recipe_path, [f"run_dir={run}", "train.log_every=2", *stop]))
    rows = [row for row in RunFolder(run).read_metrics() if row["kind"] == "train"]
    assert all(0.1 <= row["confidence"] <= 1 for row in rows) and len(rows) == 3
    out = capsys.readouterr().out
    assert "  confidence " in out and "mean confidence " in out
    assert "confidence" in named_checkpoint(run, "last").state["sum_names"]


def test_metrics_of_other_objectives_are_null(recipe_path: Path, tmp_path: Path) -> None:
    """Natural training has no robust accuracy; plain adversarial training has no natural one."""
    for objective, missing in (("natural", "robust_accuracy"), ("pgd_at", "natural_accuracy")):
        run = train(load_recipe(recipe_path, [f"objective.name={objective}", f"run_dir={tmp_path / objective}"]))
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert [key for key, value in row.items() if value is None] == [missing]
