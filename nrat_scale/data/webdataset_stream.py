"""Batches by the standard pipeline of the webdataset library, for comparison: `data.loader: webdataset`.

Each pass reads every shard of the rank once, in a shuffled order, through a shuffle buffer. Unlike the sample plan, the
samples of a step depend on the number of ranks, and a resumed run begins a new pass.
"""

import itertools
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
import webdataset

from nrat_scale.core.errors import UserError
from nrat_scale.core.seeds import KeyedPermutation, derive
from nrat_scale.data.batches import Batch, to_nchw
from nrat_scale.data.source import TrainingSource
from nrat_scale.data.spec import GENERATED

_SHUFFLE_BUFFER = 10_000  # samples

Sample = tuple[np.ndarray, int, int, int]  # image, given label, clean label, source id


@dataclass(frozen=True)
class WebDatasetBatches:
    """This rank's batches; `counts` are the images of each source in every global batch."""

    sources: list[TrainingSource]
    counts: tuple[int, ...]
    seed: int
    rank: int
    world_size: int

    def __call__(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches `start` .. `stop` - 1."""
        counts = [count // self.world_size for count in self.counts]
        streams = [self._samples(source, start) for source in self.sources]
        for step in range(start, stop):
            rows = [(number, *next(streams[number])) for number, count in enumerate(counts) for _ in range(count)]
            order = KeyedPermutation(len(rows), self.seed, "positions", step)(np.arange(len(rows)))
            numbers, images, given, clean, ids = zip(*(rows[i] for i in order), strict=True)
            generated = [self.sources[number].kind == GENERATED for number in numbers]
            places = torch.arange(self.rank * len(rows), (self.rank + 1) * len(rows))
            columns: Any = map(torch.tensor, (given, clean, generated, ids))
            yield Batch(step, places, to_nchw(np.stack(images)), *columns).pinned()

    def _samples(self, source: TrainingSource, start: int) -> Iterator[Sample]:
        """The samples of one source, pass after pass."""
        shards = [str(number) for number in range(len(source.shards.names))]
        if len(shards) < self.world_size:
            raise UserError(
                f"data.loader webdataset gives whole shards to processes: {len(shards)} shards of the {source.kind} data are "
                f"too few for {self.world_size} processes. Use data.loader: indexed, or smaller shards."
            )
        for number in itertools.count():
            seed = derive(self.seed, "webdataset", source.kind, start, number)
            first: dict[str, int] = {}  # file -> position of the first image of its next block
            yield from webdataset.DataPipeline(
                webdataset.SimpleShardList(shards),
                webdataset.shuffle(len(shards), rng=random.Random(seed)),
                webdataset.split_by_node,
                partial(_located, source, first),
                webdataset.tarfile_to_samples(),
                partial(_unpacked, source, first),
                webdataset.shuffle(_SHUFFLE_BUFFER, rng=random.Random(seed + 1)),
            )


def _located(
    source: TrainingSource, first: dict[str, int], shards: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Shard numbers -> verified local files."""
    for shard in shards:
        number = int(shard["url"])
        path = str(source.shards.fetch(number))
        first[path] = int(source.shards.shard_starts[number])
        yield {"url": path}


def _unpacked(source: TrainingSource, first: dict[str, int], blocks: Iterator[dict[str, Any]]) -> Iterator[Sample]:
    """Blocks -> the samples that are trained on."""
    for block in blocks:
        images = np.load(BytesIO(block["images.npy"]), allow_pickle=False)
        positions = first[block["__url__"]] + np.arange(len(images))
        first[block["__url__"]] += len(images)
        given, clean = source.given_labels(positions), source.clean_labels(positions)
        ids = source.shards.source_ids(positions)
        for row in np.flatnonzero(~np.isin(positions, source.untrained)):
            yield images[row], int(given[row]), int(clean[row]), int(ids[row])
