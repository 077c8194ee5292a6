"""The calibration campaign: its cells, its noise, its table, and one real cell of Fashion-MNIST."""

import json
from pathlib import Path

import numpy as np
import pytest

import audit_calibration
from audit_calibration import Cell, cells, human_like, run_cell, table
from nrat_scale.core.errors import UserError
from nrat_scale.labels import corrupt
from nrat_scale.prepare.__main__ import main as prepare

FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_cells_of_the_campaign():
    """Four kinds at four rates and clean labels, three seeds each; an early end leaves whole seeds."""
    planned = list(cells(("none", *audit_calibration.KINDS), audit_calibration.RATES, audit_calibration.SEEDS))
    assert len(planned) == len(set(planned)) == 51
    assert [cell.seed for cell in planned] == sorted(cell.seed for cell in planned)


@pytest.mark.parametrize("rate", audit_calibration.RATES)
def test_noise_has_the_stated_rate(rate):
    """Each kind changes the stated share of the labels, and most labels of each class stay right or the largest group."""
    labels = np.repeat(np.arange(10), 2000)
    for kind in ("symmetric", "asymmetric", "matrix"):
        noise = Cell(kind, rate, 0).noise
        extra = {"class_map": noise.class_map, "matrix": noise.matrix}
        given = corrupt(labels, kind, noise.rate, 0, 10, **extra)
        assert (given != labels).mean() == pytest.approx(rate, abs=0.01)
    matrix = human_like(rate)
    assert (matrix.argmax(axis=1) == np.arange(10)).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1)


def test_table_says_what_was_not_run(tmp_path):
    """A cell that is missing is not run, one that is not identified has no error, and finished ones are averaged."""
    base = {
        "version": audit_calibration.VERSION,
        "truth": 0.2,
        "plain": {"rate": 0.3},
        "suspects": {"precision": 0.9, "recall": 0.8},
        "cleanlab": {"precision": 0.7, "recall": 0.9},
        "accuracy": {"holdout": 0.85},
    }
    corrected = {"identified": True, "unclipped": 0.21, "covers": True}
    (tmp_path / "symmetric-0.2-seed-0.json").write_text(json.dumps({**base, "corrected": corrected}))
    other = {**corrected, "unclipped": 0.17, "covers": False}
    (tmp_path / "symmetric-0.2-seed-2.json").write_text(json.dumps({**base, "corrected": other}))
    (tmp_path / "matrix-0.4-seed-0.json").write_text(json.dumps({**base, "corrected": {"identified": False}}))
    old = {**base, "version": 1, "corrected": corrected}  # of an earlier recipe: run again
    (tmp_path / "none-0-seed-0.json").write_text(json.dumps(old))
    rows = table(tmp_path).splitlines()
    assert "| symmetric | 0.2 | 2 | 20.0 | 19.0 | -3.0 | 1 of 2 | 30.0 | 0.90, 0.80 | 0.70, 0.90 | 85.0 |" in rows
    assert any("| matrix | 0.4 | 1 |" in row and "not identified" in row for row in rows)
    assert sum("not run" in row for row in rows) == 15
    assert len({row.count("|") for row in rows}) == 1


def test_unknown_kind(tmp_path):
    """A mistyped kind is refused before anything runs."""
    with pytest.raises(UserError, match="--kinds names 'symetric'"):
        audit_calibration.main(["--kinds", "symetric", "--cells", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.skipif(
    not FASHION.is_dir(), reason="Fashion-MNIST is not installed (Debian package dataset-fashion-mnist)"
)
def test_a_cell_of_fashion_mnist(tmp_path):
    """20 % symmetric noise in 12,000 real images: within 2 points, covered, precision and recall above 0.8."""
    files = [str(FASHION / f"train-{what}.gz") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    prepare(["idx", *files, "--dataset", "fashion_mnist", "--out", str(tmp_path / "train")])
    record = run_cell(Cell("symmetric", 0.2, 0), str(tmp_path / "train"), tmp_path / "work", [])
    assert record["truth"] == pytest.approx(0.2)
    assert record["corrected"]["covers"]
    assert record["corrected"]["unclipped"] == pytest.approx(0.2, abs=0.02)
    assert record["suspects"]["precision"] > 0.8
    assert record["suspects"]["recall"] > 0.8
    assert record["plain"]["rate"] > record["corrected"]["rate"]
