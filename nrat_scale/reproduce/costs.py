"""What a training cost, and how many wrong labels it learnt: read from cells, for tables, pages and figures."""

import math
from collections.abc import Callable, Iterable

import numpy as np

from nrat_scale.report.run import number_at
from nrat_scale.reproduce.measured import Measured

Reading = Callable[[Measured], float | None]  # None: the cell does not have it


def wrong_labels_fitted(cell: Measured) -> float | None:
    """The share, in %, of the wrong training labels that the model predicts at the last epoch; None without wrong labels."""
    rows = cell.facts.get("memorisation") or []
    last = number_at(rows[-1], "noisy_fitted") if rows else None
    return None if last is None else 100 * last


def effective_noise(cell: Measured) -> float | None:
    """Wrong labels of a batch in %, generated images included."""
    rate = cell.number("noise_realised.effective_rate")
    return None if rate is None else 100 * rate


def total_cost(cell: Measured) -> float | None:
    """Forward passes of a training in millions of images. A backward pass to images or weights is one."""
    numbers = [cell.number(f"cost.{key}") for key in ("forward_equivalents", "steps", "images")]
    known = [number for number in numbers if number is not None]
    return math.prod(known) / 1e6 if len(known) == len(numbers) else None


def cost_per_image(cell: Measured) -> float | None:
    """Forward passes of an image in one step."""
    return cell.number("cost.forward_equivalents")


def mean_of(cells: Iterable[Measured], read: Reading) -> float | None:
    """The mean over the cells that have it."""
    values = [value for cell in cells if (value := read(cell)) is not None]
    return float(np.mean(values)) if values else None


COSTS: dict[str, Reading] = {
    "wrong labels fitted, %": wrong_labels_fitted,
    "effective noise, %": effective_noise,
    "cost, millions": total_cost,
}
COSTS_CAPTION = (
    "Wrong labels fitted: share of the wrong training labels that the model predicts at the last epoch. Effective noise: wrong labels "
    "of a batch, generated images included. Cost: forward passes of an image, in millions; a backward pass to the images or to the weights counts "
    "as one each."
)
