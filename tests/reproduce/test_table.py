"""The table of a grid: numbers, gaps, stamps, and its text, Markdown and CSV."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrat_scale.attacks import RELEASED_CODE_WARNING
from nrat_scale.reproduce.measured import CURVES_WARNING, Measured, Setting, read_cells
from nrat_scale.reproduce.outputs import write_outputs
from nrat_scale.reproduce.page import PageFacts
from nrat_scale.reproduce.table import FAILED, NOT_RUN, Plan, grid_table
from nrat_scale.reproduce.table_text import csv_table, differences_csv, markdown_table, seeds_csv, text_table
from tests.support.synthetic_cells import cell, record, write_cell

NRAT, TRADES = Setting("nrat", "symmetric", 0.4), Setting("trades", "symmetric", 0.4)
PLAN = Plan("table1", "fashion", (NRAT, TRADES), 3, titles={"nrat": "NRAT", "trades": "TRADES"})


def cells_of(folder: Path, *contents: dict[str, Any]) -> list[Measured]:
    """The cells after writing and reading them."""
    for content in contents:
        write_cell(folder, content)
    return read_cells(folder)


def fixed(method: str, correct: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A cell that classifies the first `correct` of 200 images correctly, under AutoAttack only."""
    results = {"best": {"aa": record(np.arange(200) < correct)}}
    return cell(method, seed=seed, **{"results": results, **changes})


def rows_of(text: str) -> list[dict[str, str]]:
    """The lines of a CSV."""
    return list(csv.DictReader(text.splitlines()))


def test_what_was_not_run_says_so(tmp_path: Path) -> None:
    """A cell of the plan without results is `not run` everywhere, with the paper's number beside it; a failed one is `failed`."""
    table = grid_table(PLAN, cells_of(tmp_path, fixed("nrat", 100), fixed("mart", 100)))
    assert [(row.method, row.checkpoint, row.missing) for row in table.rows if not row.cells] == [
        ("TRADES", "best", NOT_RUN),
        ("TRADES", "last", NOT_RUN),
    ]
    assert not any(row.setting.method == "mart" for row in table.rows), "not in the plan"
    for text in (text_table(table), markdown_table(table)):
        assert text.count("not run (paper 45.68)") == 1
        assert "50.0 [43.1, 56.9]" in text
    statuses = {(row["method"], row["checkpoint"], row["attack"]): row["status"] for row in rows_of(csv_table(table))}
    assert statuses["nrat", "best", "aa"] == "finished" and statuses["nrat", "last", "aa"] == NOT_RUN
    assert statuses["trades", "best", "aa"] == NOT_RUN
    assert [one["covers"] for one in rows_of(differences_csv(table))] == [NOT_RUN] * 8
    assert "NRAT, symmetric 0.4: 1 of 3 seeds are finished." in table.notes


def test_what_has_no_number_has_no_row(tmp_path: Path) -> None:
    """A method that was not run, and is not in the paper, is named in one sentence by noise; the CSV keeps its lines."""
    adr, other = Setting("adr", "symmetric", 0.4), Setting("adr", "none", 0.0)
    plan = replace(PLAN, settings=(*PLAN.settings, adr, other), titles={**PLAN.titles, "adr": "ADR, tempered"})
    table = grid_table(plan, cells_of(tmp_path, fixed("nrat", 100)))
    assert table.not_run == "Not run: clean: “ADR, tempered”; symmetric 0.4: “ADR, tempered”."
    for text in (text_table(table), markdown_table(table)):
        assert text.count("ADR") == 2 and table.not_run in text
    assert sum(row["method"] == "adr" for row in rows_of(csv_table(table))) == 2 * 2 * len(plan.measures)
    tried = grid_table(
        plan, cells_of(tmp_path, fixed("adr", 90), cell("adr", "none", 0.0, status="failed", results={}))
    )
    assert not tried.not_run and [row.missing for row in tried.shown[:2]] == [FAILED] * 2


