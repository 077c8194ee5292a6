"""The sample plan: which samples form global batch t, as a pure function of (index, seed, t).

Ranks, workers and restarts do not occur in it, so any of them can change and the same images arrive in the same steps.

    batch t of B positions                          a seeded permutation of real and generated samples
    -> running sample numbers t*c .. (t+1)*c - 1    c images of every batch come from this source, exactly
    -> pass (number // size) and place in the pass  every sample once per pass; sources cycle independently
    -> sample                                       by the order of that pass: of the whole source, or of windows

An order of the whole source is one keyed permutation. An order of *windows* visits the shards in a keyed permutation,
`window` of them at a time, and permutes the samples within each window: what a run needs next then lies in few shards,
which can be fetched while the ones before are trained on. Memory does not grow with the number of samples.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from nrat_scale.core.seeds import KeyedPermutation

_KEPT_ORDERS, _KEPT_WINDOWS = 8, 4


def mix_counts(batch_size: int, fraction: float) -> tuple[int, int]:
    """(real, generated) images of every batch: generated = floor(batch_size * fraction), as in DM_AT (512 -> 154 + 358)."""
    generated = int(batch_size * fraction + 1e-9)  # 100 * 0.29 is 28.999...
    return batch_size - generated, generated


@dataclass(frozen=True)
class SourceOrder:
    """How one source is passed through.

    Attributes:
        count: images that it gives to every batch.
        starts: training samples by shard: shard s holds the samples starts[s] .. starts[s + 1] - 1; its last entry is
            the size of the source.
        window: shards that are shuffled together; None shuffles the whole source.
    """

    count: int
    starts: tuple[int, ...]
    window: int | None = None

    @property
    def size(self) -> int:
        """Training samples of the source."""
        return self.starts[-1]


class _WholePass:
    """One pass in the order of one permutation."""

    def __init__(self, source: SourceOrder, seed: int, *names: int) -> None:
        self._permutation = KeyedPermutation(source.size, seed, "pass", *names)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        return self._permutation(places)


class _WindowPass:
    """One pass by windows of shards."""

    def __init__(self, source: SourceOrder, seed: int, *names: int) -> None:
        assert source.window is not None
        starts = np.asarray(source.starts)
        num_shards = len(starts) - 1
        self._seed, self._names = seed, names
        self._first = starts[:-1]
        self._sizes = np.diff(starts)
        shards = KeyedPermutation(num_shards, seed, "shards of a pass", *names)(np.arange(num_shards))
        self._shards = shards[self._sizes[shards] > 0]  # all of a shard's samples may be held out
        self._bounds = [*range(0, len(self._shards), source.window), len(self._shards)]
        sizes = [int(self._sizes[self.shards(w)].sum()) for w in range(len(self._bounds) - 1)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._orders: OrderedDict[int, KeyedPermutation] = OrderedDict()

    @property
    def num_windows(self) -> int:
        return len(self._bounds) - 1

    def shards(self, window: int) -> np.ndarray:
        """The shards of one window."""
        return self._shards[self._bounds[window] : self._bounds[window + 1]]

    def windows_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, places, side="right") - 1

    def __call__(self, places: np.ndarray) -> np.ndarray:
        windows = self.windows_of(places)
        samples = np.empty(len(places), np.int64)
        for window in np.unique(windows):
            here = windows == window
            samples[here] = self._within(int(window), places[here] - self._starts[window])
        return samples

    def _within(self, window: int, places: np.ndarray) -> np.ndarray:
        order = self._orders.get(window)
        if order is None:
            size = int(self._starts[window + 1] - self._starts[window])
            order = self._orders[window] = KeyedPermutation(size, self._seed, "window", *self._names, window)
            if len(self._orders) > _KEPT_WINDOWS:
                self._orders.popitem(last=False)
        shards = self.shards(window)
        ends = np.cumsum(self._sizes[shards])
        inside = order(places)
        shard = np.searchsorted(ends, inside, side="right")
        return self._first[shards[shard]] + inside - (ends[shard] - self._sizes[shards[shard]])


@dataclass(frozen=True)
class SamplePlan:
    """Which samples form global batch t.

    Attributes:
        sources: how each source is passed through.
        seed: of all permutations.
    """

    sources: tuple[SourceOrder, ...]
    seed: int
    _passes: "OrderedDict[tuple[int, int], _WholePass | _WindowPass]" = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    @property
    def counts(self) -> tuple[int, ...]:
        """Images that each source gives to every batch."""
        return tuple(source.count for source in self.sources)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source [B] int64, sample [B] int64 in [0, size of the source)) of global batch `step`, counted from 0."""
        parts = [self._samples(number, step) for number in range(len(self.sources))]
        kinds = np.repeat(np.arange(len(self.sources)), self.counts)
        order = KeyedPermutation(len(kinds), self.seed, "positions", step)(np.arange(len(kinds)))
        return kinds[order], np.concatenate(parts)[order]

    def shards_of(self, number: int, step: int) -> np.ndarray:
        """The shards that batch `step` may take samples of source `number` from: those of its windows, in order.

        Only for a source with windows.
        """
        found = []
        for passed, places in self._places(number, step):
            order = self._order(number, passed)
            assert isinstance(order, _WindowPass)
            found += [order.shards(int(window)) for window in np.unique(order.windows_of(places))]
        return np.concatenate(found)

    def shards_after(self, number: int, step: int, stop: int) -> np.ndarray:
        """The shards of the window behind those of `shards_of`: what should be fetched ahead.

        Empty where the batches before step `stop` do not get that far.
        """
        passed, window, order = self._last_window(number, step)
        if (passed, window) == self._last_window(number, stop - 1)[:2]:
            return np.zeros(0, np.int64)
        if window + 1 < order.num_windows:
            return order.shards(window + 1)
        following = self._order(number, passed + 1)
        assert isinstance(following, _WindowPass)
        return following.shards(0)

    def _last_window(self, number: int, step: int) -> tuple[int, int, _WindowPass]:
        """(pass, window, order of the pass) of the last sample of source `number` in batch `step`."""
        passed, places = list(self._places(number, step))[-1]
        order = self._order(number, passed)
        assert isinstance(order, _WindowPass)
        return passed, int(order.windows_of(places[-1:])[0]), order

    def _samples(self, number: int, step: int) -> np.ndarray:
        return np.concatenate([self._order(number, passed)(places) for passed, places in self._places(number, step)])

    def _places(self, number: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(pass, places in it) of the running sample numbers of batch `step`, in order."""
        source = self.sources[number]
        running = np.arange(step * source.count, (step + 1) * source.count)
        passes = running // source.size
        for passed in range(int(passes[0]), int(passes[-1]) + 1):
            yield passed, running[passes == passed] % source.size

    def _order(self, number: int, passed: int) -> _WholePass | _WindowPass:
        order = self._passes.get((number, passed))
        if order is None:
            source = self.sources[number]
            kind = _WholePass if source.window is None else _WindowPass
            order = self._passes[number, passed] = kind(source, self.seed, number, passed)
            if len(self._passes) > _KEPT_ORDERS:
                self._passes.popitem(last=False)
        return order

    def __getstate__(self) -> dict[str, object]:
        # The permutations are computed anew in a worker process.
        return {"sources": self.sources, "seed": self.seed, "_passes": OrderedDict()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
