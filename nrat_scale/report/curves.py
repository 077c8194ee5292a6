"""Learning curves as a figure."""

import io
import math
import re

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nrat_scale.report.run import Run, accuracy_percent, finite_number

# Key in a validation row, label, colour, line style. The clean ones are null where clean labels are not known.
CURVES = (
    ("natural", "natural", "#0072b2", "-"),
    ("robust", "robust", "#d55e00", "-"),
    ("natural_clean", "natural, clean labels", "#0072b2", "--"),
    ("robust_clean", "robust, clean labels", "#d55e00", "--"),
)


# ---- figure ---------------------------------------------------------------------------------------------------------


def draw_curves(run: Run) -> bytes:
    """Validation accuracy by epoch, 0 to 100 %, as a PNG with the best epoch marked; what is null is not drawn."""
    figure = Figure(figsize=(6.4, 3.7), dpi=220, layout="constrained")
    axes = figure.subplots()
    axes.margins(x=0.02)
    attack = run.attack if re.fullmatch(r"[A-Z]+-[0-9]+", run.attack) else "attack"
    for key, label, colour, style in CURVES:
        points = [(finite_number(row.get("epoch")), accuracy_percent(row.get(key))) for row in run.validation]
        points = [(x, y) for x, y in points if x is not None and not math.isnan(y)]
        if points:
            label = label.replace("robust", f"robust ({attack})")
            marker = "o" if len(points) <= 15 else None
            axes.plot(*zip(*points, strict=True), color=colour, ls=style, marker=marker, ms=3.5, lw=1.7, label=label)
    epoch, robust = finite_number(run.best_row.get("epoch")), accuracy_percent(run.best_row.get("robust"))
    if epoch is not None and not math.isnan(robust):
        axes.axvline(epoch, color="#59626d", lw=1, ls=":")
        axes.plot([epoch], [robust], "o", color="#d55e00", ms=6, mec="white", mew=1.2, zorder=5)
        side = "right" if epoch > sum(axes.get_xlim()) / 2 else "left"
        axes.text(epoch, 101.5, f"best: epoch {epoch:g}, robust {robust:.1f} %", ha=side, fontsize=9, color="#59626d")
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no validation yet", ha="center", transform=axes.transAxes)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100), yticks=range(0, 101, 20))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e3e6ea", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
