"""Gather this rank's batches, as the sample plan names them, out of memory maps or of resident images."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nrat_scale.data.augment import cutmix_partners
from nrat_scale.data.plan import SamplePlan
from nrat_scale.data.prefetch import ShardPrefetcher
from nrat_scale.data.resident import ResidentImages
from nrat_scale.data.shards import concatenated
from nrat_scale.data.source import TrainingSource
from nrat_scale.data.spec import GENERATED


@dataclass(frozen=True)
class Batch:
    """This rank's part of global batch `step`."""

    step: int
    places: Tensor  # int64 [b] in the global batch; consecutive, but for `partners`
    images: Tensor  # uint8 [b, C, H, W] in channels-last memory, on the device if the images are resident
    labels: Tensor  # int64 [b], as given
    clean_labels: Tensor  # int64 [b], `UNKNOWN_LABEL` if unknown
    generated: Tensor  # bool [b]
    ids: Tensor  # int64 [b], source ids
    image_numbers: Tensor  # int64 [b]: positions in their source, counted on from the images of the sources before
    weights: Tensor | None = None  # float32 [b], of each sample's loss; None: 1 for all
    partners: "Batch | None" = None  # the images that CutMix mixes in; None without CutMix

    @property
    def first(self) -> int:
        """The first place in the global batch."""
        return int(self.places[0])

    def rows(self, start: int, stop: int) -> "Batch":
        """The samples `start` .. `stop` - 1 of the batch."""
        return self._mapped(lambda column: column[start:stop])

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies asynchronously; unchanged without a GPU."""
        if not torch.cuda.is_available():
            return self
        pinned = self._mapped(lambda column: column if column.is_cuda else column.pin_memory())
        return replace(pinned, partners=self.partners and self.partners.pinned())

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        columns: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **columns)


def to_nchw(images: np.ndarray) -> Tensor:
    """uint8 [n, H, W, C] -> the same memory as a tensor [n, C, H, W] (channels last), without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PlannedBatches:
    """This rank's batches of a sample plan."""

    plan: SamplePlan
    sources: list[TrainingSource]
    rank: int
    world_size: int
    cutmix_seed: int | None  # None gathers no partners
    resident: ResidentImages | None  # None reads pixels out of memory maps

    def __call__(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches `start` .. `stop` - 1, while the shards of the next window are fetched in the background."""
        remote = {n: ShardPrefetcher(source.shards) for n, source in enumerate(self.sources) if source.shards.is_remote}
        try:
            for step in range(start, stop):
                for number, prefetcher in remote.items():
                    now, after = self.plan.shards_of(number, step), self.plan.shards_after(number, step, stop)
                    prefetcher.want([*now.tolist(), *after.tolist()])
                yield self.batch(step).pinned()
        finally:
            for prefetcher in remote.values():
                prefetcher.close()

    def batch(self, step: int) -> Batch:
        """This rank's part of global batch `step`."""
        numbers, samples = self.plan.batch(step)
        size = len(numbers) // self.world_size
        own = np.arange(self.rank * size, (self.rank + 1) * size)
        if self.cutmix_seed is None:
            return self._gathered(step, own, numbers[own], samples[own])
        # Partners are gathered together with the batch, in one pass over the memory maps.
        places = np.concatenate([own, cutmix_partners(len(numbers), self.cutmix_seed, step)[own]])
        both = self._gathered(step, places, numbers[places], samples[places])
        return replace(both.rows(0, size), partners=both.rows(size, 2 * size))

    def _gathered(self, step: int, places: np.ndarray, numbers: np.ndarray, samples: np.ndarray) -> Batch:
        given, clean, ids, rows, image_numbers = (np.empty(len(places), np.int64) for _ in range(5))
        generated = np.zeros(len(places), bool)
        weights = np.ones(len(places), np.float32) if any(source.is_weighted for source in self.sources) else None
        pixels: list[Iterator[memoryview]] = []
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(numbers == number)
            windowed = self.plan.sources[number].window is not None
            near = partial(self.plan.shards_of, number, step) if windowed else None
            if self.resident is None:
                positions, (views, stored) = source.read(samples[here], source.shards.rows, near)
                pixels.append(iter(views))
            else:
                # Read the labels even if `given` replaces them, to find bad shards as without resident images.
                positions, stored = source.read(samples[here], source.shards.labels, near)
                rows[here] = self.resident.first_rows[number] + positions
            given[here] = source.acted_labels(positions, stored if source.given is None else source.given[positions])
            if weights is not None:
                weights[here] = source.weights(positions)
            clean[here], ids[here] = source.clean_labels(positions), source.shards.source_ids(positions)
            generated[here] = source.kind == GENERATED
            image_numbers[here] = positions + sum(len(earlier.shards) for earlier in self.sources[:number])
        if self.resident is None:  # one copy out of the memory maps, in the order of the places
            copied = concatenated([next(pixels[number]) for number in numbers.tolist()])
            images = to_nchw(copied.reshape(len(numbers), *self.sources[0].shards.image_shape))
        else:
            images = self.resident.gather(rows)
        columns: Any = [torch.from_numpy(column) for column in (given, clean, generated, ids, image_numbers)]
        weighted = None if weights is None else torch.from_numpy(weights)
        return replace(Batch(step, torch.from_numpy(places), images, *columns), weights=weighted)
