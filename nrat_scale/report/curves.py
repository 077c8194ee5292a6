"""Learning curves as a figure."""

import io
import re

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nrat_scale.report.run import Run, number_at, read_score

# Key in a validation row, label, colour, line style. Rows have no clean accuracies if the clean labels are unknown.
CLEAN = "clean labels"  # in the labels of curves; `Run.clean_term` replaces it
CURVES = (
    ("natural", "natural", "#0072b2", "-"),
    ("robust", "robust", "#d55e00", "-"),
    ("natural_clean", f"natural, {CLEAN}", "#0072b2", "--"),
    ("robust_clean", f"robust, {CLEAN}", "#d55e00", "--"),
)
_MOST_MARKERS = 15  # points of one curve; more would overlap


def draw_curves(run: Run) -> bytes:
    """Validation accuracy in % by epoch as a PNG, with the best epoch marked."""
    figure = Figure(figsize=(6.4, 3.7), dpi=220, layout="constrained")
    axes = figure.subplots()
    axes.margins(x=0.02)
    # The name comes from a file, and Matplotlib would typeset a $ in it.
    attack = run.attack if re.fullmatch(r"[A-Z]+-[0-9]+", run.attack) else "attack"
    for key, label, colour, style in CURVES:
        points = [(number_at(row, "epoch"), read_score(row.get(key))) for row in run.validation]
        drawn = [(epoch, score.percent) for epoch, score in points if epoch is not None and score is not None]
        if drawn:
            label = label.replace("robust", f"robust ({attack})").replace(CLEAN, run.clean_term)
            marker = "o" if len(drawn) <= _MOST_MARKERS else None
            axes.plot(*zip(*drawn, strict=True), color=colour, ls=style, marker=marker, ms=3.5, lw=1.7, label=label)
    best_epoch, best = number_at(run.best_row, "epoch"), read_score(run.best_row.get("robust"))
    if best_epoch is not None and best is not None:
        axes.axvline(best_epoch, color="#59626d", lw=1, ls=":")
        axes.plot([best_epoch], [best.percent], "o", color="#d55e00", ms=6, mec="white", mew=1.2, zorder=5)
        side = "right" if best_epoch > sum(axes.get_xlim()) / 2 else "left"
        text = f"best: epoch {best_epoch:g}, robust {best.percent:.1f} %"
        axes.text(best_epoch, 101.5, text, ha=side, fontsize=9, color="#59626d")
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no validation yet", ha="center", transform=axes.transAxes)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100), yticks=range(0, 101, 20))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e3e6ea", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # Matplotlib's version would change the bytes
    return buffer.getvalue()