def test_at_a_glance(tmp_path: Path) -> None:
    """One number per method and noise, of the best checkpoint under AutoAttack; warnings of the evaluation are counted."""
    clean = Setting("nrat", "none", 0.0)
    plan = replace(PLAN, settings=(clean, *PLAN.settings))
    flags = {"flags": {"best": ["The gradient is zero."], "last": []}}
    contents = [
        fixed("nrat", 120, noise="none", rate=0.0),
        *(fixed("nrat", 100, seed, **(flags if seed else {})) for seed in range(3)),
        fixed("trades", 80),
    ]
    text = text_table(grid_table(plan, cells_of(tmp_path, *contents)))
    glance = text[text.index("At a glance") : text.index("Test accuracy in %: mean")].splitlines()
    lines = [" ".join(line.split()) for line in glance if line.startswith(("method", "NRAT", "TRADES"))]
    assert lines == [
        "method clean symmetric 0.4",
        "NRAT 60.0 [53.1, 66.5], n = 200, 1 seed 50.0 ± 0.0 [43.1, 56.9], n = 200, 3 seeds, 2 flagged",
        "TRADES not run 40.0 [33.5, 46.9], n = 200, 1 seed",
    ]
    alone = grid_table(PLAN, cells_of(tmp_path))
    assert not alone.overview() and "glance" not in text_table(alone), "of one noise the table itself says it"


def test_costs(tmp_path: Path) -> None:
    """Memorised labels, effective noise and cost are means over the finished seeds, in every format."""
    first, second = ([{"epoch": 4, "noisy_fitted": share, "clean_fitted": 0.75}] for share in (0.25, 0.35))
    contents = [fixed("nrat", 100, 0, memorisation=first), fixed("nrat", 100, 1, memorisation=second)]
    contents.append(fixed("trades", 90, memorisation=[]))
    table = grid_table(PLAN, cells_of(tmp_path, *contents))
    lines = {tuple(line.split()) for line in text_table(table).splitlines()}
    assert {
        ("NRAT", "symmetric", "0.4", "2", "30", "40", "2.69"),
        ("TRADES", "symmetric", "0.4", "1", "-", "40", "2.69"),
    } <= lines
    assert "| NRAT | symmetric 0.4 | 2 | 30 | 40 | 2.69 |" in markdown_table(table)
    costs = ("wrong_labels_fitted", "effective_noise", "cost_millions")
    assert [rows_of(csv_table(table))[0][name] for name in costs] == ["30.0", "40.0", "2.688"]


def test_failed_cells(tmp_path: Path) -> None:
    """A failure is named once with its reason, and does not hide the seeds that finished."""
    failed = cell("trades", seed=1, status="failed", error="out of\x1b memory", results={})
    table = grid_table(PLAN, cells_of(tmp_path, failed))
    assert table.rows[2].missing == FAILED
    assert "TRADES, symmetric 0.4, seed 1 failed: out of? memory" in text_table(table)
    table = grid_table(PLAN, cells_of(tmp_path, fixed("trades", 80)))
    assert "40.0 [33.5, 46.9]" in text_table(table) and "seed 1 failed" in text_table(table)


def test_differences_by_hand(tmp_path: Path) -> None:
    """TRADES minus NRAT over the seeds that both have, on the same images."""
    contents = [fixed("nrat", 100 + seed, seed) for seed in range(4)] + [
        fixed("trades", 90 + seed, seed) for seed in (1, 2, 5)
    ]
    table = grid_table(PLAN, cells_of(tmp_path, *contents))
    (one,) = [found for found in table.differences if not isinstance(found.estimate, str)]
    assert (one.method, one.checkpoint, one.measure) == ("TRADES", "best", "aa")
    assert not isinstance(one.estimate, str)
    assert one.estimate.points == pytest.approx(-5) and one.estimate.seeds == (1, 2)
    assert one.text.startswith("−5.0* [−")
    assert f"{one.text.replace('*', chr(92) + '*')}, n = 200, 2 seeds" in markdown_table(table)
    (line,) = [row for row in rows_of(differences_csv(table)) if row["points"]]
    assert (line["method"], line["minus"], line["points"], line["seeds"]) == ("trades", "nrat", "-5.0", "2")
    assert line["covers"] == "test images and trainings"


def test_one_training_has_no_star(tmp_path: Path) -> None:
    """Its interval is over images alone; another training may differ by more."""
    table = grid_table(PLAN, cells_of(tmp_path, fixed("nrat", 120), fixed("trades", 60)))
    (one,) = [found for found in table.differences if not isinstance(found.estimate, str)]
    assert not isinstance(one.estimate, str) and one.estimate.high < 0 and "*" not in one.text


