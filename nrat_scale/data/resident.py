"""The images of all sources in the memory of the device that trains, where batches are gathered."""

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


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a GPU; None for other devices, which gain nothing over memory maps."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def load_images(sources: Sequence[TrainingSource], device: torch.device) -> ResidentImages:
    """Copy the images of local `sources` to `device`; the host holds one shard of them at a time.

    If bad shards may be skipped, the rows of a shard that cannot be opened stay unwritten and the shard counts as
    unusable from then on, so that its samples are replaced as without resident images.

    Raises:
        ShardUnusable: a shard cannot be used and may not be skipped.
    """
    sizes = [len(source.shards) for source in sources]
    first_rows = tuple(sum(sizes[:number]) for number in range(len(sizes)))
    images = torch.empty((sum(sizes), *sources[0].shards.image_shape), dtype=torch.uint8, device=device)
    for source, first, size in zip(sources, first_rows, sizes, strict=True):
        _copy_shards(source, images[first : first + size])
    return ResidentImages(images, first_rows)


def _copy_shards(source: TrainingSource, images: Tensor) -> None:
    """Write the images of one source to `images`, uint8 [len(source.shards), H, W, C], shard by shard."""
    shards = source.shards
    for number, (start, stop) in enumerate(zip(shards.shard_starts[:-1], shards.shard_starts[1:], strict=True)):
        try:
            shards.open(number)
        except ShardUnusable as error:
            if source.log.limit == 0:
                raise
            shards.unusable[number] = error
            continue
        images[start:stop].copy_(torch.from_numpy(shards.images(np.arange(start, stop))))
