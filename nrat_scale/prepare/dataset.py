"""Write shards from Python: any torch or torchvision data set, or a pair of arrays."""

from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import as_images, as_labels, one_hot_width
from nrat_scale.prepare.readers.images import gather
from nrat_scale.prepare.writer import convert

_IMAGE_KEYS, _LABEL_KEYS = ("image", "img", "pixel_values"), ("label", "labels", "target")
_ROUNDING = 1e-3  # of 255: float32 images that were divided by 255 come back within this


def write_shards(
    dataset: Any, folder: str | Path, *, classes: Sequence[str] | None = None, known: str | None = None, **options: Any
) -> Path:
    """Write `dataset` as shards into the new folder `folder`; returns it.

    Args:
        dataset: `(images, labels)` arrays or tensors (uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]; integers [N]), or a
            data set whose items are `(image, label)`, or dicts with `image` and `label`. An image is a PIL image (grey or
            RGB), an array uint8 [H, W, C] or [H, W], a tensor uint8 [C, H, W], or floats that are multiples of 1/255 in
            [0, 1], as `ToTensor` returns. All images have one shape.
        classes: names of all classes in label order; by default `dataset.classes`, else the numbers.
        known: name of a known data set (a key of `nrat_scale.datasets.DATASETS`), which sets names and normalisation.
        options: `block_size`, `shard_size`, `seed`, `progress`, as `python -m nrat_scale.prepare` has them.

    Raises:
        UserError: images or labels are not as above, a class has no image and was not named, or `folder` is not new.
    """
    if isinstance(dataset, LabelledArrays):
        convert(lambda scratch: dataset, Path(folder), **options)
        return Path(folder)
    if classes is None and known is None:
        classes = getattr(dataset, "classes", None)
    if classes is not None and (isinstance(classes, str) or not all(isinstance(name, str) for name in classes)):
        raise UserError(f"classes is {classes!r}, expected a list of names, one for each class.")
    named = Classes(known, tuple(classes or ()))
    convert(lambda scratch: _read(dataset, named, scratch), Path(folder), **options)
    return Path(folder)


def _read(dataset: Any, classes: Classes, scratch: Path) -> LabelledArrays:
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(hasattr(part, "shape") for part in dataset):
        pixels, targets = (np.asarray(part) for part in dataset)
        images = as_images(_as_bytes(pixels, "images"), "images")
        labels = as_labels(targets, len(images), "labels")
        return LabelledArrays.of(images, labels, classes, [], one_hot_width(targets))
    labels_read: list[int] = []

    def decoded() -> Iterator[tuple[np.ndarray, str]]:
        for number, item in enumerate(_items(dataset)):
            image, label = _parts(item, f"Item {number}")
            labels_read.append(_label(label, f"The label of item {number}"))
            yield _pixels(image, f"The image of item {number}"), f"The image of item {number}"

    total = len(dataset) if isinstance(dataset, Sized) else None
    if total == 0:
        raise UserError("The data set is empty.")
    images = gather(decoded(), scratch, total)
    return LabelledArrays.of(images, np.array(labels_read, np.int64), classes, [])


def _items(dataset: Any) -> Iterator[Any]:
    """Every item once; a map-style data set need not raise IndexError at its end."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, type):
        return (dataset[number] for number in range(len(dataset)))
    try:
        return iter(dataset)
    except TypeError:
        expected = "(images, labels), or a data set with __len__ and __getitem__"
        raise UserError(f"A {type(dataset).__name__} is not a data set. Expected {expected}.") from None


def _parts(item: Any, where: str) -> tuple[Any, Any]:
    if isinstance(item, dict):
        image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
        if image is not None and label is not None:
            return image, label
        raise UserError(f"{where} has the keys {', '.join(map(str, item))}, expected `image` and `label`.")
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise UserError(f"{where} is a {type(item).__name__}, expected (image, label).")
    return item[0], item[1]


def _label(label: Any, where: str) -> int:
    value = label.item() if getattr(label, "shape", None) == () else label
    if type(value) is bool or not isinstance(value, int | np.integer):
        raise UserError(f"{where} is {str(label)[:60]} ({type(label).__name__}), expected a class number.")
    return int(value)


def _pixels(image: Any, where: str) -> np.ndarray:
    """uint8 [H, W, C]."""
    if hasattr(image, "getbands"):  # a PIL image
        if image.mode not in ("L", "RGB"):
            raise UserError(f"{where} has mode {image.mode}, expected L or RGB. Convert it first.")
        return np.asarray(image).reshape(image.height, image.width, -1)
    is_tensor = hasattr(image, "numpy") and hasattr(image, "dim")
    array = _as_bytes(np.asarray(image), where)
    if is_tensor and array.ndim == 3:  # [C, H, W]
        array = array.transpose(1, 2, 0)
    return as_images(array[None], where)[0]


def _as_bytes(array: np.ndarray, where: str) -> np.ndarray:
    """`array` itself if it is not of floats, else as uint8, if that is exact."""
    if array.dtype.kind != "f":
        return array
    scaled = array.astype(np.float32) * 255
    rounded = np.rint(scaled)
    if not (np.isfinite(scaled).all() and (np.abs(scaled - rounded) <= 255 * _ROUNDING).all()):
        low, high = float(array.min()), float(array.max())
        raise UserError(
            f"{where} has floats from {low:.3g} to {high:.3g} that are not multiples of 1/255. Give uint8 images, without "
            "Normalize or random augmentation."
        )
    if rounded.min() < 0 or rounded.max() > 255:
        raise UserError(f"{where} has floats from {array.min():.3g} to {array.max():.3g}, expected [0, 1].")
    return rounded.astype(np.uint8)
