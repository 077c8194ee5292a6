"""Read a pair of .npy files as memory maps: images and labels."""

from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import as_images, as_labels, file_facts, npy_array, one_hot_width, reading


def read_arrays(images: Path, labels: Path, classes: Classes) -> LabelledArrays:
    """`images` uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]; `labels` integers [N] or one-hot [N, K]."""
    pixels = as_images(_mapped(images), f"The array {images}")
    targets = _mapped(labels)
    numbers = as_labels(targets, len(pixels), f"The array {labels}")
    facts = [file_facts(path, ".npy file") for path in (images, labels)]
    return LabelledArrays.of(pixels, numbers, classes, facts, one_hot_width(targets))


def _mapped(path: Path) -> np.ndarray:
    with reading(path, ".npy file"):
        data = np.memmap(path, np.uint8, mode="r")
    if data[:2].tobytes() == b"PK":
        raise UserError(f"{path} is an npz file. Convert it with: python -m nrat_scale.prepare npz {path} --out DIR")
    return npy_array(data, f"The file {path}")
