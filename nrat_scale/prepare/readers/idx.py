"""Read IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import COPY_AGAIN, as_labels, file_facts, reading

_MAGIC = {"images": 0x803, "labels": 0x801}  # unsigned bytes in three dimensions, in one dimension


def read_idx(images: Path, labels: Path, classes: Classes) -> LabelledArrays:
    """An IDX file of images and one of labels, plain or gzipped."""
    pixels = _read_idx(images, "images")
    targets = as_labels(_read_idx(labels, "labels"), len(pixels), f"The IDX file of labels {labels}")
    files = [file_facts(path, "IDX file") for path in (images, labels)]
    return LabelledArrays.of(pixels[..., None], targets, classes, files)


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """uint8 [N, H, W] (kind "images") or [N] (kind "labels")."""
    what, magic = f"IDX file of {kind}", _MAGIC[kind]
    num_dims = magic & 0xFF
    with reading(path, what), open(path, "rb") as file:
        stream: Any = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
        header = stream.read(4 * (1 + num_dims))
        found = int.from_bytes(header[:4], "big")
        if len(header) < 4 * (1 + num_dims) or found != magic:
            wrong = f"begins with {found:#x}, expected {magic:#x}"
            raise UserError(f"The {what} {path} {wrong}. Give the images first, then the labels.")
        shape = struct.unpack(f">{num_dims}I", header[4:])
        # The header's size is not trusted; gzip expands at most 1032 times, so the file bounds memory.
        size = math.prod(shape)
        data = stream.read(min(size + 1, 1100 * path.stat().st_size))  # one more byte, to detect a longer file
    if min(shape) < 1 or len(data) != size:
        wrong = f"states {list(shape)}, that is {size} bytes, but there are {len(data) if len(data) < size else 'more'}"
        raise UserError(f"The {what} {path} is damaged: its header {wrong}. {COPY_AGAIN}")
    return np.frombuffer(data, np.uint8).reshape(shape)
