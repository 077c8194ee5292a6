"""The sample plan is a pure function of (index, seed, step): every sample once per pass, windows, known answers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.data.plan import SamplePlan, SourceOrder, mix_counts


@st.composite
def orders(draw: st.DrawFn) -> SourceOrder:
    """A source of shards of any size (also empty ones: all held out), whole or in windows."""
    sizes = draw(st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(any))
    starts = (0, *np.cumsum(sizes).tolist())
    return SourceOrder(draw(st.integers(1, 40)), starts, draw(st.none() | st.integers(1, 9)))


PLANS = st.builds(
    lambda sources, seed: SamplePlan(tuple(sources), seed),
    st.lists(orders(), min_size=1, max_size=2),
    st.integers(0, 2**40),
)


PINNED = [
    (None, [(1, 482175), (1, 410914), (0, 30), (1, 1182121), (1, 692535), (0, 49), (1, 2889684), (0, 34)]),
    (4, [(1, 1699042), (1, 1699160), (0, 30), (1, 1323457), (1, 1340464), (0, 49), (1, 1323187), (0, 34)]),
]


def plan_of(sizes: tuple[int, ...], counts: tuple[int, ...], seed: int) -> SamplePlan:
    return SamplePlan(tuple(SourceOrder(c, (0, s)) for s, c in zip(sizes, counts, strict=True)), seed)


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_every_sample_once_per_pass(plan: SamplePlan) -> None:
    """Sources cycle independently: each whole pass is a permutation of its source, for any batch size."""
    batches = [plan.batch(step) for step in range(30)]
    for source, (size, count) in enumerate((source.size, source.count) for source in plan.sources):
        assert all((sources == source).sum() == count for sources, _ in batches)
        seen = [sorted(samples[sources == source]) for sources, samples in batches]
        whole_passes = 30 * count // size
        counts = np.bincount(np.concatenate(seen), minlength=size)
        assert counts.min() >= whole_passes
        assert counts.max() <= whole_passes + 1


@settings(max_examples=30, deadline=None)
@given(PLANS, st.integers(0, 10**9))
def test_plan_is_a_pure_function(plan: SamplePlan, step: int) -> None:
    """A batch depends on (sizes, counts, seed, step) alone, not on earlier calls."""
    first = plan.batch(step)
    plan.batch(step + 17)
    again = SamplePlan(plan.sources, plan.seed).batch(step)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 10**6), st.integers(0, 500))
def test_a_batch_draws_from_its_windows(source: SourceOrder, seed: int, step: int) -> None:
    """The shards of a step are fetched for it, and the next window is fetched ahead."""
    source = replace(source, window=source.window or 2)
    plan = SamplePlan((source,), seed)
    starts = np.asarray(source.starts)

    def shards_of(samples: np.ndarray) -> set[int]:
        return set((np.searchsorted(starts, samples, side="right") - 1).tolist())

    now = plan.shards_of(0, step).tolist()
    assert shards_of(plan.batch(step)[1]) <= set(now)
    assert not len(plan.shards_after(0, step, step + 1)), "no batch comes after this one"
    ahead = set(now) | set(plan.shards_after(0, step, 10**6).tolist())
    following = plan.shards_of(0, step + 1).tolist()[: len(source.starts) - 1]
    assert following[0] in ahead


@pytest.mark.parametrize(("window", "expected"), PINNED)
def test_the_plan_is_the_same_in_every_version(window: int | None, expected: list[tuple[int, int]]) -> None:
    """Known answers: a change of the plan would change the samples of every published run."""
    starts = tuple(range(0, 3_000_001, 50_000))
    plan = SamplePlan((SourceOrder(3, (0, 50)), SourceOrder(5, starts, window)), 7)
    assert [tuple(map(int, row)) for row in zip(*plan.batch(1_000_003), strict=True)] == expected


def test_passes_and_seeds_differ() -> None:
    """Each pass and each seed has its own order, and real and generated samples are interleaved within a batch."""
    plan = plan_of((64, 64), (32, 32), 1)
    passes = [np.concatenate([plan.batch(s)[1][plan.batch(s)[0] == 0] for s in pair]) for pair in ((0, 1), (2, 3))]
    assert not np.array_equal(*passes)
    assert not np.array_equal(plan.batch(0)[1], plan_of((64, 64), (32, 32), 2).batch(0)[1])
    assert 5 < plan.batch(0)[0][:32].sum() < 27, "one rank would see one kind only"


def test_mix_is_exact() -> None:
    """The published mix, and products that floating point rounds down."""
    assert mix_counts(512, 0.7) == (154, 358)
    assert mix_counts(100, 0.29) == (71, 29)
