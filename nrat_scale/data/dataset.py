"""Shards as a map-style torch data set, for notebooks and other training code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards as open_shard_set


class ShardDataset(Dataset):
    """The samples of shards in source order, as `(image, label)`.

    Attributes:
        shards: the `ShardSet`, with `image_shape`, `fingerprint` and everything else that the index states.
        classes: class names in label order.
        targets: int64 [N]: all labels, as stored.
        transform: applied to each image, or None.
    """

    def __init__(self, where: str | Path, transform: Callable[[Tensor], Any] | None = None) -> None:
        self.shards = open_shard_set(where)
        self.shards.verify()
        self.transform = transform
        self.classes = list(self.shards.class_names)
        self._positions = self.shards.in_source_order()
        self.targets = torch.from_numpy(self.shards.labels(self._positions))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """(uint8 [C, H, W], or what `transform` makes of it; label)."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        position = self._positions[[number]]
        image = torch.from_numpy(np.ascontiguousarray(self.shards.images(position)[0].transpose(2, 0, 1)))
        return image if self.transform is None else self.transform(image), int(self.targets[number])


def open_shards(where: str | Path, transform: Callable[[Tensor], Any] | None = None) -> ShardDataset:
    """The shards at `where` (a folder, or an https://, s3:// or hf:// address), verified, as a map-style data set.

    Args:
        transform: called with each image, uint8 [C, H, W].

    Raises:
        UserError: no shards there, or damaged ones.
    """
    if not isinstance(where, str | Path):
        raise UserError(f"open_shards needs a path or an address, not {type(where).__name__}.")
    return ShardDataset(where, transform)
