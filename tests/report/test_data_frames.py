"""`nrat_scale.results` and `nrat_scale.metrics`: tidy tables of runs, in Python and as files."""

import builtins
import csv
from pathlib import Path
from typing import Any

import pytest

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.report.__main__ import main
from tests.support.evaluated_runs import make_run


@pytest.fixture
def no_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if pandas was not installed."""
    usual = builtins.__import__

    def refuse(name: str, *given: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)
        return usual(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("no_pandas")
def test_rows_without_pandas(tmp_path: Path) -> None:
    """One dictionary per checkpoint and attack, and per row of metrics.jsonl; several runs follow each other."""
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    rows = nrat_scale.results(*runs)
    (row,) = (r for r in rows if (r["run"], r["checkpoint"], r["attack"]) == ("one", "best", "pgd20"))
    assert row["accuracy"] == pytest.approx(0.62) and row["n"] == 500 and row["low"] < 0.62 < row["high"]
    assert {r["run"] for r in rows} == {"one", "two"}
    kinds = [r["kind"] for r in nrat_scale.metrics(runs[0])]
    assert "train" in kinds and "validation" in kinds
    with pytest.raises(UserError, match="No path"):
        nrat_scale.results()
    with pytest.raises(UserError):
        nrat_scale.metrics(tmp_path / "nothing")


def test_rows_with_pandas(tmp_path: Path) -> None:
    """A DataFrame with the same rows."""
    pandas = pytest.importorskip("pandas")
    frame = nrat_scale.results(make_run(tmp_path / "one"))
    assert isinstance(frame, pandas.DataFrame)
    assert frame[(frame.checkpoint == "best") & (frame.attack == "pgd20")].accuracy.item() == pytest.approx(0.62)


def test_the_command_writes_csv_and_latex(tmp_path: Path) -> None:
    """`report --csv --latex`: the same numbers."""
    run = make_run(tmp_path / "one")
    out = [tmp_path / name for name in ("r.html", "r.csv", "r.tex")]
    main([str(run), "--out", str(out[0]), "--csv", str(out[1]), "--latex", str(out[2])])
    rows = list(csv.DictReader(out[1].read_text().splitlines()))
    assert [row["accuracy"] for row in rows if (row["checkpoint"], row["attack"]) == ("best", "pgd20")] == ["0.62"]
    assert "62.0" in out[2].read_text() and r"\begin{tabular}" in out[2].read_text()
