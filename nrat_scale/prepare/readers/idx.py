"""Read IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.checks import COPY_AGAIN, as_labels, file_facts, reading

_MAGIC = {"images": 0x803, "labels": 0x801}  # unsigned bytes in three dimensions, in one dimension


def read_idx(images: Path, labels: Path, dataset: str | None) -> LabelledArrays:
    """An IDX file of images and one of labels, plain or gzipped."""
    pixels = _read_idx(images, "images")
    targets = as_labels(_read_idx(labels, "labels"), len(pixels), f"The IDX file of labels {labels}")
    files = [file_facts(path, "IDX file") for path in (images, labels)]
    return LabelledArrays.of(pixels[..., None], targets, dataset, files)


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """uint8 [N, H, W] (kind "images") or [N] (kind "labels")."""
    what, magic = f"IDX file of {kind}", _MAGIC[kind]
    with reading(path, what):
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    num_dims, found = magic & 0xFF, int.from_bytes(content[:4], "big")
    start = 4 * (1 + num_dims)
    if len(content) < start or found != magic:
        wrong = f"begins with {found:#x}, expected {magic:#x}"
        raise UserError(f"The {what} {path} {wrong}. Give the images first, then the labels.")
    shape = struct.unpack_from(f">{num_dims}I", content, 4)
    if min(shape) < 1 or len(content) - start != math.prod(shape):
        wrong = (
            f"its header states {list(shape)}, that is {math.prod(shape)} bytes, but there are {len(content) - start}"
        )
        raise UserError(f"The {what} {path} is damaged: {wrong}. {COPY_AGAIN}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