def test_sources_of_the_methods_that_were_run(tmp_path: Path) -> None:
    """They stand below the table, those of other methods do not."""
    plan = replace(PLAN, sources={"nrat": "Chen et al. 2024", "trades": "Zhang et al. 2019"})
    table = grid_table(plan, cells_of(tmp_path, fixed("nrat", 100)))
    assert markdown_table(table).endswith("Methods: NRAT: Chen et al. 2024.\n")


def test_each_method_has_its_own_reference(tmp_path: Path) -> None:
    """A grid may say what is subtracted from which method; each row names both, and a method without a reference has none."""
    other = Setting("mart", "symmetric", 0.4)
    plan = replace(PLAN, settings=(NRAT, TRADES, other), references={"mart": "trades"})
    contents = [fixed("nrat", 100), fixed("trades", 90), fixed("mart", 93)]
    table = grid_table(plan, cells_of(tmp_path, *contents))
    (one,) = [found for found in table.differences if not isinstance(found.estimate, str)]
    assert not isinstance(one.estimate, str) and one.estimate.points == pytest.approx(1.5)
    for text in (text_table(table), markdown_table(table)):
        assert "mart − TRADES" in text and "minus that of the method after the minus sign" in text
    (line,) = [row for row in rows_of(differences_csv(table)) if row["points"]]
    assert (line["method"], line["minus"], line["points"]) == ("mart", "trades", "1.5")
    assert "the paper's printed number" in markdown_table(table)
    unprinted = grid_table(replace(plan, paper={}), cells_of(tmp_path))
    assert not unprinted.has_printed and "printed" not in text_table(unprinted) + markdown_table(unprinted)


def test_unlike_cells_are_not_compared(tmp_path: Path) -> None:
    """Other images, attacks or numbers of images: no difference, and a note."""
    other = {**cell()["evaluation"], "data": "other"}
    table = grid_table(PLAN, cells_of(tmp_path, fixed("nrat", 100), fixed("trades", 90, evaluation=other)))
    reasons = {one.estimate for one in table.differences if one.measure == "aa" and one.checkpoint == "best"}
    assert reasons == {"not comparable: evaluated on other images or by other attacks"}
    assert any(note.startswith("These cells were evaluated with different test images") for note in table.notes)
    other = {**cell()["evaluation"], "keys": {"aa": {"batch_size": 7}}}
    table = grid_table(PLAN, cells_of(tmp_path / "keys", fixed("nrat", 100), fixed("trades", 90, evaluation=other)))
    assert {one.estimate for one in table.differences} == {NOT_RUN, *reasons}
    shorter = fixed("trades", 90, results={"best": {"aa": record(np.arange(100) < 50)}})
    table = grid_table(PLAN, cells_of(tmp_path, shorter))
    assert {one.estimate for one in table.differences if one.measure == "aa"} >= {
        "not comparable: evaluated on different numbers of images"
    }
    table = grid_table(PLAN, cells_of(tmp_path / "seeds", fixed("nrat", 100, 0), fixed("trades", 90, 1)))
    assert {one.estimate for one in table.differences if one.measure == "aa"} >= {"no common seed"}


@pytest.mark.parametrize(
    ("changes", "stamp"),
    [
        ({"space": "released_code"}, RELEASED_CODE_WARNING),
        ({"curve": [{"epoch": 1, "natural": 0.5, "pgd10": 0.3, "n": 200, "split": "test"}]}, CURVES_WARNING),
    ],
)
def test_stamps_are_everywhere(tmp_path: Path, changes: dict[str, Any], stamp: str) -> None:
    """Text, Markdown, page and figures carry the stamp; the CSV has the space of each number."""
    cells = cells_of(tmp_path, *(cell(method, **changes) for method in ("nrat", "trades")))
    plan = replace(PLAN, space=cells[0].space, split=cells[0].split)
    written = write_outputs(plan, cells, tmp_path / "out", PageFacts("Table 1", "python"))
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in written.files if path.suffix in (".txt", ".md", ".html")
    }
    assert len(texts) == 3
    for text in texts.values():
        assert stamp.replace("_", "\\_") in text or stamp in text or stamp.replace("'", "&#39;") in text
    assert {row["space"] for row in rows_of((tmp_path / "out/table1.csv").read_text())} == {plan.space}
    plain = grid_table(PLAN, cells)
    assert all(not row.cells for row in plain.rows), "the usual table does not show them"


