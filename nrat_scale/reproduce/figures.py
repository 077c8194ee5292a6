"""Figures of a grid as SVG and PNG: learning curves as the paper draws them, overfitting gaps, AutoAttack against cost."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.curves import safe_label
from nrat_scale.report.run import number_at
from nrat_scale.reproduce.costs import mean_of, total_cost
from nrat_scale.reproduce.measured import Measured, Setting, strongest_attack, summarise
from nrat_scale.reproduce.table import estimate

# Okabe and Ito 2008: one colour per method; dashes distinguish noise rates.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SOFT, _GRID = "#59626d", "#e3e6ea"
Groups = Mapping[Setting, Sequence[Measured]]  # finished cells by setting, one per seed
Title = Callable[[str], str]  # id of a method -> its title


@dataclass(frozen=True)
class Drawing:
    """One figure, with a caption that says what is drawn."""

    name: str
    caption: str
    svg: str
    png: bytes


def drawing(name: str, caption: str, figure: Figure) -> Drawing:
    """Both formats; equal figures give equal bytes."""
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # arranged once, not again for each format
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", metadata={"Software": None})
    lines = svg.getvalue().splitlines()
    return Drawing(name, caption, "\n".join(line.rstrip() for line in lines) + "\n", png.getvalue())


_MOST_METHODS = 7  # in one figure of lines


def draw_all(groups: Groups, title: Title) -> list[Drawing]:
    """Every figure that the cells have data for; of many methods, several figures with some of them each."""
    methods, _ = _order(groups)
    parts = [methods[i : i + _MOST_METHODS] for i in range(0, len(methods), _MOST_METHODS)]
    found: list[Drawing | None] = []
    for draw, name in ((learning_curves, "curves"), (overfitting_gaps, "gaps"), (memorisation, "memorisation")):
        for number, part in enumerate(parts, start=1):
            some = {setting: cells for setting, cells in groups.items() if setting.method in part}
            found.append(draw(some, title, name if number == 1 else f"{name}-{number}"))
    return [one for one in (*found, frontier(groups, title)) if one is not None]


# ---- learning curves ------------------------------------------------------------------------------------------------


def learning_curves(groups: Groups, title: Title, name: str = "curves") -> Drawing | None:
    """Natural and robust accuracy by epoch: a row of panels per noise kind, a line per rate and method; None without curves."""
    curves = {setting: cells for setting, found in groups.items() if (cells := [cell for cell in found if cell.curve])}
    if not curves:
        return None
    kinds = _kinds(curves)
    methods, rates = _order(curves)
    figure = Figure(figsize=(9.6, 3.3 * len(kinds) + 0.7), dpi=160, layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharex=True, sharey="col")
    robust = next(key for key in _keys(curves) if key != "natural")
    for line, kind in zip(panels, kinds, strict=True):
        for axes, key in zip(line, ("natural", robust), strict=True):
            for setting, cells in curves.items():
                if _kind_of(setting, kinds, kind):
                    style = {"color": _COLOURS[methods.index(setting.method) % len(_COLOURS)]}
                    _draw_curve(axes, cells, key, {**style, "ls": _DASHES[rates.index(setting.rate) % len(_DASHES)]})
            axes.set_title(
                f"{kind} noise, {'natural' if key == 'natural' else f'robust ({_attack(key)})'}",
                fontsize=10,
                loc="left",
            )
            _clean(axes)
            axes.set(ylabel="accuracy, %")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in panels[-1]:
        axes.set(xlabel="epoch")
    handles = _coloured_lines(methods, title)
    handles += [
        Line2D([], [], color=_SOFT, ls=_DASHES[i % len(_DASHES)], label=f"rate {rate:g}")
        for i, rate in enumerate(rates)
    ]
    handles += [
        Line2D([], [], color=_SOFT, marker=sign, ls="", label=text) for sign, text in (("*", "best"), ("s", "last"))
    ]
    _legend(figure, handles)
    splits = sorted(
        {str(row.get("split", "held-out")) for cells in curves.values() for cell in cells for row in cell.curve}
    )
    counts = sorted(
        {n for cells in curves.values() for cell in cells for row in cell.curve if (n := number_at(row, "n"))}
    )
    seeds = _seeds_text(curves)
    caption = (
        f"Accuracy in % by epoch on {' and '.join(splits)} images (n = {', '.join(f'{n:.0f}' for n in counts)}; {seeds}). Lines are means over "
        "seeds, bands their range; a star marks the selected (best) epoch of each seed, a square the last epoch."
    )
    if "test" in splits:
        figure.text(0.995, 0.005, "curves on the test images", ha="right", color="#b03a00", fontsize=8)
    _stamp_space(figure, curves)
    return drawing(name, caption, figure)


def _draw_curve(axes: Axes, cells: Sequence[Measured], key: str, style: dict[str, str]) -> None:
    """The mean over seeds, its range, the best epoch of each seed and the last epoch."""
    by_epoch: dict[float, list[float]] = {}
    for cell in cells:
        points = {
            e: v
            for row in cell.curve
            if (e := number_at(row, "epoch")) is not None and (v := number_at(row, key)) is not None
        }
        for epoch, value in points.items():
            by_epoch.setdefault(epoch, []).append(100 * value)
        best = cell.number("best_epoch")
        if best in points:
            axes.plot(best, 100 * points[best], "*", color=style["color"], ms=9, mec="white", mew=0.7, zorder=5)
    # A failed or shorter seed would bend the mean where it ends: only epochs that all seeds have.
    epochs = sorted(epoch for epoch, values in by_epoch.items() if len(values) == len(cells))
    if not epochs:
        return
    values = np.array([by_epoch[epoch] for epoch in epochs])
    axes.plot(epochs, values.mean(1), lw=1.5, **style)  # type: ignore[arg-type]
    axes.plot(epochs[-1], values[-1].mean(), "s", color=style["color"], ms=4.5, mec="white", mew=0.7, zorder=4)
    if len(cells) > 1:
        axes.fill_between(epochs, values.min(1), values.max(1), color=style["color"], alpha=0.12, lw=0)


def _attack(name: str) -> str:
    return safe_label(attack_title(name))


def _keys(curves: Groups) -> list[str]:
    """Accuracies in the rows of the curves; a run has `natural` and one robust accuracy such as `pgd10`."""
    rows = [row for cells in curves.values() for cell in cells for row in cell.curve]
    facts = ("epoch", "step", "n", "split", "labels", "selection", "natural")
    keys = dict.fromkeys(key for row in rows for key in row if key not in facts and number_at(row, key) is not None)
    return ["natural", *keys, "robust"]


def _kinds(groups: Groups) -> list[str]:
    """Kinds of noise, without `none` unless it is the only one."""
    kinds = list(dict.fromkeys(setting.noise for setting in groups if setting.noise != "none"))
    return kinds or ["none"]


def _kind_of(setting: Setting, kinds: Sequence[str], kind: str) -> bool:
    """Whether a setting belongs to the panel of a noise kind; clean labels are rate 0 of each."""
    return setting.noise in (kind, "none") and kind in kinds


def _order(groups: Groups) -> tuple[list[str], list[float]]:
    return list(dict.fromkeys(setting.method for setting in groups)), sorted({setting.rate for setting in groups})


def _clean(axes: Axes) -> None:
    axes.grid(axis="y", color=_GRID, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _seeds_text(groups: Groups) -> str:
    counts = sorted({len(cells) for cells in groups.values()})
    return (
        f"{counts[0]} seed{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    )


def _stamp_space(figure: Figure, groups: Groups) -> None:
    if any(cell.space != "pixel" for cells in groups.values() for cell in cells):
        figure.text(0.005, 0.005, "threat.space: released_code, a different threat model", color="#b03a00", fontsize=8)


# ---- overfitting ----------------------------------------------------------------------------------------------------


def overfitting_gaps(groups: Groups, title: Title, name: str = "gaps") -> Drawing | None:
    """Best minus last on the test images, natural and robust, against the noise rate; None without two checkpoints."""
    measures = [
        next((m for m in names if any(("best", m) in cell.outcomes for cells in groups.values() for cell in cells)), "")
        for names in (("natural",), ("pgd20", "aa", "cw20"))
    ]
    kinds = _kinds(groups)
    methods, rates = _order(groups)
    found = {
        (setting, measure): estimate([(1.0, cells, "best", measure), (-1.0, cells, "last", measure)])
        for setting, cells in groups.items()
        for measure in measures
    }
    if not any(not isinstance(value, str) for value in found.values()):
        return None
    figure = Figure(figsize=(9.6, 3.1 * len(kinds) + 0.6), dpi=160, layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharey=True)
    for line, kind in zip(panels, kinds, strict=True):
        for axes, measure in zip(line, measures, strict=True):
            for (setting, one), value in found.items():
                if one == measure and not isinstance(value, str) and _kind_of(setting, kinds, kind):
                    i = methods.index(setting.method)
                    at = rates.index(setting.rate) + (i - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 2)
                    errors = [[value.points - value.low], [value.high - value.points]]
                    style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
                    axes.errorbar(at, value.points, errors, ms=5, capsize=2, lw=1.2, **style)
            axes.axhline(0, color=_SOFT, lw=0.8)
            axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            axes.set_title(f"{kind} noise, {_attack(measure)}", fontsize=10, loc="left")
            axes.set(ylabel="best − last, points", xlabel="noise rate")
            _clean(axes)
    _method_legend(figure, methods, title)
    _stamp_space(figure, groups)
    caption = (
        "Double overfitting: accuracy of the best minus the last checkpoint in points, natural (left) and robust (right), on the same "
        f"test images, with 95 % intervals ({_seeds_text(groups)}). Above zero, training longer cost accuracy."
    )
    return drawing(name, caption, figure)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend above the panels, in as many columns as fit; a column is as wide as its longest label."""
    lengths = [len(str(handle.get_label())) for handle in handles]
    columns = next((n for n in range(6, 1, -1) if _legend_width(lengths, n) < figure.get_figwidth()), 1)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _legend_width(lengths: Sequence[int], columns: int) -> float:
    """Inches of a legend whose labels have so many characters of 9 points; it is filled column by column."""
    each = math.ceil(len(lengths) / columns)
    return sum(0.7 + 0.065 * max(lengths[start : start + each]) for start in range(0, len(lengths), each))


