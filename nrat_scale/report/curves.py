"""Figures of a report: learning curves of one run and of several, memorisation, accuracy against eps and steps."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nrat_scale.evaluate.curves import radius_text
from nrat_scale.report.run import Run, Score, number_at, read_score

# Key in a validation row, label, colour, line style. Rows have no clean accuracies if the clean labels are unknown.
CLEAN = "clean labels"  # in the labels of curves; `Run.clean_term` replaces it
CURVES = (
    ("natural", "natural", "#0072b2", "-"),
    ("robust", "robust", "#d55e00", "-"),
    ("natural_clean", f"natural, {CLEAN}", "#0072b2", "--"),
    ("robust_clean", f"robust, {CLEAN}", "#d55e00", "--"),
)
# Key in a training row, label, the same if the labels before injection were not known to be right, colour.
MEMORISATION = (
    ("clean_accuracy", "correct labels fitted", "unchanged labels fitted", "#0072b2"),
    ("noisy_memorised", "wrong labels memorised", "changed labels memorised", "#d55e00"),
    ("noisy_corrected", "wrong labels corrected", "labels before injection predicted", "#009e73"),
)
# Of several runs (Okabe and Ito 2008), then again with the next dashes.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MOST_MARKERS = 15  # points of one curve; more would overlap
_SOFT = "#59626d"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 3.2), dpi=250, layout="constrained")
    axes = figure.subplots()
    axes.margins(x=0.03)
    return figure, axes


def _png(figure: Figure, axes: Axes, xlabel: str, ylabel: str, *, columns: int = 2, epochs: bool = True) -> bytes:
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no validation yet", ha="center", transform=axes.transAxes)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 100), yticks=range(0, 101, 20))
    if epochs:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e3e6ea", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # of a run's name: drawn as a box
        figure.savefig(buffer, format="png", metadata={"Software": None})  # Matplotlib's version would change the bytes
    return buffer.getvalue()


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [(number_at(row, "epoch"), read_score(row.get(key))) for row in rows]
    return [(epoch, score.percent) for epoch, score in points if epoch is not None and score is not None]


def draw_curves(run: Run) -> bytes:
    """Validation accuracy in % by epoch as a PNG, with the best epoch marked."""
    figure, axes = _figure()
    # The name comes from a file, and Matplotlib would typeset a $ in it.
    attack = run.attack if re.fullmatch(r"[A-Z]+-[0-9]+", run.attack) else "attack"
    for key, label, colour, style in CURVES:
        if drawn := _points(run.validation, key):
            label = label.replace("robust", f"robust ({attack})").replace(CLEAN, run.clean_term)
            marker = "o" if len(drawn) <= _MOST_MARKERS else None
            axes.plot(*zip(*drawn, strict=True), color=colour, ls=style, marker=marker, ms=3.5, lw=1.7, label=label)
    best_epoch, best = number_at(run.best_row, "epoch"), read_score(run.best_row.get("robust"))
    if best_epoch is not None and best is not None:
        axes.axvline(best_epoch, color=_SOFT, lw=1, ls=":")
        axes.plot([best_epoch], [best.percent], "o", color="#d55e00", ms=6, mec="white", mew=1.2, zorder=5)
        side = "right" if best_epoch > sum(axes.get_xlim()) / 2 else "left"
        text = f"best: epoch {best_epoch:g}, robust {best.percent:.1f} %"
        axes.text(best_epoch, 101.5, text, ha=side, fontsize=8.5, color=_SOFT)
    return _png(figure, axes, "epoch", "validation accuracy, %")


def draw_joint_curves(runs: Sequence[Run], key: str) -> bytes:
    """One line per run of a validation accuracy (`natural` or `robust`) by epoch; a star marks the best epoch, a square the last."""
    figure, axes = _figure()
    for i, run in enumerate(runs):
        colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]
        if drawn := _points(run.validation, key):
            axes.plot(*zip(*drawn, strict=True), color=colour, ls=dashes, lw=1.6, label=safe_label(run.name))
            axes.plot(*drawn[-1], "s", color=colour, ms=5, mec="white", mew=0.8, zorder=4)
            if best := _points([run.best_row], key):
                axes.plot(*best[0], "*", color=colour, ms=12, mec="white", mew=0.9, zorder=5)
    return _png(figure, axes, "epoch", f"validation accuracy, {key}, %", columns=2 if len(runs) < 5 else 3)


def draw_memorisation(run: Run) -> bytes | None:
    """How much of the correct and of the wrong training labels the model gives, by epoch; None if nothing was logged."""
    figure, axes = _figure()
    blind = any(map(run.injected_blindly, run.noise))
    for key, known, unchecked, colour in MEMORISATION:
        label = unchecked if blind else known
        points = [(number_at(row, "epoch"), number_at(row, key)) for row in run.train]
        drawn = [(epoch, 100 * value) for epoch, value in points if epoch is not None and value is not None]
        if drawn and (
            key != "clean_accuracy" or any(number_at(row, "noisy_memorised") is not None for row in run.train)
        ):
            marker = "o" if len(drawn) <= _MOST_MARKERS else None
            axes.plot(*zip(*drawn, strict=True), color=colour, marker=marker, ms=3.5, lw=1.7, label=label)
    return _png(figure, axes, "epoch", "training labels, %", columns=1) if axes.lines else None


def draw_by_strength(curves: Mapping[str, Sequence[tuple[float, Score]]], axis: str) -> bytes:
    """Accuracy with its interval against eps (times 255 if they are grey levels) or attack steps, a line per checkpoint or run."""
    figure, axes = _figure()
    levels = axis == "eps" and any("/" in radius_text(value) for points in curves.values() for value, _ in points)
    for i, (name, points) in enumerate(curves.items()):
        at = [255 * value if levels else value for value, _ in points]
        middle = [score.percent for _, score in points]
        errors = [
            [max(0.0, score.percent - (score.percent if score.low is None else score.low)) for _, score in points],
            [max(0.0, (score.percent if score.high is None else score.high) - score.percent) for _, score in points],
        ]
        colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]
        line = {"marker": "o", "ms": 4, "lw": 1.6, "color": colour, "ls": dashes}
        drawn: dict[str, Any] = {**line, "capsize": 2.5, "label": safe_label(name)}
        axes.errorbar(at, middle, errors, **drawn)
    if axis == "steps":
        axes.set_xscale("symlog", linthresh=1)
        ticks = sorted({value for points in curves.values() for value, _ in points})
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    label = "steps of PGD" if axis == "steps" else "eps × 255" if levels else "eps"
    return _png(figure, axes, label, "test accuracy, %", epochs=False)


def safe_label(name: str) -> str:
    """A name for a legend: Matplotlib hides labels that begin with `_`, and typesets what is between two `$`."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name).replace("$", r"\$")
    return text if len(text) <= 34 else f"{text[:15]}…{text[-16:]}"
