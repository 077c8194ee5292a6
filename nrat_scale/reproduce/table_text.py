"""The table of a grid as terminal text, Markdown and CSV."""

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from nrat_scale.core.errors import printable
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.tables import spreadsheet_cell
from nrat_scale.reproduce.costs import COSTS, COSTS_CAPTION, mean_of
from nrat_scale.reproduce.measured import CHECKPOINTS, summarise
from nrat_scale.reproduce.table import NOT_RUN, Difference, GridTable, Row, paper_label

_Lines = tuple[str, list[str], list[list[str]]]  # caption, head, rows


def _parts(table: GridTable, *, with_n: bool = True) -> list[_Lines]:
    """The tables of accuracies at a glance, of accuracies, of differences and of costs, if any was measured.

    Without the n of each number, the head has it.
    """
    counts = {found.n for row in table.rows for found in row.numbers.values() if found}
    with_n = with_n or len(counts) != 1
    titles = [attack_title(measure) + ("" if with_n else f" (n = {min(counts)})") for measure in table.plan.measures]
    head = ["method", "noise", "checkpoint"]
    rows = [
        [row.method, row.setting.noise_text, row.checkpoint, str(len(row.cells) or "-")]
        + [number_text(row, measure, with_n=with_n) for measure in table.plan.measures]
        for row in table.shown
    ]
    texts: dict[tuple[str, str, str], list[str]] = {}
    for one in table.differences:
        key = (one.method, one.setting.noise_text, one.checkpoint)
        texts.setdefault(key, []).append(difference_text(one, with_n=with_n))
    differences = [[*key, *cells] for key, cells in texts.items() if any(text != NOT_RUN for text in cells)]
    caption = table.plan.differences_caption
    parts: list[_Lines] = [*_overview(table), (table.caption, [*head, "seeds", *titles], rows)]
    parts += [(caption, [*head, *titles], differences)] if differences else []
    return [*parts, *_costs(table)]


def _costs(table: GridTable) -> list[_Lines]:
    rows = [
        [
            row.method,
            row.setting.noise_text,
            str(len(row.cells)),
            *(_short(mean_of(row.cells, read)) for read in COSTS.values()),
        ]
        for row in table.shown
        if row.cells and row.checkpoint == CHECKPOINTS[0]
    ]
    return [(f"{COSTS_CAPTION} Means over seeds.", ["method", "noise", "seeds", *COSTS], rows)] if rows else []


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _overview(table: GridTable) -> list[_Lines]:
    found = table.overview()
    noises = table.noises(found)
    rows = [
        [table.plan.method_title(method), *(overview_text(rows.get(noise), table.strongest) for noise in noises)]
        for method, rows in found.items()
    ]
    return [(f"At a glance. {table.overview_caption}", ["method", *noises], rows)] if rows else []


def overview_text(row: Row | None, measure: str) -> str:
    """`57.8 ± 0.8 [54.7, 60.8], n = 1000, 3 seeds`, and `1 flagged` if the evaluation warns of one of them."""
    found = None if row is None else row.numbers[measure]
    if row is None or found is None:
        return NOT_RUN if row is None else row.missing
    flagged = [f"{row.flagged} flagged"] if row.flagged else []
    return ", ".join([f"{found.text} {found.interval}", f"n = {found.n}", counted(len(found.seeds), "seed"), *flagged])


def number_text(row: Row, measure: str, *, with_n: bool = True) -> str:
    """`61.8 ± 0.4 [58.7, 64.8], n = 1000 (paper 47.02)`."""
    found, paper = row.numbers[measure], row.printed[measure]
    ours = row.missing if found is None else f"{found.text} {found.interval}" + (f", n = {found.n}" if with_n else "")
    return ours if paper is None else f"{ours} ({paper_label(measure)} {paper:.2f})"


def difference_text(difference: Difference, *, with_n: bool = True) -> str:
    """`+1.3* [+0.2, +2.8], n = 1000, 3 seeds`."""
    found = difference.estimate
    if isinstance(found, str):
        return found
    return ", ".join([difference.text, *([f"n = {found.n}"] if with_n else []), counted(len(found.seeds), "seed")])


