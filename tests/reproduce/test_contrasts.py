"""Paired differences over images and seeds: by hand, against exact quantiles, and how often the interval covers the truth."""

import numpy as np
import pytest

from nrat_scale.evaluate.statistics import Paired, paired_interval
from nrat_scale.reproduce.contrasts import contrast, t_quantile


def bits(*rows: str) -> np.ndarray:
    """Outcomes from strings such as `1101`, one per seed."""
    return np.array([[letter == "1" for letter in row] for row in rows])


def test_paired_difference_by_hand() -> None:
    """Two seeds, five images: the mean, and the interval of crossed random effects worked out on paper.

    d = [[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], mean 0.4; over images 0.5, 0, 0.5, 1, 0; over seeds 0.4, 0.4.
    Sum of squares over images 0.7, and 2 for an image more of each sign: V_i = 2.7 / 6 / 5. V_s = 0. The residuals are +-0.5 for two
    images: V_e = 1 / 4 / 10. V = max(V_i - V_e, V_i, 0) = V_i = 0.09, with 4 degrees of freedom.
    """
    one, other = bits("11011", "10111"), bits("01001", "10001")
    found = contrast([(1, one), (-1, other)], [0, 1])
    half = 100 * 2.7764451 * (2.7 / 30) ** 0.5
    assert found.points == pytest.approx(40)
    assert (found.low, found.high) == pytest.approx((40 - half, 40 + half))
    assert (found.n, found.seeds, found.deviation) == (5, (0, 1), 0.0)
    assert found.covers == "test images and trainings"


def test_seeds_that_disagree_widen_the_interval() -> None:
    """If trainings differ more than images do, the interval has the few degrees of freedom of the seeds."""
    one = np.stack([np.arange(1000) < k for k in (600, 650, 700)])
    other = np.stack([np.arange(1000) < 600] * 3)
    found = contrast([(1, one), (-1, other)], [0, 1, 2])
    assert (found.points, found.deviation) == pytest.approx((5.0, 5.0))
    assert found.high - found.points > 4.3 * 5 / 3**0.5 * 0.95 and found.low < 0


def test_one_seed_is_newcombe() -> None:
    """For one seed a plain difference has the interval of `evaluate.statistics`, which says nothing about trainings."""
    one, other = bits("1" * 30 + "0" * 10), bits("1" * 22 + "0" * 16 + "11")
    found = contrast([(1, one), (-1, other)], [7])
    low, high = paired_interval(Paired(40, 30, 24, 2, 8))
    assert (found.low, found.points, found.high) == pytest.approx((100 * low, 15, 100 * high))
    assert found.covers == "test images"


def test_equal_methods_do_not_differ() -> None:
    """The difference is zero, and its interval still has a width."""
    same = bits("10" * 50, "01" * 50, "11" * 50)
    found = contrast([(1, same), (-1, same)], [0, 1, 2])
    assert found.points == 0 and found.low < 0 < found.high < 3


def test_few_images_decide_nothing() -> None:
    """Five images of 1,000 that one method alone classifies correctly are chance, six are not: McNemar's exact test, too."""
    lows = []
    for more in (5, 6):
        one, other = (np.stack([np.arange(1000) < 500 + extra] * 3) for extra in (more, 0))
        lows.append(contrast([(1, one), (-1, other)], [0, 1, 2]).low)
    assert lows[0] < 0 < lows[1]


def test_constant_and_several_terms() -> None:
    """Gap of gaps and thresholds are sums too."""
    right = bits("1110", "1100")
    terms = [(1.0, right), (-1.0, ~right), (-1.0, right), (1.0, ~right)]
    assert contrast(terms, [0, 1]).points == 0
    found = contrast([(-1.0, right)], [0, 1], 30)
    assert found.points == pytest.approx(30 - 62.5)
    assert contrast([(-1.0, right[:1])], [0], 30).points == pytest.approx(30 - 75)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (2, 4.3026527), (4, 2.7764451), (10, 2.2281389), (999, 1.9623415)]
)
def test_quantiles_of_student(freedom: int, quantile: float) -> None:
    """Against published tables."""
    assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize(("spread", "least"), [(0.0, 0.93), (0.05, 0.90)])
def test_coverage(spread: float, least: float) -> None:
    """The interval covers the true difference, 0, in about 95 % of experiments; that over images alone does not if trainings differ."""
    draw = np.random.default_rng(0)
    covered = by_images = 0
    for _ in range(200):
        image = draw.normal(size=300)
        shifts = draw.normal(scale=5 * spread, size=(2, 3, 1))
        one, other = (image + shift + draw.normal(scale=0.5, size=(3, 300)) > 0 for shift in shifts)
        found = contrast([(1, one), (-1, other)], [0, 1, 2])
        covered += found.low <= 0 <= found.high
        mean = (one.astype(float) - other).mean(0)
        by_images += abs(mean.mean()) <= 1.96 * mean.std() / 300**0.5
    assert covered / 200 >= least
    assert (by_images / 200 < 0.6) == (spread > 0)