def test_one_row_has_its_n_and_interval_in_every_format(tmp_path: Path) -> None:
    """n of each number in Markdown and CSV; in the terminal it is in the head if all share it, else at each number."""
    cells = cells_of(tmp_path, fixed("nrat", 100, 0), fixed("nrat", 110, 1))
    table = grid_table(PLAN, cells)
    assert "| NRAT | symmetric 0.4 | best | 2 |" in markdown_table(table)
    assert "52.5 ± 3.5 [45.6, 59.3], n = 200 (paper 49.00)" in markdown_table(table)
    assert "AutoAttack (n = 200)" in text_table(table) and "52.5 ± 3.5 [45.6, 59.3] (paper 49.00)" in text_table(table)
    (line,) = [row for row in rows_of(csv_table(table)) if row["mean"]]
    assert (line["seeds"], line["n"], line["mean"], line["sd"], line["paper"]) == ("2", "200", "52.5", "3.5355", "49.0")
    assert [row["accuracy"] for row in rows_of(seeds_csv(table))] == ["50.0", "55.0"]
    other = fixed("trades", 90, results={"best": {"aa": record(np.arange(100) < 50)}})
    assert "50.0 [40.4, 59.6], n = 100" in text_table(grid_table(PLAN, cells_of(tmp_path, other)))


def test_flags_are_notes(tmp_path: Path) -> None:
    """A reason to doubt a number stands below the table."""
    table = grid_table(PLAN, cells_of(tmp_path, cell(flags={"best": ["AutoAttack is above PGD-20."], "last": []})))
    assert "NRAT, symmetric 0.4, seed 0, best: AutoAttack is above PGD-20." in text_table(table)


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    """A method's name cannot end a Markdown cell, begin a formula of a spreadsheet or control the terminal."""
    hostile = Setting("=1|<b>\x1b", "symmetric", 0.4)
    plan = Plan("table1", "fashion", (hostile,))
    content = {**cell(), "method": hostile.method}
    path = write_cell(tmp_path, cell())
    path.write_text(json.dumps(content))
    table = grid_table(plan, read_cells(tmp_path))
    assert table.rows[0].cells
    assert "=1\\|&lt;b>?" in markdown_table(table)
    assert "\x1b" not in text_table(table) + csv_table(table)
    assert rows_of(csv_table(table))[0]["method"].startswith("'=1")


def test_rows_are_in_the_order_of_the_grid() -> None:
    """Clean labels first, then kinds of noise by rate, and methods as the stages have them."""
    stages = [
        Setting(m, *n)
        for n in (("symmetric", 0.4), ("none", 0.0), ("asymmetric", 0.2), ("symmetric", 0.2))
        for m in ("trades", "nrat")
    ]
    table = grid_table(Plan("table1", "fashion", tuple(stages), {stages[0]: 5}), [])
    assert [row.setting.folder for row in table.rows[::2]] == [
        *("trades/none-0", "nrat/none-0", "trades/symmetric-0.2", "nrat/symmetric-0.2"),
        *("trades/symmetric-0.4", "nrat/symmetric-0.4", "trades/asymmetric-0.2", "nrat/asymmetric-0.2"),
    ]


@pytest.mark.parametrize(
    ("edition", "percent"), [("mnist", 98.61), ("paper-fashion_mnist", 71.68), ("fashion", 71.68), ("paper", None)]
)
def test_table_4_is_of_its_own_data(edition: str, percent: float | None) -> None:
    """MNIST's numbers are not printed beside Fashion-MNIST's."""
    plan = Plan("table4", edition, (NRAT,), paper={"table4_mnist": {}, "table4_fashion_mnist": {}})
    row = grid_table(plan, []).rows[0]
    assert row.printed["aa"] == percent
    assert any("other data or models" in note for note in grid_table(plan, []).notes) == (
        edition in ("mnist", "fashion")
    )
