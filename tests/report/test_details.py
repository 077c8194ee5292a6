"""The parts of one run: curves, classes, gallery, time; and every table as CSV and LaTeX."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrat_scale.evaluate.gallery import Gallery, write_gallery
from nrat_scale.evaluate.results import write_arrays
from nrat_scale.labels import BEFORE, UNKNOWN
from nrat_scale.report.content import all_tables
from nrat_scale.report.curves import draw_memorisation
from nrat_scale.report.details import class_table, confusion_tables, curve_tables, strength_curves, timing_table
from nrat_scale.report.page import render_page
from nrat_scale.report.pictures import pictures
from nrat_scale.report.run import Score, read_runs
from nrat_scale.report.tables import Table, csv_table, latex_table
from tests.support.evaluated_runs import changed, make_run, metrics_lines, results, score

LABELS = np.array([0, 0, 1, 1, 2, 2])
PREDICTED = {"natural": [0, 0, 1, 1, 2, 1], "pgd20": [0, 2, 0, 0, 2, 1]}


def whole_run(folder: Path) -> Path:
    """A run with predictions, curves, a gallery and timing."""
    attacks = {name: score(int((found == LABELS).sum()), 6, 0.1, 0.9) for name, found in PREDICTED.items()}
    curves = {
        "eps=0": {**score(6, 6, 0.6, 1.0), "eps": 0.0},
        "eps=8/255": {**score(2, 6, 0.1, 0.7), "eps": 8 / 255, "steps": 20, "step": 2 / 255},
        "eps=4/255": {**score(4, 6, 0.3, 0.9), "eps": 4 / 255, "steps": 20, "step": 1 / 255},
        "eps=2/255": {**score(3, 3, 0.4, 1.0), "eps": 2 / 255, "steps": 20, "step": 1 / 255},
        "steps=5": {**score(3, 6, 0.2, 0.8), "eps": 8 / 255, "steps": 5, "step": 2 / 255},
    }
    best = {"step": 60, "epoch": 3, "weights": "ema", "weights_sha256": "aa", "attacks": attacks, "curves": curves}
    lines = [json.loads(line) for line in metrics_lines()]
    memorised = {"clean_accuracy": 0.9, "noisy_memorised": 0.25, "noisy_corrected": 0.6}
    rows = [{**row, **memorised} if row["kind"] == "train" else row for row in lines]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    run = make_run(folder, results={**results(), "checkpoints": {"best": best}}, metrics=metrics)
    ids = np.arange(6)
    outcomes = {f"best/{name}": (ids, found == LABELS) for name, found in PREDICTED.items()}
    predictions = {f"best/{name}": (LABELS, np.array(found)) for name, found in PREDICTED.items()}
    write_arrays(run / "results.json", outcomes, predictions)
    x = np.zeros((2, 1, 4, 4), np.uint8)
    moved, numbers = np.full(x.shape, 8 / 255, np.float16), np.array([0, 1], np.int32)
    write_gallery(
        run / "results.json", "best", Gallery("pgd20", "aa", "k", x, moved, ids[:2], numbers, numbers, 1 - numbers)
    )
    timing: list[dict[str, Any]] = [
        {
            "kind": "start",
            "time": "2030-01-01T00:00:00+00:00",
            "device_name": "H100",
            "processes": 8,
            "precision": "bf16",
        },
        {"kind": "epoch", "seconds": 1800.0, "images_per_second": 1000.0, "peak_memory_bytes": 2**31},
        {"kind": "epoch", "seconds": 2400.0, "images_per_second": 3000.0, "peak_memory_bytes": 2**30},
        {"kind": "validation", "seconds": 90.0},
    ]
    (run / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing) + '{"kind": "epo')
    return run


def test_curves_have_one_choice_of_images(tmp_path: Path) -> None:
    """Points in order of the radius; a point on fewer images is neither drawn nor in the table."""
    (run,) = read_runs([whole_run(tmp_path / "run")])
    assert [at for at, _ in strength_curves(run, "eps")["best"]] == [0, 4 / 255, 8 / 255]
    by_eps, by_steps = curve_tables(run)
    assert [row[0] for row in by_eps.rows] == ["0", "4/255", "8/255"] and "20 steps of 0.25 eps" in by_eps.caption
    assert [row[0] for row in by_steps.rows] == ["5"] and "step length 2/255" in by_steps.caption


def test_classes(tmp_path: Path) -> None:
    """Confusion matrices natural and under the strongest attack, and the accuracy of each class."""
    (run,) = read_runs([whole_run(tmp_path / "run")])
    natural, attacked = confusion_tables(run, run.rows[0])
    assert [row[1:] for row in natural.rows] == [(2, 0, 0), (0, 2, 0), (0, 1, 1)]
    assert [row[1:] for row in attacked.rows] == [(1, 0, 1), (2, 0, 0), (0, 1, 1)]
    assert "under PGD-20" in attacked.caption and attacked.rows[0][0] == "0 truck"
    table = class_table(run, run.rows[0])
    assert table is not None and table.head == ("class", "natural", "PGD-20")
    percents = [[cell.percent for cell in row if isinstance(cell, Score)] for row in table.rows]
    assert percents == [[100, 50], [100, 0], [50, 50]]


def test_time_and_hardware(tmp_path: Path) -> None:
    """Median throughput, time and peak memory of each start; half a line of a killed run is skipped."""
    (run,) = read_runs([whole_run(tmp_path / "run")])
    table = timing_table(run)
    assert table is not None
    assert table.rows == [("2030-01-01 00:00", "8 × H100", "bf16", 2, "2000", "1.2 h", "1.5 min", "2.0")]


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    """The page has each part once; without the files it has none of them."""
    runs = read_runs([whole_run(tmp_path / "run")])
    page = render_page(runs, [b""])
    for text in ("Accuracy against eps", "Confusion, natural", "Confusion, attacked", "Images under attack", "Time"):
        assert page.count(f"<h3>{text}</h3>") == 1, text
    assert page.count("Memorisation curve") == 1 and draw_memorisation(runs[0])
    assert page.count('class="photo"') == 2 and "magnified 8 times" in page
    assert page.count("automobile ✗") == 1 and page.count("truck ✓") == 1
    bare = render_page(read_runs([make_run(tmp_path / "bare")]), [b""])
    for text in ("Accuracy against", "Confusion", "Images under attack", "<h3>Time", "Memorisation"):
        assert text not in bare, text


def test_a_gallery_of_other_weights_is_not_shown(tmp_path: Path) -> None:
    """A gallery belongs to the weights that were evaluated."""
    path = whole_run(tmp_path / "run")
    content = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(json.dumps(changed(content, "checkpoints.best.weights_sha256", "bb")))
    (run,) = read_runs([path])
    assert pictures(run, run.rows[0]) is None


def test_every_table_of_the_page_as_csv_and_latex(tmp_path: Path) -> None:
    """As many tables as on the page, with unique names; CSV reads back with equally long rows."""
    for runs in (read_runs([whole_run(tmp_path / "a")]), read_runs([tmp_path / "a", whole_run(tmp_path / "b")])):
        tables = all_tables(runs)
        page = render_page(runs, [b""] * len(runs))
        referred = page.count("The labels are those of")  # an equal noise matrix stands once on the page
        assert len(tables) == page.count("<table") + referred and len({table.name for table in tables}) == len(tables)
        for table in tables:
            rows = list(csv.reader(io.StringIO(csv_table(table))))
            assert len({len(row) for row in rows}) == 1 and len(rows) == len(table.rows) + 1
            latex = latex_table(table)
            assert latex.count(r"\\") == len(table.rows) + 1 and "%" not in latex.replace(r"\%", "")


@pytest.mark.parametrize(
    ("text", "latex"), [("a_b & 5 %", r"a\_b \& 5 \%"), ("[x]", "{[}x]"), ("\\input{x}", r"\textbackslash{}input\{x\}")]
)
def test_names_cannot_change_a_latex_table(text: str, latex: str) -> None:
    """Text from a file is typeset as it is."""
    assert f"{latex} & 62.0" in latex_table(Table("t", "c", ("name", "x"), [(text, "62.0")]))


def test_csv_of_scores() -> None:
    """A score is four columns of numbers; what was not measured is empty, and minus signs are those of programs."""
    table = Table("t", "c", ("name", "PGD-20"), [("a", Score(62.04, 57.7, None, 500)), ("b", None), ("−1.0", None)])
    assert csv_table(table).splitlines() == [
        "name,PGD-20,PGD-20 low,PGD-20 high,PGD-20 n",
        "a,62.04,57.7,,500",
        "b,,,,",
        "-1.0,,,,",
    ]


def test_noise_on_unchecked_labels_is_not_called_wrong(tmp_path: Path) -> None:
    """If nobody knows the labels before injection, no part of the page says which labels are right."""
    noise = json.loads((whole_run(tmp_path / "a") / "label_noise.json").read_text())
    path = tmp_path / "a" / "label_noise.json"
    for blind in (False, True):
        path.write_text(json.dumps({**noise, BEFORE: UNKNOWN} if blind else noise))
        runs = read_runs([tmp_path / "a"])
        page = render_page(runs, [b""])
        words = (
            "class before injection",
            "were changed (whether",
            "was left or was changed by noise",
            "labels before injection",
        )
        assert all((word in page) == blind for word in words)
        (table,) = (table for table in all_tables(runs) if table.name == "label_noise")
        assert table.head[0] == ("before \\ given" if blind else "clean \\ given")
        assert ("clean" in page or "are wrong" in page) != blind
