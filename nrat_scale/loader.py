"""Planned samples -> batches of this rank: fetch, gather, in a thread of their own.

plan     step t -> source and sample number of each of the B positions      webdataset.DataPipeline
fetch    remote shards: those of this window are there, the next one's come  in the background
gather   this rank's positions -> uint8 images [b, C, H, W], labels [b]      out of memory maps
         or, where the images are on the device already, their rows [b]      see `resident`
pin      where there is a GPU
"""

import itertools
import os
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import get_worker_info

from nrat_scale.augment import cutmix_partners
from nrat_scale.errors import UserError
from nrat_scale.fetch import Stopped
from nrat_scale.sampling import SamplePlan
from nrat_scale.seeds import KeyedPermutation, derive
from nrat_scale.shards import ShardUnusable, joined
from nrat_scale.sources import GENERATED, TrainingSource

T = TypeVar("T")
_PREFETCHED = 4  # batches
_FETCHES = 4  # at a time, for each remote source
_SHUFFLE_BUFFER = 10_000  # samples, of the webdataset loader


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
            except Stopped:
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
        images = joined([next(pixels[kind]) for kind in kinds.tolist()])
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


def pin(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Page-locked batches where there is a GPU."""
    return (batch.pinned() for batch in batches) if torch.cuda.is_available() else batches


# ---- one thread ahead -----------------------------------------------------------------------------------------------


@dataclass
class _Raised:
    error: BaseException


_END: Any = object()


def prefetched(items: Callable[[], Iterator[T]], depth: int = _PREFETCHED) -> Iterator[T]:
    """What `items()` yields, computed up to `depth` items ahead in one thread, which ends with this generator."""
    waiting: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = items()
        try:
            for item in iterator:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the item
            put(_Raised(error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()


# ---- the standard webdataset pipeline, for comparison ----------------------------------------------------------------


@dataclass(frozen=True)
class WebDatasetStream:
    """Batches by webdataset's own shuffling, in one process a rank: `data.loader: webdataset`.

    Each pass reads every shard of the rank once, in a shuffled order, through a shuffle buffer. What it lacks beside the
    plan: samples of a step depend on the number of ranks, and a resumed run begins a new pass.
    """

    sources: list[TrainingSource]
    counts: tuple[int, ...]
    seed: int
    start: int
    stop: int
    rank: int
    world_size: int

    def __call__(self) -> Iterator[Batch]:
        counts = [count // self.world_size for count in self.counts]
        streams = [self._samples(source) for source in self.sources]
        for step in range(self.start, self.stop):
            rows = [(number, *next(streams[number])) for number, count in enumerate(counts) for _ in range(count)]
            order = KeyedPermutation(len(rows), self.seed, "positions", step)(np.arange(len(rows)))
            kinds, images, given, clean, ids = zip(*(rows[i] for i in order), strict=True)
            generated = np.asarray([self.sources[kind].kind == GENERATED for kind in kinds])
            labels, clean_labels, kind, source_ids = (
                torch.from_numpy(np.asarray(a)) for a in (given, clean, generated, ids)
            )
            images_nchw = to_nchw(np.stack(images))
            yield Batch(step, self.rank * len(rows), images_nchw, labels, clean_labels, kind, source_ids)

    def _samples(self, source: TrainingSource) -> Iterator[tuple[np.ndarray, int, int, int]]:
        """(image, given label, clean label, source id) of one source, pass after pass."""
        shards = [str(number) for number in range(len(source.shards.names))]
        if len(shards) < self.world_size:
            raise UserError(
                f"data.loader webdataset gives whole shards to processes: {len(shards)} of the {source.kind} data are too "
                f"few for {self.world_size}. Use the indexed loader, or smaller shards."
            )
        for number in itertools.count():
            seed = derive(self.seed, "webdataset", source.kind, self.start, number)
            blocks = _Blocks(source)
            yield from webdataset.DataPipeline(
                webdataset.SimpleShardList(shards),
                webdataset.shuffle(len(shards), rng=random.Random(seed)),
                webdataset.split_by_node,
                blocks.located,
                webdataset.tarfile_to_samples(),
                blocks.unpacked,
                webdataset.shuffle(_SHUFFLE_BUFFER, rng=random.Random(seed + 1)),
            )


class _Blocks:
    """The two stages of ours in one pass of the webdataset pipeline."""

    def __init__(self, source: TrainingSource) -> None:
        self._source = source
        self._next: dict[str, int] = {}  # file -> position of the first image of its next block

    def located(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Numbers of shards -> verified local files."""
        for shard in shards:
            number = int(shard["url"])
            path = str(self._source.shards.fetch(number))
            self._next[path] = int(self._source.shards.shard_starts[number])
            yield {"url": path}

    def unpacked(self, blocks: Iterator[dict[str, Any]]) -> Iterator[tuple[np.ndarray, int, int, int]]:
        """Blocks -> (image, given label, clean label, source id) of the samples that are trained on."""
        source = self._source
        for block in blocks:
            images = np.load(BytesIO(block["images.npy"]), allow_pickle=False)
            first = self._next[block["__url__"]]
            self._next[block["__url__"]] = first + len(images)
            positions = np.arange(first, first + len(images))
            given, clean = source.given_labels(positions), source.clean_labels(positions)
            ids = source.shards.source_ids(positions)
            for row in np.flatnonzero(~np.isin(positions, source.left_out)):
                yield images[row], int(given[row]), int(clean[row]), int(ids[row])