def counted(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def text_table(table: GridTable) -> str:
    """The tables for a terminal, with aligned columns."""
    lines = [f"{table.plan.name}, edition {table.plan.edition}. {table.plan.title}".rstrip(". ")]
    lines += [f"NOTE: {stamp}" for stamp in table.stamps]
    for caption, head, rows in _parts(table, with_n=False):
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines += ["", *textwrap.wrap(caption, 120)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
    lines += ["", *textwrap.wrap(table.not_run, 120)]
    lines += [f"NOTE: {note}" for note in table.notes if note not in table.stamps]
    return "\n".join(map(printable, lines)).rstrip() + "\n"


def markdown_table(table: GridTable) -> str:
    """The tables in Markdown, under one heading."""
    title = f"{table.plan.name}, edition {table.plan.edition}"
    lines = [f"## {title}", "", *([f"{table.plan.title}.", ""] if table.plan.title else [])]
    lines += [line for stamp in table.stamps for line in (f"> **{stamp}**", "")]
    for caption, head, rows in _parts(table):
        lines += [caption, "", *markdown_lines(head, rows), ""]
    lines += [markdown_text(table.not_run), ""] if table.not_run else []
    lines += [f"* {markdown_text(note)}" for note in table.notes if note not in table.stamps]
    lines += ["", f"Methods: {markdown_text('; '.join(table.sources))}."] if table.sources else []
    return "\n".join(lines).rstrip() + "\n"


def markdown_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table as lines; text in cells is escaped."""
    return [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in (head,)] + [
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in rows),
    ]


def markdown_text(text: str) -> str:
    """Text that cannot end a cell, begin a tag or emphasise."""
    safe = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return safe.replace("*", "\\*").replace("_", "\\_")


def csv_table(table: GridTable) -> str:
    """A line per row and attack, run or not: mean and standard deviation over seeds, interval, n, the paper's number, costs."""
    head = (
        "edition",
        "space",
        "method",
        "noise",
        "rate",
        "checkpoint",
        "attack",
        "status",
        "seeds",
        "n",
        "mean",
        "sd",
        "low",
        "high",
        "paper",
        "wrong_labels_fitted",
        "effective_noise",
        "cost_millions",
    )
    lines = []
    for row in table.rows:
        costs = [_rounded(mean_of(row.cells, read)) for read in COSTS.values()]
        for measure in table.plan.measures:
            found, paper = row.numbers[measure], row.printed[measure]
            spaces = sorted({cell.space for cell in row.cells}) or [table.plan.space]
            setting = (row.setting.method, row.setting.noise, row.setting.rate)
            ours: tuple[object, ...] = (row.missing, 0, "", "", "", "", "")
            if found is not None:
                numbers = (found.mean, found.deviation, found.low, found.high)
                ours = ("finished", len(found.seeds), found.n, *map(_rounded, numbers))
            where = (table.plan.edition, " ".join(spaces), *setting, row.checkpoint, measure)
            lines.append((*where, *ours, _rounded(paper), *costs))
    return _csv(head, lines)


def seeds_csv(table: GridTable) -> str:
    """A line per cell, checkpoint and attack: accuracy, Wilson interval and n of one seed, and the file of the cell."""
    head = (
        "edition",
        "space",
        "method",
        "noise",
        "rate",
        "seed",
        "checkpoint",
        "attack",
        "n",
        "accuracy",
        "low",
        "high",
        "file",
    )
    lines = []
    for row in table.rows:
        for cell in row.cells:
            for measure in table.plan.measures:
                found = summarise([cell], row.checkpoint, measure)
                if found is not None:
                    setting = (
                        row.setting.method,
                        row.setting.noise,
                        row.setting.rate,
                        cell.seed,
                        row.checkpoint,
                        measure,
                    )
                    numbers = map(_rounded, (found.mean, found.low, found.high))
                    lines.append((cell.edition, cell.space, *setting, found.n, *numbers, shown_path(cell.path)))
    return _csv(head, lines)


def differences_csv(table: GridTable) -> str:
    """A line per paired difference with the reference."""
    head = (
        "edition",
        "method",
        "minus",
        "noise",
        "rate",
        "checkpoint",
        "attack",
        "points",
        "low",
        "high",
        "n",
        "seeds",
        "sd",
        "covers",
    )
    lines = []
    for one in table.differences:
        names = (table.plan.edition, one.setting.method, one.reference, one.setting.noise, one.setting.rate)
        found = one.estimate
        if isinstance(found, str):
            ours: tuple[object, ...] = ("", "", "", "", 0, "", found)
        else:
            points = map(_rounded, (found.points, found.low, found.high))
            ours = (*points, found.n, len(found.seeds), _rounded(found.deviation), found.covers)
        lines.append((*names, one.checkpoint, one.measure, *ours))
    return _csv(head, lines)


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)


def _csv(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([head, *([spreadsheet_cell(value) for value in line] for line in lines)])
    return buffer.getvalue()


def shown_path(path: Path) -> str:
    """A path as it is printed: relative to the working directory if it lies below it."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(path)
