"""The result of a reader: labelled images, class names, and facts about the input files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.datasets import DATASETS


class ImageArray(Protocol):
    """Images that are read when they are indexed: integer rows [m] give uint8 [m, H, W, C]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Concatenated:
    """Several arrays uint8 [n_i, H, W, C] as one, without copying them: memory maps stay on disk."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])

    def __getitem__(self, rows: Any) -> np.ndarray:
        """uint8 [m, H, W, C] of `rows` (integers [m] in [0, N))."""
        rows = np.asarray(rows, dtype=np.int64)
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        number = np.searchsorted(self._ends, rows, side="right")
        for i in np.unique(number):
            here, array = number == i, self._arrays[i]
            out[here] = array[rows[here] - (self._ends[i] - len(array))]
        return out


@dataclass(frozen=True)
class LabelledArrays:
    """Images and labels to convert, in source order.

    Attributes:
        images: uint8 [N, H, W, C], an array or a memory map.
        labels: int64 [N].
        dataset: name of the data set (a key of `DATASETS`, or "custom").
        class_names: in label order; K of them.
        files: name, size and sha256 of each input file.

    Raises:
        UserError: images and labels do not match, or a label is not in 0..K-1.
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
        low, high, num_classes = int(self.labels.min()), int(self.labels.max()), len(self.class_names)
        if low < 0 or high >= num_classes:
            raise UserError(
                f"Labels range from {low} to {high}, expected 0..{num_classes - 1} for the data set '{self.dataset}'. "
                "Name the right data set with --dataset."
            )

    @classmethod
    def of(
        cls, images: ImageArray, labels: np.ndarray, dataset: str | None, files: Sequence[dict[str, Any]]
    ) -> "LabelledArrays":
        """With the class names of `dataset`, or "0".."K-1" if it is None."""
        if dataset is None:
            names = tuple(str(label) for label in range(int(labels.max()) + 1))
            return cls(images, labels, "custom", names, tuple(files))
        known, channels = DATASETS[dataset], images.shape[3]
        if len(known.mean) != channels:
            raise UserError(
                f"The images have {channels} channel(s), expected {len(known.mean)} for '{dataset}'. Name the right data "
                "set with --dataset, or omit --dataset."
            )
        return cls(images, labels, dataset, known.class_names, tuple(files))
