"""What a reader gives to the writer: images, labels, class names and facts of the input files."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nrat_scale.core.errors import UserError


class ImageArray(Protocol):
    """What can be converted: anything that gives uint8 [m, H, W, C] for integer ids [m]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, ids: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class LabelledArrays:
    """Images and labels to convert, in source order.

    Attributes:
        images: uint8 [N, H, W, C], an array or a memory map.
        labels: int64 [N].
        dataset: name of the data set (a key of `DATASETS` where it is known).
        class_names: in label order; their number is K.
        files: name, size and sha256 of each file that was read.
    """

    images: ImageArray
    labels: np.ndarray
    dataset: str
    class_names: tuple[str, ...]
    files: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"Images must have shape [N, H, W, C] with 1 or 3 channels and N > 0, not {list(shape)}.")
        if len(self.labels) != shape[0]:
            raise UserError(f"There are {shape[0]} images but {len(self.labels)} labels.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(
                f"Labels range from {low} to {high}, but the data set '{self.dataset}' has {len(self.class_names)} classes: "
                f"they must lie in 0..{len(self.class_names) - 1}. Name the right data set with --dataset."
            )
