"""The result of a reader: labelled images, class names, and facts about the input files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nrat_scale.core.errors import UserError, quoted, warn
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
class Classes:
    """What the class numbers of the input mean.

    Attributes:
        dataset: a key of `DATASETS`, which sets the names, or None.
        names: in label order, if `dataset` is None; empty: "0".."K-1", with K from the labels.
        start: the class number of the first class, 1 for labels 1..K.

    Raises:
        UserError: both `dataset` and `names` are given, or a name is empty or given twice.
    """

    dataset: str | None = None
    names: tuple[str, ...] = ()
    start: int = 0

    def __post_init__(self) -> None:
        if self.dataset is not None and self.names:
            raise UserError("--classes cannot be given with --dataset, which sets the class names. Omit one of them.")
        if any(not name.isprintable() or not name.strip() for name in self.names):
            raise UserError(f"--classes has an empty or unprintable name: {quoted(','.join(self.names))}.")
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"--classes has the name {quoted(twice)} twice. Each class needs a name of its own.")

    @property
    def known_names(self) -> tuple[str, ...]:
        """The names in label order; empty if they follow from the labels."""
        return DATASETS[self.dataset].class_names if self.dataset else self.names

    def check_no_gap(self, counts: np.ndarray) -> None:
        """Refuse a class without images, which label noise would fill; only warn if the class was named explicitly."""
        empty = np.flatnonzero(counts == 0).tolist()
        if not empty:
            return
        listed = ", ".join(str(label + self.start) for label in empty[:5]) + ", ..." * (len(empty) > 5)
        what = f"No image has the label{'s'[: len(empty) > 1]} {listed}"
        if self.known_names:
            name = self.known_names[empty[0]]
            warn(f"{what} (class {quoted(name)}{' and others' * (len(empty) > 1)}); label noise can still assign it.")
            return
        found = f"the labels go up to {len(counts) - 1 + self.start}"
        first = int(np.flatnonzero(counts)[0])
        if len(empty) == first and first + self.start <= 1:
            way_out = f"If the class numbers start at {first + self.start}, add --labels-start {first + self.start}."
        else:
            way_out = "Renumber the labels without gaps."
        raise UserError(
            f"{what}, but {found}. {way_out} To keep a class without images, name all classes: --classes NAME,NAME,..."
        )


NUMBERED = Classes()  # "0".."K-1"


@dataclass(frozen=True)
class LabelledArrays:
    """Images and labels to convert, in source order.

    Attributes:
        images: uint8 [N, H, W, C], an array or a memory map.
        labels: int64 [N].
        dataset: name of the data set (a key of `DATASETS`, or "custom").
        class_names: in label order; K of them.
        files: name, size and sha256 of each input file.
        note: what the reader did to the images, for the summary.

    Raises:
        UserError: images and labels do not match, or a label is not in 0..K-1.
    """

    images: ImageArray
    labels: np.ndarray
    dataset: str
    class_names: tuple[str, ...]
    files: tuple[dict[str, Any], ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"Images must have shape [N, H, W, C] with 1 or 3 channels and N > 0, not {list(shape)}.")
        if len(self.labels) != shape[0]:
            raise UserError(f"There are {shape[0]} images but {len(self.labels)} labels.")
        low, high, num_classes = int(self.labels.min()), int(self.labels.max()), len(self.class_names)
        if low < 0 or high >= num_classes:
            way_out = "Name the right data set with --dataset, or all classes with --classes."
            if low == 1 and high == num_classes:
                way_out = "If the class numbers start at 1, add --labels-start 1."
            raise UserError(
                f"Labels range from {low} to {high}, expected 0..{num_classes - 1} for the data set '{self.dataset}'. "
                + way_out
            )

    @classmethod
    def of(
        cls,
        images: ImageArray,
        labels: np.ndarray,
        classes: Classes,
        files: Sequence[dict[str, Any]],
        num_classes: int | None = None,
        note: str = "",
    ) -> "LabelledArrays":
        """With the class names of `classes`.

        Args:
            labels: int64 [N], class numbers from `classes.start`.
            num_classes: if the input states it, e.g. by the width of one-hot rows.

        Raises:
            UserError: as `LabelledArrays`, or a class has no image and was not named explicitly.
        """
        low, high = int(labels.min()), int(labels.max())
        if low < classes.start:
            raise UserError(f"Labels range from {low} to {high}, but --labels-start is {classes.start}. Give {low}.")
        labels = labels - classes.start
        if classes.dataset and len(DATASETS[classes.dataset].mean) != images.shape[3]:
            raise UserError(
                f"The images have {images.shape[3]} channel(s), expected {len(DATASETS[classes.dataset].mean)} for "
                f"'{classes.dataset}'. Name the right data set with --dataset, or omit --dataset."
            )
        width = max(high - classes.start + 1, num_classes or 0)
        names = classes.known_names or tuple(str(label + classes.start) for label in range(width))
        source = cls(images, labels, classes.dataset or "custom", names, tuple(files), note)
        classes.check_no_gap(np.bincount(labels, minlength=len(names)))
        return source