def _coloured_lines(methods: Sequence[str], title: Title) -> list[Line2D]:
    return [
        Line2D([], [], color=_COLOURS[i % len(_COLOURS)], label=safe_label(title(one))) for i, one in enumerate(methods)
    ]


def _method_legend(figure: Figure, methods: Sequence[str], title: Title) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            ls="",
            label=safe_label(title(one)),
        )
        for i, one in enumerate(methods)
    ]
    _legend(figure, handles)


# ---- memorisation and cost ------------------------------------------------------------------------------------------


def memorisation(groups: Groups, title: Title, name: str = "memorisation") -> Drawing | None:
    """Share of wrong training labels that the model fits, by epoch, a panel per kind and rate; None if nothing was logged."""
    logged = {
        setting: points
        for setting, cells in groups.items()
        if setting.noise != "none" and (points := [_fitted(cell) for cell in cells if _fitted(cell)])
    }
    if not logged:
        return None
    panels_of = list(dict.fromkeys((setting.noise, setting.rate) for setting in logged))
    methods = list(dict.fromkeys(setting.method for setting in logged))
    columns = min(len(panels_of), 2)
    lines = -(-len(panels_of) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.0 * lines + 0.6), dpi=160, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes, (noise, rate) in zip(panels, panels_of, strict=False):
        for setting, seeds in logged.items():
            if (setting.noise, setting.rate) == (noise, rate):
                i = methods.index(setting.method)
                for curve in seeds:
                    axes.plot(*zip(*curve, strict=True), color=_COLOURS[i % len(_COLOURS)], lw=1.2)
        axes.set_title(f"{noise} {rate:g}", fontsize=10, loc="left")
        axes.set(xlabel="epoch", ylabel="wrong labels fitted, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _clean(axes)
    for axes in panels[len(panels_of) :]:
        axes.set_visible(False)
    _legend(figure, _coloured_lines(methods, title))
    caption = "Memorisation: wrong training labels that the model predicts, in % by epoch; a line per seed."
    return drawing(name, caption, figure)


def _fitted(cell: Measured) -> list[tuple[float, float]]:
    rows = cell.facts.get("memorisation") or []
    points = [(number_at(row, "epoch"), number_at(row, "noisy_fitted")) for row in rows]
    return [(epoch, 100 * value) for epoch, value in points if epoch is not None and value is not None]


def frontier(groups: Groups, title: Title, name: str = "frontier") -> Drawing | None:
    """AutoAttack of the best checkpoint against the cost of training, a panel per noise; None without both."""
    measure = strongest_attack(cell for cells in groups.values() for cell in cells)
    points = {
        setting: (cost, found)
        for setting, cells in groups.items()
        if (found := summarise(cells, "best", measure)) and (cost := mean_of(cells, total_cost))
    }
    if not points:
        return None
    noises = list(dict.fromkeys((setting.noise, setting.rate) for setting in points))
    methods, _ = _order(dict.fromkeys(points, ()))
    columns = min(len(noises), 2)
    lines = -(-len(noises) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.4 * lines + 0.6), dpi=160, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True).ravel()
    for axes, noise in zip(panels, noises, strict=False):
        here = {setting: point for setting, point in points.items() if (setting.noise, setting.rate) == noise}
        for setting, (cost, found) in here.items():
            i = methods.index(setting.method)
            errors = [[found.mean - found.low], [found.high - found.mean]]
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i // len(_COLOURS) % len(_MARKERS)]}
            axes.errorbar(cost, found.mean, errors, ms=6, capsize=2, lw=1, **style)
        edge = pareto([(cost, found.mean) for cost, found in here.values()])
        for (cost, value), (next_cost, next_value) in pairwise(edge):
            axes.plot(
                [cost, next_cost, next_cost],
                [value, value, next_value],
                color=_SOFT,
                lw=0.8,
                ls=":",
            )
        setting = next(iter(here))
        axes.set_title(setting.noise_text, fontsize=10, loc="left")
        axes.set(xlabel="forward-equivalents of training, millions of images", ylabel=f"{_attack(measure)}, %")
        _clean(axes)
    for axes in panels[len(noises) :]:
        axes.set_visible(False)
    handles = [
        Line2D(
            [],
            [],
            ls="",
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i // len(_COLOURS) % len(_MARKERS)],
            label=safe_label(title(m)),
        )
        for i, m in enumerate(methods)
    ]
    _legend(figure, handles)
    _stamp_space(figure, groups)
    caption = (
        f"{attack_title(measure)} accuracy of the best checkpoint (mean over seeds, 95 % Wilson interval) against the cost of training: forward "
        "passes, in millions of images; a backward pass to the images or to the weights counts as one each. The dotted line is the frontier."
    )
    return drawing(name, caption, figure)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) pairs that no cheaper pair reaches, by rising cost."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or value > kept[-1][1]:
            kept.append((cost, value))
    return kept
