"""Accuracies with intervals, and the worst case over several attacks."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nrat_scale.evaluate.results import Outcome

_Z95 = 1.959963984540054


# ---- numbers --------------------------------------------------------------------------------------------------------


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the proportion correct / n (Wilson 1927), as fractions."""
    assert n > 0
    p, z2 = correct / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_record(outcome: np.ndarray) -> dict[str, Any]:
    """Counts, accuracy and interval of per-image outcomes bool [n]."""
    correct, n = int(outcome.sum()), len(outcome)
    low, high = wilson(correct, n)
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high}


def worst_case(outcomes: Mapping[str, Outcome]) -> dict[str, Any] | None:
    """Accuracy where an image must survive every attack that was run, on the images that all of them saw: counts, interval and
    the names of the attacks. None for a single attack, or where they have no image in common."""
    common: np.ndarray | None = None
    for ids, _ in outcomes.values():
        common = ids if common is None else np.intersect1d(common, ids, assume_unique=True)
    if common is None or len(outcomes) < 2 or not len(common):
        return None
    right = np.ones(len(common), bool)
    for ids, survived in outcomes.values():
        order = np.argsort(ids)
        right &= survived[order[np.searchsorted(ids, common, sorter=order)]]
    return {"attacks": sorted(outcomes), **accuracy_record(right)}
