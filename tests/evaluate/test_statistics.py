"""Intervals and the worst case."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrat_scale.evaluate.statistics import Paired, beyond_chance, paired, paired_interval, wilson, worst_case


def test_wilson_known_values() -> None:
    """Textbook values, also at 0 and 1, where the normal approximation collapses."""
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_estimate(counts: tuple[int, int]) -> None:
    """0 <= low <= correct / n <= high <= 1."""
    low, high = wilson(*counts)
    p = counts[0] / counts[1]
    assert 0 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1


def test_the_worst_case_is_over_common_images() -> None:
    """An image counts if every attack saw it and none broke it, in whatever order the ids are; one attack has no worst case."""
    one = np.array([3, 1, 2]), np.array([True, True, False])
    other = np.array([1, 3, 7]), np.array([False, True, True])
    record = worst_case({"pgd20": one, "cw20": other})
    assert record is not None
    assert (record["attacks"], record["correct"], record["n"]) == (["cw20", "pgd20"], 1, 2)
    assert worst_case({"pgd20": one}) is None
    assert worst_case({"pgd20": one, "aa": (np.array([9]), np.array([True]))}) is None


def test_chance() -> None:
    """The exact one-sided sign test at 2.5 %: known values, and no overflow for many images."""
    assert not beyond_chance(0, 0) and not beyond_chance(5, 0) and beyond_chance(6, 0)
    assert not beyond_chance(14, 5) and beyond_chance(15, 5)  # 0.0318 and 0.0207
    assert not beyond_chance(5000, 4900) and beyond_chance(5100, 4900) and not beyond_chance(10, 500)


def test_pairs_are_of_common_images() -> None:
    """In whatever order the ids are."""
    one = np.array([3, 1, 2, 9]), np.array([True, False, True, True])
    other = np.array([1, 2, 3, 4]), np.array([True, True, False, True])
    pair = paired(one, other)
    assert (pair.n, pair.right, pair.other_right, pair.only_first_broke, pair.only_second_broke) == (3, 2, 2, 1, 1)


def test_the_worst_case_has_the_accuracies_on_its_images() -> None:
    """Only those may stand beside it, if an attack saw other images too."""
    one = np.array([3, 1, 2]), np.array([True, True, False])
    other = np.array([1, 3, 7]), np.array([False, True, True])
    record = worst_case({"pgd20": one, "aa": other})
    assert record is not None
    assert {name: (entry["correct"], entry["n"]) for name, entry in record["on_common"].items()} == {
        "pgd20": (2, 2),
        "aa": (1, 2),
    }
    same = worst_case({"pgd20": one, "cw20": one})
    assert same is not None and "on_common" not in same


def test_paired_interval() -> None:
    """Newcombe's published example (1998, table II, method 10: 36, 12, 2, 0 of 50), and the extremes."""
    pair = Paired(n=50, right=48, other_right=38, only_first_broke=2, only_second_broke=12)
    assert paired_interval(pair) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    swapped = Paired(50, 38, 48, 12, 2)
    assert paired_interval(swapped) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    low, high = paired_interval(Paired(20, 20, 20, 0, 0))
    assert low < 0 < high
    assert paired_interval(Paired(20, 20, 0, 0, 20)) == pytest.approx((0.7624, 1.0), abs=0.03)
