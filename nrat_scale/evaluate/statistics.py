"""Accuracies with intervals, and the worst case over several attacks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nrat_scale.evaluate.results import Outcome

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the proportion correct / n (Wilson 1927), as fractions; `correct` may be a mean of counts."""
    assert n > 0
    p, z2 = correct / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_record(right: np.ndarray) -> dict[str, Any]:
    """Counts, accuracy and interval of per-image outcomes bool [n]. The accuracy is a mean over images, not over batches."""
    correct, n = int(right.sum()), len(right)
    low, high = wilson(correct, n)
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high}


@dataclass(frozen=True)
class Paired:
    """Two outcomes on the images that both contain."""

    n: int
    right: int  # under the first attack
    other_right: int  # under the second one
    only_first_broke: int  # wrong under the first attack, right under the second one
    only_second_broke: int


def paired(one: Outcome, other: Outcome) -> Paired:
    """Compare two outcomes image by image."""
    _, rows, other_rows = np.intersect1d(one[0], other[0], assume_unique=True, return_indices=True)
    first, second = one[1][rows], other[1][other_rows]
    pairs = first.sum(), second.sum(), (~first & second).sum(), (first & ~second).sum()
    return Paired(len(rows), *map(int, pairs))


def beyond_chance(more: int, fewer: int) -> bool:
    """Whether `more` images that only one attack broke exceed `fewer` that only the other one did by more than chance.

    McNemar's exact test at the level of the 95 % intervals: of more + fewer images, each equally likely to be either, as many
    as `more` occur with a probability of at most 2.5 %. With fewer = 0 it takes six images, whatever their total is.
    """
    total = more + fewer
    terms = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(more, total + 1))
    return total > 0 and sum(math.exp(term - total * math.log(2)) for term in terms) <= 0.025


def paired_interval(pair: Paired) -> tuple[float, float]:
    """95 % interval of accuracy under the first minus accuracy under the second attack, on the same images, as fractions.

    Newcombe's interval for paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method 10): the Wilson intervals of
    both, combined with the correlation of the outcomes. It is never wider than [-1, 1], and has a width if no image differs.
    """
    n, only_first, only_second = pair.n, pair.only_second_broke, pair.only_first_broke
    assert n > 0
    both, neither = pair.right - only_first, n - pair.other_right - only_first
    one, other = pair.right / n, pair.other_right / n
    (low, high), (other_low, other_high) = wilson(pair.right, n), wilson(pair.other_right, n)
    margins = pair.right * (n - pair.right) * pair.other_right * (n - pair.other_right)
    excess = both * neither - only_first * only_second
    phi = (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(margins) if margins else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = one - other
    return difference - half(one - low, other_high - other), difference + half(high - one, other - other_low)


def worst_case(outcomes: Mapping[str, Outcome]) -> dict[str, Any] | None:
    """The accuracy if an image must survive every attack, over the images that all of them saw, and the attacks' names.

    If an attack saw others too, `on_common` has the accuracies of all attacks on the common images: only these may be compared
    with the worst case. None for a single attack, or if the attacks have no image in common.
    """
    if len(outcomes) < 2:
        return None
    survived = {name: dict(zip(ids.tolist(), right.tolist(), strict=True)) for name, (ids, right) in outcomes.items()}
    common = set.intersection(*map(set, survived.values()))
    if not common:
        return None
    right = {name: np.array([one[image_id] for image_id in common]) for name, one in survived.items()}
    record = {"attacks": sorted(outcomes), **accuracy_record(np.logical_and.reduce(list(right.values())))}
    if any(len(one) > len(common) for one in survived.values()):
        record["on_common"] = {name: accuracy_record(one) for name, one in right.items()}
    return record
