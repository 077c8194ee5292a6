"""Figures of an audit: the calibration curve, and the share of wrong labels by class."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nrat_scale.report.curves import safe_label

MOST_BARS = 40
_BLUE, _ORANGE, _SOFT = "#0072b2", "#d55e00", "#59626d"


def draw_reliability(calibration: dict[str, Any]) -> bytes:
    """Confidence against agreement with the given labels, and against accuracy on the hold-out, in %, as a PNG.

    The area of a marker grows with the share of the images in its bin.
    """
    figure = Figure(figsize=(5.0, 3.9), dpi=220, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=_SOFT, lw=1, ls=":")
    curves = (
        ("bins", "agreement", "given labels predicted", _BLUE, "o"),
        ("holdout_bins", "accuracy", "hold-out predicted right", _ORANGE, "s"),
    )
    for key, name, label, colour, marker in curves:
        if bins := calibration[key]:
            x, y, n = (np.array([row[column] for row in bins], float) for column in ("confidence", name, "n"))
            axes.plot(100 * x, 100 * y, color=colour, lw=1.5, marker=marker, ms=3, label=label)
            axes.scatter(100 * x, 100 * y, s=12 + 400 * n / n.sum(), color=colour, alpha=0.25, lw=0)
    axes.set(xlabel="mean confidence of the bin, %", ylabel="share of its images, %", xlim=(0, 103), ylim=(0, 103))
    axes.grid(color="#e3e6ea", lw=0.7)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return _png(figure, axes)


def draw_class_rates(
    rates: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]] | None, names: Sequence[str]
) -> bytes:
    """A bar with its interval for each given label, in %, as a PNG; of more than `MOST_BARS` classes the highest.

    Args:
        rates: `per_class` of the best estimate.
        plain: that of confident learning, drawn as marks; None if it is the best.
        names: of the classes.
    """
    order = sorted(range(len(rates)), key=lambda row: -rates[row]["rate"])[:MOST_BARS]
    order = sorted(order) if len(rates) <= MOST_BARS else order
    figure = Figure(figsize=(5.0, max(1.9, 0.9 + 0.27 * len(order))), dpi=220, layout="constrained")
    axes = figure.subplots()
    middle, low, high = (
        np.array([100 * value for value in column])
        for column in zip(*((rates[row]["rate"], *rates[row]["interval"]) for row in order), strict=True)
    )
    errors = np.maximum([middle - low, high - middle], 0)
    places = np.arange(len(order))
    axes.barh(places, middle, height=0.62, color=_BLUE, alpha=0.75, label="corrected" if plain else "wrong labels")
    axes.errorbar(middle, places, xerr=errors, fmt="none", ecolor="#1d2126", elinewidth=1, capsize=2.5)
    if plain is not None:
        values = [100 * plain[row]["rate"] for row in order]
        axes.plot(values, places, "D", color=_ORANGE, ms=4, mfc="none", mew=1.3, label="with the classifier's errors")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    axes.set_yticks(places, [safe_label(names[rates[row]["class"]]) for row in order])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 1.05 * float((middle + errors[1]).max())))
    axes.set_xlabel("wrong labels, % of those given")
    axes.grid(axis="x", color="#e3e6ea", lw=0.7)
    return _png(figure, axes)


def _png(figure: Figure, axes: Axes) -> bytes:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # of a class name: drawn as a box
        figure.savefig(buffer, format="png", metadata={"Software": None})  # Matplotlib's version would change the bytes
    return buffer.getvalue()
