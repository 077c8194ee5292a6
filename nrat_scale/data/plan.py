"""The sample plan: which samples form global batch t, as a pure function of (index, seed, t).

It does not depend on the number of ranks or on restarts, so the same images arrive in the same steps.

    batch t of B positions                          a seeded permutation of real and generated samples
    -> running sample numbers t*c .. (t+1)*c - 1    c images of every batch come from this source, exactly
    -> pass (number // size) and place in the pass  every sample once per pass; sources cycle independently
    -> sample                                       by the order of that pass: of the whole source, or of windows

An order of the whole source is one keyed permutation. An order of *windows* visits the shards in a keyed permutation,
`window` of them at a time, and permutes the samples within each window. Upcoming samples are then in few shards, which
are fetched while the previous window is trained on. Memory does not grow with the number of samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from nrat_scale.core.seeds import KeyedPermutation

_KEPT_PASSES, _KEPT_WINDOWS = 8, 4


def mix_counts(batch_size: int, fraction: float) -> tuple[int, int]:
    """(real, generated) images of every batch: generated = floor(batch_size * fraction), as in DM_AT (512 -> 154 + 358)."""
    generated = int(batch_size * fraction + 1e-9)  # 100 * 0.29 is 28.999...
    return batch_size - generated, generated


@dataclass(frozen=True)
class SourceOrder:
    """The size of one source and how it is shuffled; shard s holds the samples starts[s] .. starts[s + 1] - 1."""

    count: int  # its images in every batch
    starts: tuple[int, ...]  # the last entry is the size of the source
    window: int | None = None  # shards that are shuffled together; None shuffles the whole source

    @property
    def size(self) -> int:
        """Training samples of the source."""
        return self.starts[-1]


class _WindowPass:
    """One pass by windows of shards."""

    def __init__(self, source: SourceOrder, seed: int, *names: int) -> None:
        assert source.window is not None
        starts = np.asarray(source.starts)
        num_shards = len(starts) - 1
        self._first, self._sizes = starts[:-1], np.diff(starts)
        shards = KeyedPermutation(num_shards, seed, "shards of a pass", *names)(np.arange(num_shards))
        self._shards = shards[self._sizes[shards] > 0]  # all samples of a shard may be held out
        self._bounds = [*range(0, len(self._shards), source.window), len(self._shards)]
        sizes = [int(self._sizes[self.shards(w)].sum()) for w in range(len(self._bounds) - 1)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_windows = len(sizes)
        self._permutation = lru_cache(_KEPT_WINDOWS)(lambda w: KeyedPermutation(sizes[w], seed, "window", *names, w))

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
        shards = self.shards(window)
        ends = np.cumsum(self._sizes[shards])
        inside = self._permutation(window)(places)
        shard = np.searchsorted(ends, inside, side="right")
        return self._first[shards[shard]] + inside - (ends[shard] - self._sizes[shards[shard]])


@dataclass(frozen=True)
class SamplePlan:
    """Which samples form global batch t; `seed` keys all permutations."""

    sources: tuple[SourceOrder, ...]
    seed: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Images of each source in every batch."""
        return tuple(source.count for source in self.sources)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source number [B] int64, sample [B] int64 in [0, size of the source)) of global batch `step`, from 0."""
        samples = [
            self._pass(number, pass_number)(places)
            for number in range(len(self.sources))
            for pass_number, places in self._places(number, step)
        ]
        numbers = np.repeat(np.arange(len(self.sources)), self.counts)
        order = KeyedPermutation(len(numbers), self.seed, "positions", step)(np.arange(len(numbers)))
        return numbers[order], np.concatenate(samples)[order]

    def shards_of(self, number: int, step: int) -> np.ndarray:
        """The shards of the windows from which batch `step` draws samples of source `number` (with windows), in order."""
        found = []
        for pass_number, places in self._places(number, step):
            order = self._window_pass(number, pass_number)
            found += [order.shards(int(window)) for window in np.unique(order.windows_of(places))]
        return np.concatenate(found)

    def shards_after(self, number: int, step: int, stop: int) -> np.ndarray:
        """The shards of the next window, to be fetched ahead; none if the batches before `stop` do not reach it."""
        pass_number, window = self._last_window(number, step)
        if (pass_number, window) == self._last_window(number, stop - 1):
            return np.zeros(0, np.int64)
        order = self._window_pass(number, pass_number)
        if window + 1 < order.num_windows:
            return order.shards(window + 1)
        return self._window_pass(number, pass_number + 1).shards(0)

    def _last_window(self, number: int, step: int) -> tuple[int, int]:
        """(pass, window) of the last sample of source `number` in batch `step`."""
        pass_number, places = list(self._places(number, step))[-1]
        return pass_number, int(self._window_pass(number, pass_number).windows_of(places[-1:])[0])

    def _places(self, number: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(pass, places in it) of the running sample numbers of batch `step`, in order."""
        source = self.sources[number]
        running = np.arange(step * source.count, (step + 1) * source.count)
        passes = running // source.size
        for pass_number in range(int(passes[0]), int(passes[-1]) + 1):
            yield pass_number, running[passes == pass_number] % source.size

    def _window_pass(self, number: int, pass_number: int) -> _WindowPass:
        order = self._pass(number, pass_number)
        assert isinstance(order, _WindowPass)
        return order

    @cached_property
    def _pass(self) -> Callable[[int, int], KeyedPermutation | _WindowPass]:
        """(source number, pass number) -> the order of that pass, a function of places; the last ones are kept."""

        @lru_cache(_KEPT_PASSES)
        def order_of(number: int, pass_number: int) -> KeyedPermutation | _WindowPass:
            source = self.sources[number]
            if source.window is None:
                return KeyedPermutation(source.size, self.seed, "pass", number, pass_number)
            return _WindowPass(source, self.seed, number, pass_number)

        return order_of
