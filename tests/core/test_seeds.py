"""Randomness is a function of its arguments: the same everywhere, unrelated between streams, and both ways computable."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.seeds import KeyedPermutation, derive, hash64, torch_generator, uniform01

TABLE_LIMIT = 1 << 20  # up to here KeyedPermutation is a table, beyond it a Feistel network
SEEDS = st.integers(-(2**70), 2**70)
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=50)


def _chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@REPEATABLE
@given(n=st.integers(1, 3000), seed=SEEDS)
def test_small_permutation_is_a_bijection_with_an_exact_inverse(n, seed):
    """Every sample is stored exactly once, and positions and source ids can be computed from each other."""
    permutation, everything = KeyedPermutation(n, seed, "shards"), np.arange(n)
    elements = permutation(everything)
    assert elements.dtype == np.int64
    assert np.array_equal(np.sort(elements), everything)
    assert np.array_equal(permutation.inverse(elements), everything)
    assert np.array_equal(permutation(permutation.inverse(everything)), everything)


@REPEATABLE
@given(
    n=st.integers(TABLE_LIMIT + 1, TABLE_LIMIT + 5000) | st.integers(TABLE_LIMIT + 1, 10**12),
    seed=SEEDS,
    data=st.data(),
)
def test_feistel_permutation_inverts_exactly_at_sampled_positions(n, seed, data):
    """Beyond 2^20 elements distinct positions give distinct elements within range, and each leads back."""
    permutation = KeyedPermutation(n, seed, "shards")
    sampled = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=200, unique=True))
    positions = np.unique([*sampled, 0, n - 1])
    elements = permutation(positions)
    assert elements.min() >= 0 and elements.max() < n
    assert len(np.unique(elements)) == len(positions)
    assert np.array_equal(permutation.inverse(elements), positions)
    assert np.array_equal(permutation(permutation.inverse(positions)), positions)


@pytest.mark.parametrize("n", [TABLE_LIMIT, TABLE_LIMIT + 1, TABLE_LIMIT + 4999])
def test_large_permutation_hits_every_element_once(n):
    """The whole range around the change from table to Feistel network, not a sample of it."""
    elements = KeyedPermutation(n, 5, "whole")(np.arange(n))
    assert (np.bincount(elements, minlength=n) == 1).all()


@pytest.mark.parametrize("n", [1, 5, TABLE_LIMIT + 1])
def test_permutation_does_not_depend_on_how_positions_are_grouped(n):
    """One position at a time, none at all, repeated ones and any integer dtype give what the whole range gives."""
    permutation = KeyedPermutation(n, 3, "grouping")
    positions = np.array([0, n - 1, n // 2, 0])
    together = permutation(positions)
    assert together.tolist() == [int(permutation(np.array([p]))[0]) for p in positions]
    assert np.array_equal(permutation(positions.astype(np.int32)), together)
    assert permutation(np.zeros(0, np.int64)).shape == (0,)
    assert np.array_equal(KeyedPermutation(n, 3, "grouping")(positions), together)


@pytest.mark.parametrize("n", [5, TABLE_LIMIT + 1])
@pytest.mark.parametrize("way", ["__call__", "inverse"])
def test_positions_out_of_range_are_never_answered(n, way):
    """A negative index must not silently mean the last sample."""
    for wrong in (-1, n):
        with pytest.raises(AssertionError, match="out of range"):
            getattr(KeyedPermutation(n, 0), way)(np.array([0, wrong]))


def test_all_permutations_of_four_are_equally_likely():
    """No order is favoured: over 4,800 seeds each of the 24 appears about 200 times."""
    index = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    drawn = [index[tuple(KeyedPermutation(4, seed, "uniform")(np.arange(4)).tolist())] for seed in range(4800)]
    counts = np.bincount(drawn, minlength=24)
    assert counts.min() > 140 and counts.max() < 260  # four standard deviations
    assert _chi_square(counts) < 49.7  # 23 degrees of freedom, p = 0.001


def test_feistel_permutation_spreads_evenly():
    """Beyond 2^20 neighbours are torn apart, and where a sample goes depends on the seed."""
    n = TABLE_LIMIT + 7
    elements = KeyedPermutation(n, 0, "spread")(np.arange(n))
    bins = elements * 64 // n
    for start in (0, n // 2, n - 20_000):  # every stretch of positions is a fair sample of all elements
        assert _chi_square(np.bincount(bins[start : start + 20_000], minlength=64)) < 103.4  # 63 degrees, p = 0.001
    assert abs(np.corrcoef(elements[:-1], elements[1:])[0, 1]) < 0.005
    first = [int(KeyedPermutation(n, seed, "spread")(np.array([12_345]))[0]) * 16 // n for seed in range(1600)]
    assert _chi_square(np.bincount(first, minlength=16)) < 37.7  # 15 degrees, p = 0.001


@pytest.mark.parametrize("n", [1000, TABLE_LIMIT + 1])
def test_different_seeds_and_names_give_unrelated_permutations(n):
    """Two streams agree in about one place, as two random permutations do."""
    everything = np.arange(n)
    orders = [KeyedPermutation(n, *key)(everything) for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0)]]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10


@pytest.mark.parametrize(
    ("n", "seed", "positions", "elements"),
    [
        (10, 0, range(10), [9, 6, 7, 3, 4, 0, 5, 8, 2, 1]),
        (10, 1, range(10), [3, 5, 4, 7, 1, 8, 2, 9, 6, 0]),
        (TABLE_LIMIT, 0, [0, 1, TABLE_LIMIT - 1], [736257, 504784, 888076]),
        (TABLE_LIMIT + 1, 0, [0, 1, 2, TABLE_LIMIT], [729455, 132580, 889762, 747813]),
        (50_000_000, 0, [0, 1, 2, 49_999_999], [14960557, 11197013, 33551376, 19475052]),
    ],
)
def test_permutations_never_change(n, seed, positions, elements):
    """Shards on disk name their order only by n and seed: another answer would mislabel every sample in them."""
    permutation = KeyedPermutation(n, seed, "shards")
    assert permutation(np.array(positions)).tolist() == elements
    assert permutation.inverse(np.array(elements)).tolist() == list(positions)


def test_a_permutation_of_fifty_million_needs_little_memory():
    """A plan over 50 million generated images may not hold a table of them in every process."""
    tracemalloc.start()
    try:
        permutation = KeyedPermutation(50_000_000, 0, "memory")
        positions = np.arange(0, 50_000_000, 50_000)
        assert np.array_equal(permutation.inverse(permutation(positions)), positions)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_derived_seeds_never_change():
    """Runs, noisy labels and shards made earlier must be reproducible by later versions."""
    assert derive(0) == 2033344993903900207
    assert derive(0, "shards") == 7302088388275960470
    assert derive(1, "shards") == 2708123142013406269
    assert derive(0, "a", "b") == 8820768972531692604
    assert derive(0, 3) == 7366717096304810602
    assert hash64(0, np.arange(4)).tolist() == [0, 16294208416658607535, 7960286522194355700, 487617019471545679]
    assert hash64(12345, np.array([10**12])).tolist() == [14153763239457541192]
    assert uniform01(7, np.arange(3)).tolist() == [0.0729703985808493, 0.3898297483912715, 0.01678829452815611]


def test_derive_differs_by_seed_and_by_name():
    """No two streams share a seed, nor do names that only look alike when they are joined."""
    keys = [(seed, *names) for seed in range(-50, 50) for names in [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1)]]
    keys += [(1, 1), (111,), (1, "1", "1"), (0, "a", ""), (2**63,), (2**64,)]
    seeds = [derive(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what numpy's uint64 and torch's int64 both take


def test_hash64_is_the_same_for_every_integer_dtype():
    """Ids arrive as int32, int64 or uint64; the draw may not depend on that, and no two ids share one."""
    ids = np.arange(100_000)
    hashes = hash64(99, ids)
    assert hashes.dtype == np.uint64 and len(np.unique(hashes)) == len(ids)
    assert np.array_equal(hash64(99, ids.astype(np.int32)), hashes)
    assert np.array_equal(hash64(99, ids.astype(np.uint64)), hashes)
    assert np.array_equal(hash64(99, ids.reshape(100, -1)).ravel(), hashes)


def test_uniform01_is_uniform():
    """Noise rates are thresholds on these numbers: they must lie in [0, 1) and fill it evenly."""
    values = uniform01(derive(0, "uniform01"), np.arange(100_000))
    assert values.min() >= 0 and values.max() < 1
    assert _chi_square(np.bincount((values * 100).astype(int), minlength=100)) < 148.2  # 99 degrees, p = 0.001
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_torch_generator_depends_only_on_its_arguments():
    """Attack noise of a step can be drawn again after a restart, and other streams leave it alone."""
    draws = [torch.rand(4, generator=torch_generator("cpu", *key)) for key in [(0, "x", 1), (0, "x", 1), (0, "x", 2)]]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
