"""Keep the images of all sources in device memory, and gather batches there."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nrat_scale.data.shards import ShardUnusable
from nrat_scale.data.source import TrainingSource


@dataclass(frozen=True)
class ResidentImages:
    """All images of a run's sources, held-out ones too, by position, one source after the other."""

    images: Tensor  # uint8 [N, H, W, C] on the device
    first_rows: tuple[int, ...]  # row of each source's first image

    def gather(self, rows: np.ndarray) -> Tensor:
        """uint8 [b, C, H, W] on the device, in channels-last memory, of the rows int64 [b]; only `rows` is copied there."""
        on_host = torch.from_numpy(rows)
        if self.images.device.type == "cuda":
            on_host = on_host.pin_memory()
        return self.images[on_host.to(self.images.device, non_blocking=True)].permute(0, 3, 1, 2)


def image_bytes(sources: Sequence[TrainingSource]) -> int:
    """The size of all images of `sources`."""
    return sum(len(source.shards) * int(np.prod(source.shards.image_shape)) for source in sources)


def load_images(sources: Sequence[TrainingSource], device: torch.device) -> ResidentImages:
    """Copy the images of local `sources` to `device`; the host holds one shard of them at a time.

    If bad shards may be skipped, the rows of a shard that cannot be opened stay unwritten and the shard counts as
    unusable from then on, so that its samples are replaced as without resident images. Otherwise raises `ShardUnusable`.
    """
    *first_rows, size = itertools.accumulate((len(source.shards) for source in sources), initial=0)
    images = torch.empty((size, *sources[0].shards.image_shape), dtype=torch.uint8, device=device)
    for source, first in zip(sources, first_rows, strict=True):
        shards = source.shards
        for number, (start, stop) in enumerate(itertools.pairwise(shards.shard_starts.tolist())):
            try:
                shards.open(number)
            except ShardUnusable as error:
                if source.log.limit == 0:
                    raise
                shards.unusable[number] = error
                continue
            images[first + start : first + stop].copy_(torch.from_numpy(shards.images(np.arange(start, stop))))
    return ResidentImages(images, tuple(first_rows))
