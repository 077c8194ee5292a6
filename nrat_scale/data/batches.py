"""Planned samples -> batches of this rank: fetch, gather, in a thread of their own.

plan     step t -> source and sample number of each of the B positions      webdataset.DataPipeline
fetch    remote shards: those of this window are there, the next one's come  in the background
gather   this rank's positions -> uint8 images [b, C, H, W], labels [b]      out of memory maps
         or, where the images are on the device already, their rows [b]      see `resident`
pin      where there is a GPU
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from nrat_scale.data.augment import cutmix_partners
from nrat_scale.data.plan import SamplePlan
from nrat_scale.data.shards import ShardUnusable, concatenated
from nrat_scale.data.source import TrainingSource
from nrat_scale.data.spec import GENERATED
from nrat_scale.remote.transfer import Cancelled

T = TypeVar("T")
_FETCHES = 4  # at a time, for each remote source


@dataclass(frozen=True)
class Partners:
    """The CutMix partners of a batch: images as in `Batch`, labels int64 [b], global positions int64 [b]."""

    images: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's part of global batch `step`; `first` is its place in the global batch.

    Attributes:
        images: uint8 [b, C, H, W], in channels-last memory; where the images are resident, their rows int64 [b], which
            `TrainingData.augmented` looks up on the device.
        labels: int64 [b], as given.
        clean_labels: int64 [b], `UNKNOWN_LABEL` where unknown.
        generated: bool [b].
        ids: int64 [b], source ids.
        partners: where CutMix is used.
    """

    step: int
    first: int
    images: Tensor
    labels: Tensor
    clean_labels: Tensor
    generated: Tensor
    ids: Tensor
    partners: Partners | None = None

    @property
    def positions(self) -> Tensor:
        """int64 [b]: places in the global batch."""
        return torch.arange(self.first, self.first + len(self.labels))

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while it computes."""
        partners = self.partners
        if partners is not None:
            partners = replace(partners, images=partners.images.pin_memory(), labels=partners.labels.pin_memory())
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            clean_labels=self.clean_labels.pin_memory(),
            partners=partners,
        )


def to_nchw(images: np.ndarray) -> Tensor:
    """uint8 [n, H, W, C] -> the same memory as a tensor [n, C, H, W] (channels last): nothing is copied."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# ---- stages of the pipeline -----------------------------------------------------------------------------------------

Planned = tuple[int, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PlanStage:
    """Yields (step, sources [B], samples [B]); loader worker w of W takes every W-th step, which the loader puts in order."""

    plan: SamplePlan
    start: int
    stop: int

    def __call__(self) -> Iterator[Planned]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in range(self.start + first, self.stop, stride):
            yield (step, *self.plan.batch(step))


@dataclass(frozen=True)
class FetchStage:
    """Has the shards of the next window fetched while the ones before are used."""

    plan: SamplePlan
    sources: list[TrainingSource]
    stop: int

    def __call__(self, plans: Iterator[Planned]) -> Iterator[Planned]:
        ahead = {number: _Ahead(source) for number, source in enumerate(self.sources) if source.shards.is_remote}
        try:
            for planned in plans:
                for number, fetcher in ahead.items():
                    now = self.plan.shards_of(number, planned[0])
                    then = self.plan.shards_after(number, planned[0], self.stop)
                    fetcher.want([*now.tolist(), *then.tolist()])
                yield planned
        finally:
            for fetcher in ahead.values():
                fetcher.close()


class _Ahead:
    """Threads that fetch the shards of one source, in the order in which they are wanted."""

    def __init__(self, source: TrainingSource) -> None:
        self._source = source
        self._wanted: list[int] = []
        self._queue: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_FETCHES)]
        for thread in self._threads:
            thread.start()

    def want(self, numbers: list[int]) -> None:
        """Fetch these shards, and forget those wanted before that nobody began."""
        if numbers == self._wanted:
            return
        new = [number for number in numbers if number not in self._wanted]
        self._wanted = numbers
        # The processes of a node share one cache: each begins elsewhere, and finds the rest there.
        turn = int(os.environ.get("LOCAL_RANK", "0")) % max(1, len(new))
        with self._changed:
            begun = [number for number in self._queue if number in numbers]
            self._queue = deque([*begun, *new[turn:], *new[:turn]])
            self._changed.notify_all()

    def close(self) -> None:
        """Give up, and wait for the threads: a transfer stops at its next chunk and can be resumed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                number = self._queue.popleft()
            try:
                self._source.shards.fetch(number, stopped=lambda: self._closed)
            except Cancelled:
                return
            except ShardUnusable:
                continue  # the shards remember it, and whoever needs this one decides


@dataclass(frozen=True)
class GatherStage:
    """Turns the planned samples of this rank's slice into a `Batch`.

    Attributes:
        cutmix_seed: gather CutMix partners under this seed; None for no CutMix.
        first_rows: of each source among resident images, whose rows are gathered; None gathers pixels.
    """

    plan: SamplePlan
    sources: list[TrainingSource]
    rank: int
    world_size: int
    cutmix_seed: int | None = None
    first_rows: tuple[int, ...] | None = None

    def __call__(self, plans: Iterator[Planned]) -> Iterator[Batch]:
        for step, kinds, samples in plans:
            size = len(kinds) // self.world_size
            mine = np.arange(self.rank * size, (self.rank + 1) * size)
            positions = mine
            if self.cutmix_seed is not None:
                positions = np.concatenate([mine, cutmix_partners(len(kinds), self.cutmix_seed, step)[mine]])
            batch = self._gather(step, positions[0], kinds[positions], samples[positions])
            yield batch if self.cutmix_seed is None else _with_partners(batch, size, positions[size:])

    def _gather(self, step: int, first: int, kinds: np.ndarray, samples: np.ndarray) -> Batch:
        given, clean, ids, rows = (np.empty(len(kinds), np.int64) for _ in range(4))
        generated = np.zeros(len(kinds), bool)
        pixels: list[Iterator[memoryview]] = []
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(kinds == number)
            if self.first_rows is None:
                positions, views, given[here] = source.read(samples[here], self._near(number, step))
                pixels.append(iter(views))
            else:
                positions, given[here] = source.locate(samples[here], self._near(number, step))
                rows[here] = self.first_rows[number] + positions
            clean[here], ids[here] = source.clean_labels(positions), source.shards.source_ids(positions)
            generated[here] = source.kind == GENERATED
        images = torch.from_numpy(rows) if self.first_rows is not None else self._copied(pixels, kinds)
        labels, clean_labels, kind, source_ids = (torch.from_numpy(a) for a in (given, clean, generated, ids))
        return Batch(step, int(first), images, labels, clean_labels, kind, source_ids)

    def _copied(self, pixels: list[Iterator[memoryview]], kinds: np.ndarray) -> Tensor:
        """uint8 [m, C, H, W]: one copy, out of the memory maps; each source's images come in the order of their places."""
        images = concatenated([next(pixels[kind]) for kind in kinds.tolist()])
        return to_nchw(images.reshape(len(kinds), *self.sources[0].shards.image_shape))

    def _near(self, number: int, step: int) -> Callable[[], np.ndarray] | None:
        if self.plan.sources[number].window is None:
            return None
        return lambda: self.plan.shards_of(number, step)


def _with_partners(batch: Batch, size: int, positions: np.ndarray) -> Batch:
    """Split what was gathered together into the batch and its partners."""
    partners = Partners(batch.images[size:], batch.labels[size:], torch.from_numpy(positions))
    own = {name: getattr(batch, name)[:size] for name in ("images", "labels", "clean_labels", "generated", "ids")}
    return replace(batch, **own, partners=partners)
