"""The HTML page of a grid: sortable tables, figures, protocol; loads nothing, its one script is inline and allowed by its hash."""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from nrat_scale.core.pages import as_data, environment
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.run import value_at
from nrat_scale.reproduce.costs import (
    COSTS_CAPTION,
    Reading,
    cost_per_image,
    effective_noise,
    mean_of,
    total_cost,
    wrong_labels_fitted,
)
from nrat_scale.reproduce.figures import Drawing
from nrat_scale.reproduce.measured import Measured, Summary, summarise
from nrat_scale.reproduce.paper import PAPER
from nrat_scale.reproduce.table import NOT_RUN, Difference, GridTable, Row, paper_label
from nrat_scale.reproduce.table_text import counted

_TEMPLATES = environment("nrat_scale.reproduce", autoescape=True)
_TEMPLATES.filters["data"] = lambda svg: as_data(svg.encode(), "svg+xml")


@dataclass(frozen=True)
class Value:
    """A cell of a sheet: what is read, what is sorted by, where it leads."""

    text: str
    key: float | str
    details: tuple[str, ...] = ()
    link: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a sheet: words, then numbers (None: not run)."""

    words: tuple[str, ...]
    numbers: tuple[Value | None, ...]
    id: str = ""


@dataclass(frozen=True)
class Sheet:
    """A sortable table."""

    caption: str
    head: tuple[str, ...]
    words: int  # columns of words, before those of numbers
    rows: list[Line]
    id: str = ""


@dataclass(frozen=True)
class PageFacts:
    """What a page says besides its numbers."""

    title: str
    command: str  # that makes it
    lead: str = ""
    protocol: dict[str, str] = field(default_factory=dict)  # beside what is read from the cells
    omissions: Sequence[str] = ()  # what the paper does not say
    grid_file: str = "recipes/grids/GRID.yaml"  # that names the methods
    methods_file: str = "recipes/grids/methods.yaml"


def render_page(table: GridTable, drawings: Sequence[Drawing], folder: Path, facts: PageFacts) -> str:
    """The HTML of a grid's page in `folder`, whose links to the cells' files are relative to it."""
    script = resources.files("nrat_scale.reproduce").joinpath("templates/sort.js").read_text("utf-8")
    cells = _used(table)
    overview, differences = _overview_sheet(table), _differences_sheet(table)
    return _TEMPLATES.get_template("page.html").render(
        title=facts.title,
        lead=facts.lead or f"{table.plan.title}." + (f" Printed numbers: {PAPER}." if table.has_printed else ""),
        stamps=table.stamps,
        protocol={**facts.protocol, **protocol(cells)},
        overview=overview if overview.rows else None,
        results=_results_sheet(table),
        not_run=table.not_run,
        differences=differences if differences.rows else None,
        seeds=_seeds_sheet(table, folder),
        figures=[
            {"svg": one.svg, "caption": one.caption, "files": f"{table.plan.name}-{one.name}"} for one in drawings
        ],
        command=facts.command,
        add_command=f"{facts.command.split(' --only ')[0]} --only my_method",
        grid_file=facts.grid_file,
        methods_file=facts.methods_file,
        sources=table.sources,
        notes=[note for note in table.notes if note not in table.stamps],
        omissions=list(facts.omissions),
        script=Markup(script),
        script_hash=Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
    )


# `data.validation.labels` of a cell's recipe -> how its best checkpoint was selected.
_SELECTION = {
    "clean": "highest robust accuracy on held-out training images by their clean labels",
    "given": "highest robust accuracy on held-out training images by their given labels, with the noise of training",
}


def relative_link(path: Path, folder: Path) -> str:
    """The address of a file in a page that lies in `folder`; spaces and other signs of its path are escaped."""
    return quote(os.path.relpath(path, folder).replace(os.sep, "/"))


_MOST_VARIANTS = 4  # of a fact; with more of them it belongs to the methods


def _settings(cell: Measured, *keys: str) -> str | None:
    """`num_steps 5, step 0.025`: some keys of a cell's recipe; a key that ends in a dot stands for all below it."""
    found = {
        name: value
        for key in keys
        for name, value in value_at(cell.facts, "recipe", {}).items()
        if name == key or (key.endswith(".") and name.startswith(key))
    }
    if len(keys) == 1:
        return str(*found.values()) or None
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in found.items()) or None


