"""Batches by the standard pipeline of the webdataset library, for comparison: `data.loader: webdataset`.

Each pass reads every shard of the rank once, in a shuffled order, through a shuffle buffer. Unlike the sample plan, the
samples of a step depend on the number of ranks, and a resumed run begins a new pass.
"""

import itertools
import random
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
import webdataset

from nrat_scale.core.errors import UserError
from nrat_scale.core.seeds import KeyedPermutation, derive
from nrat_scale.data.batches import Batch, to_nchw
from nrat_scale.data.plan import SamplePlan
from nrat_scale.data.source import TrainingSource
from nrat_scale.data.spec import GENERATED

_SHUFFLE_BUFFER = 10_000  # samples

Record = dict[str, Any]  # webdataset's: a shard or a block
Sample = tuple[
    np.ndarray, int, int, int, int, float
]  # image, given, clean label, source id, position, weight of its loss


def webdataset_batches(
    sources: list[TrainingSource], plan: SamplePlan, rank: int, world_size: int, start: int, stop: int
) -> Generator[Batch, None, None]:
    """This rank's batches `start` .. `stop` - 1, with the counts and the seed of `plan`."""
    for source in sources:
        if len(source.shards.names) < world_size:
            raise UserError(
                f"data.loader webdataset needs a shard for each of {world_size} processes, but the {source.kind} data have "
                f"{len(source.shards.names)}. Use data.loader: indexed, or smaller shards."
            )
    counts = [count // world_size for count in plan.counts]
    streams = [_samples(source, plan.seed, start) for source in sources]
    for step in range(start, stop):
        rows = [(number, *next(streams[number])) for number, count in enumerate(counts) for _ in range(count)]
        order = KeyedPermutation(len(rows), plan.seed, "positions", step)(np.arange(len(rows)))
        numbers, images, given, clean, ids, positions, weights = zip(*(rows[i] for i in order), strict=True)
        generated = [sources[number].kind == GENERATED for number in numbers]
        places = torch.arange(rank * len(rows), (rank + 1) * len(rows))
        firsts = [sum(len(earlier.shards) for earlier in sources[:number]) for number in numbers]
        image_numbers = [first + position for first, position in zip(firsts, positions, strict=True)]
        columns: Any = [torch.tensor(column) for column in (given, clean, generated, ids, image_numbers)]
        weighted = torch.tensor(weights) if any(source.is_weighted for source in sources) else None
        yield replace(Batch(step, places, to_nchw(np.stack(images)), *columns), weights=weighted).pinned()


def _samples(source: TrainingSource, plan_seed: int, start: int) -> Iterator[Sample]:
    """The samples of one source, pass after pass."""
    shards = [str(number) for number in range(len(source.shards.names))]
    for number in itertools.count():
        seed = derive(plan_seed, "webdataset", source.kind, start, number)
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


def _located(source: TrainingSource, first: dict[str, int], shards: Iterator[Record]) -> Iterator[Record]:
    """Shard numbers -> verified local files."""
    for shard in shards:
        number = int(shard["url"])
        path = str(source.shards.fetch(number))
        first[path] = int(source.shards.shard_starts[number])
        yield {"url": path}


def _unpacked(source: TrainingSource, first: dict[str, int], blocks: Iterator[Record]) -> Iterator[Sample]:
    """Blocks -> the samples that are trained on."""
    for block in blocks:
        images = np.load(BytesIO(block["images.npy"]), allow_pickle=False)
        positions = first[block["__url__"]] + np.arange(len(images))
        first[block["__url__"]] += len(images)
        given, clean = source.given_labels(positions), source.clean_labels(positions)
        ids, weights = source.shards.source_ids(positions), source.weights(positions)
        for row in np.flatnonzero(~np.isin(positions, source.untrained)):
            facts = (int(column[row]) for column in (given, clean, ids, positions))
            yield (images[row], *facts, float(weights[row]))
