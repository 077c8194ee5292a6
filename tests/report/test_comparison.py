"""Comparisons of runs: paired differences, mean over seeds, and what is not compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrat_scale.evaluate.results import write_arrays
from nrat_scale.evaluate.statistics import Paired, paired_interval
from nrat_scale.report.comparison import accuracy_table, difference_table, seed_groups, seed_table
from nrat_scale.report.run import Score, read_runs
from tests.support.evaluated_runs import RECIPE, changed, make_run, results, score


def run_with(folder: Path, right: dict[str, list[bool]], **files: Any) -> Path:
    """A run whose best checkpoint was tested on images 0, 1, ... with these outcomes."""
    attacks = {name: score(sum(one), len(one), 0.1, 0.9) for name, one in right.items()}
    tree = files.pop("results", None) or results()
    tree = {**tree, "checkpoints": {"best": {"step": 60, "epoch": 3, "weights": "ema", "attacks": attacks}}}
    path = make_run(folder, results=tree, **files)
    outcomes = {f"best/{name}": (np.arange(len(one)), np.array(one)) for name, one in right.items()}
    write_arrays(path / "results.json", outcomes)
    return path


def test_differences_are_paired(tmp_path: Path) -> None:
    """Each run minus the first one, image by image, on the images that both saw."""
    one = run_with(tmp_path / "one", {"pgd20": [True] * 10 + [False] * 10})
    two = run_with(tmp_path / "two", {"pgd20": [False] * 2 + [True] * 18 + [True] * 5})
    table = difference_table(read_runs([one, two]))
    assert table is not None and table.head == ("checkpoint", "attack", "two")
    ((checkpoint, attack, found),) = table.rows
    assert (checkpoint, attack) == ("best", "PGD-20") and isinstance(found, Score)
    low, high = paired_interval(Paired(20, 18, 10, 2, 10))
    assert (found.percent, found.low, found.high) == pytest.approx((40, 100 * low, 100 * high))
    assert found.n == 20 and found.text == "+40.0*", "ten to two is beyond chance"


@pytest.mark.parametrize(
    ("path", "value"),
    [("data.fingerprint", "f" * 64), ("threat.eps", 4 / 255), ("threat.norm", "l2")],
)
def test_other_images_and_threats_are_not_subtracted(tmp_path: Path, path: str, value: Any) -> None:
    """Without the same test images and the same threat there is no difference."""
    one = run_with(tmp_path / "one", {"pgd20": [True, False]})
    two = run_with(tmp_path / "two", {"pgd20": [True, True]}, results=changed(results(), path, value))
    assert difference_table(read_runs([one, two])) is None


def test_worst_case_only_beside_its_images(tmp_path: Path) -> None:
    """The worst case is a row if all attacks saw the same images; else it stands apart, with the accuracies on its images."""
    same = run_with(tmp_path / "same", {"natural": [True, True], "pgd20": [True, False]})
    fewer = run_with(tmp_path / "fewer", {"natural": [True, True], "pgd20": [False]})
    together, apart = read_runs([same, fewer])
    assert together.rows[0].scores["worst"].percent == 50 and not together.rows[0].common
    assert "worst" not in apart.rows[0].scores
    common = apart.rows[0].common
    assert {name: (one.percent, one.n) for name, one in common.items()} == {
        "natural": (100, 1),
        "pgd20": (0, 1),
        "worst": (0, 1),
    }
    titles = [row[1] for row in accuracy_table([together, apart]).rows]
    assert titles == ["natural", "PGD-20", "worst case"]
    assert "worst case" not in [row[1] for row in accuracy_table([apart, apart]).rows]


def test_mean_over_seeds(tmp_path: Path) -> None:
    """Runs that differ in seeds and places only; another setting, or the same seeds again, do not count."""
    accuracies = {0: [True] * 6 + [False] * 4, 1: [True] * 8 + [False] * 2}
    paths = []
    for seed, right in accuracies.items():
        recipe = changed(changed(RECIPE, "seed", seed), "data.real.noise.seed", seed)
        paths.append(run_with(tmp_path / f"s{seed}", {"natural": right}, recipe={**recipe, "run_dir": f"runs/{seed}"}))
    paths.append(run_with(tmp_path / "again", {"natural": [True] * 10}, recipe=changed(RECIPE, "seed", 3)))
    paths.append(run_with(tmp_path / "other", {"natural": [True] * 10}, recipe=changed(RECIPE, "optim.lr", 0.2)))
    runs = read_runs([*paths[:2], paths[3]])
    assert [[run.name for run in group] for group in seed_groups(runs)] == [["s0", "s1"]]
    table = seed_table(runs)
    assert table is not None
    assert table.rows == [("s0, s1", "best", "natural", "70.00", "14.14", 2, 10)]
    twice = read_runs([paths[2], run_with(tmp_path / "twice", {"natural": [True] * 10}, recipe=RECIPE)])
    assert seed_groups(twice) == [] and seed_table(twice) is None