def _used(table: GridTable) -> list[Measured]:
    return list({cell.path: cell for row in table.rows for cell in row.cells}.values())


def protocol(cells: Sequence[Measured]) -> dict[str, str]:
    """What is the same in all cells, or each variant of it."""
    variants: dict[str, Callable[[Measured], Any]] = {
        "threat": lambda cell: value_at(cell.facts, "evaluation.threat"),
        "attacks": lambda cell: ", ".join(map(attack_title, value_at(cell.facts, "evaluation.attacks", []))),
        "test images": lambda cell: value_at(cell.facts, "evaluation.images"),
        "model": lambda cell: _settings(cell, "model.name", "model.kwargs."),
        "training attack": lambda cell: _settings(cell, "threat.num_steps", "threat.step", "threat.init"),
        "optimizer": lambda cell: _settings(cell, "optim.name", "optim.lr", "optim.schedule"),
        "batch": lambda cell: _settings(cell, "data.batch_size", "data.epoch_samples"),
        "epochs": lambda cell: _settings(cell, "train.epochs"),
        "steps": lambda cell: value_at(cell.facts, "cost.steps"),
        "best": lambda cell: _SELECTION.get(
            str(value_at(cell.facts, "recipe", {}).get("data.validation.labels", "given"))
        ),
        "hardware": lambda cell: value_at(cell.facts, "cost.hardware"),
        "versions": lambda cell: ", ".join(
            f"{name} {text}" for name, text in value_at(cell.facts, "versions", {}).items()
        ),
        "run on": lambda cell: cell.facts.get("date"),
    }
    found = {
        name: sorted({str(text) for cell in cells if (text := read(cell)) is not None})
        for name, read in variants.items()
    }
    facts = {name: "; ".join(texts) for name, texts in found.items() if texts and len(texts) <= _MOST_VARIANTS}
    hours = [
        sum(cell.number(f"cost.{key}") or 0 for cell in cells) / 3600 for key in ("train_seconds", "evaluate_seconds")
    ]
    if cells:
        facts["cost"] = f"{len(cells)} cells: {hours[0]:.1f} h of training, {hours[1]:.1f} h of evaluation"
    return facts


# ---- results --------------------------------------------------------------------------------------------------------


def _anchor(row: Row | Difference) -> str:
    return f"{row.setting.folder}-{row.checkpoint}".replace("/", "-")


def _results_sheet(table: GridTable) -> Sheet:
    titles = tuple(map(attack_title, table.plan.measures))
    head = ("method", "noise", "checkpoint", *titles, *(title for title, _ in _COST_COLUMNS))
    lines = []
    for row in table.shown:
        numbers = [_value(row, measure) for measure in table.plan.measures]
        numbers += [read(row) if row.cells else None for _, read in _COST_COLUMNS]
        lines.append(Line((row.method, row.setting.noise_text, row.checkpoint), tuple(numbers)))
    caption = f"{table.caption} {COSTS_CAPTION} Numbers lead to those of each seed, and these to the results of their runs. Click a title to sort."
    return Sheet(caption, head, 3, lines, "results")


def _overview_sheet(table: GridTable) -> Sheet:
    found = table.overview()
    noises = table.noises(found)
    lines = []
    for method, rows in found.items():
        numbers = [_glance(rows[noise], table.strongest) if noise in rows else None for noise in noises]
        lines.append(Line((table.plan.method_title(method),), tuple(numbers)))
    return Sheet(f"{table.overview_caption} Click a title to sort.", ("method", *noises), 1, lines, "overview")


