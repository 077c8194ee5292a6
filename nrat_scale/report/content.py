"""What a report contains: every table of it, in the order of the page."""

from collections.abc import Sequence
from dataclasses import replace

from nrat_scale.report.comparison import accuracy_table, difference_table, seed_table
from nrat_scale.report.details import (
    class_table,
    common_table,
    confusion_tables,
    curve_tables,
    gap_table,
    noise_table,
    timing_table,
)
from nrat_scale.report.facts import run_facts
from nrat_scale.report.run import Run
from nrat_scale.report.tables import Cell, Table, results_table


def all_tables(runs: Sequence[Run]) -> list[Table]:
    """Every table of the report of `runs`, for `csv_table` and `latex_table`; their names are unique."""
    if len(runs) == 1:
        return [*([results_table(runs)] if runs[0].rows else []), *run_tables(runs[0])]
    own = [replace(table, name=f"{table.name}_{i}") for i, run in enumerate(runs, start=1) for table in _named(run)]
    return [*comparison_tables(runs), *own]


def _named(run: Run) -> list[Table]:
    return [replace(table, caption=f"{run.name}. {table.caption}") for table in run_tables(run)]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """The tables that compare several runs."""
    evaluated = [run for run in runs if run.rows]
    tables: list[Table | None] = [_settings_table(runs)]
    if evaluated:
        tables.append(accuracy_table(evaluated))
    if len(evaluated) > 1:
        tables += [difference_table(evaluated), seed_table(evaluated)]
    return [table for table in tables if table is not None]


def _settings_table(runs: Sequence[Run]) -> Table | None:
    """The settings in which the runs differ."""
    facts = [run_facts(run) for run in runs]
    titles = dict.fromkeys(title for one in facts for title in one)
    rows: list[tuple[Cell, ...]] = []
    for title in titles:
        texts = [one.get(title) for one in facts]
        if len(set(texts)) > 1:
            rows.append((title, *texts))
    head = ("setting", *(run.name for run in runs))
    return Table("settings", "Settings in which the runs differ.", head, rows) if rows else None


def run_tables(run: Run) -> list[Table]:
    """The tables about one run, without its accuracies, which are in `results_table` or `accuracy_table`."""
    best = run.rows[0] if run.rows else None
    found: list[Table | None] = [common_table(run), gap_table(run), *curve_tables(run)]
    if best is not None:
        found += [class_table(run, best), *confusion_tables(run, best)]
    found += [noise_table(run, source) for source in run.noise]
    return [table for table in (*found, timing_table(run)) if table is not None]