def _glance(row: Row, measure: str) -> Value | None:
    value, found = _value(row, measure), row.numbers[measure]
    flagged = (f"{row.flagged} flagged",) if row.flagged else ()
    return value and replace(value, details=(*(_interval(found) if found else ()), *flagged))


def _value(row: Row, measure: str) -> Value | None:
    found, paper = row.numbers[measure], row.printed[measure]
    printed = () if paper is None else (f"{paper_label(measure)} {paper:.2f}",)
    if found is None:
        return Value(row.missing, "", printed)
    return Value(found.text, round(found.mean, 4), (*_interval(found), *printed), f"#{_anchor(row)}-{found.seeds[0]}")


def _interval(found: Summary) -> tuple[str, str]:
    return found.interval, f"n = {found.n}, {counted(len(found.seeds), 'seed')}"


def _mean(cells: Sequence[Measured], read: Reading, form: str) -> Value | None:
    mean = mean_of(cells, read)
    if mean is None:
        return None
    return Value(form.format(mean), round(mean, 6), (counted(sum(read(cell) is not None for cell in cells), "seed"),))


def _memorised(row: Row) -> Value | None:
    """The wrong labels that are fitted; a dash if a finished training had none."""
    found = _mean(row.cells, wrong_labels_fitted, "{:.1f}")
    return Value("-", "", ("no wrong labels",)) if found is None and row.cells else found


def _cost(row: Row) -> Value | None:
    """The cost in all, with that of an image in a step."""
    each = _mean(row.cells, cost_per_image, "{:.3g} per image")
    total = _mean(row.cells, total_cost, "{:.4g}")
    return total and replace(total, details=(each.text,) if each else ())


_COST_COLUMNS: tuple[tuple[str, Callable[[Row], Value | None]], ...] = (
    ("wrong labels fitted, %", _memorised),
    ("effective noise, %", lambda row: _mean(row.cells, effective_noise, "{:.1f}")),
    ("cost, millions", _cost),
)


def _differences_sheet(table: GridTable) -> Sheet:
    rows: dict[tuple[str, str, str], list[Difference]] = {}
    for one in table.differences:
        rows.setdefault((one.method, one.setting.noise_text, one.checkpoint), []).append(one)
    lines = [
        Line(key, tuple(map(_difference_value, found)))
        for key, found in rows.items()
        if any(one.estimate != NOT_RUN for one in found)
    ]
    head = ("method", "noise", "checkpoint", *map(attack_title, table.plan.measures))
    return Sheet(table.plan.differences_caption, head, 3, lines, "differences")


def _difference_value(one: Difference) -> Value | None:
    found = one.estimate
    if isinstance(found, str):
        return None if found == NOT_RUN else Value("-", "", (found,))
    text, _, interval = one.text.partition(" ")
    details = [interval, f"n = {found.n}, {counted(len(found.seeds), 'seed')}"]
    details += [f"over {found.covers}"] if len(found.seeds) == 1 else []
    return Value(text, round(found.points, 4), tuple(details), f"#{_anchor(one)}-{found.seeds[0]}")


def _seeds_sheet(table: GridTable, folder: Path) -> Sheet:
    lines = []
    for row in table.rows:
        for cell in row.cells:
            link = relative_link(cell.path, folder)
            numbers: list[Value | None] = []
            for measure in table.plan.measures:
                found = summarise([cell], row.checkpoint, measure)
                numbers.append(
                    Value(found.text, round(found.mean, 4), (found.interval, f"n = {found.n}"), link) if found else None
                )
            words = (row.method, row.setting.noise_text, row.checkpoint)
            lines.append(Line(words, (Value(str(cell.seed), cell.seed), *numbers), f"{_anchor(row)}-{cell.seed}"))
    head = ("method", "noise", "checkpoint", "seed", *map(attack_title, table.plan.measures))
    return Sheet(
        "Test accuracy in % of each seed with its 95 % Wilson interval; numbers lead to the results of the run.",
        head,
        3,
        lines,
    )
