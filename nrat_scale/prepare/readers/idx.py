"""Read IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.checks import CHUNK, COPY_AGAIN, as_labels, file_facts, reading

_MAGIC = {"images": 0x803, "labels": 0x801}  # unsigned bytes in three dimensions, in one dimension


def read_idx(images: Path, labels: Path, dataset: str | None) -> LabelledArrays:
    """An IDX file of images and one of labels, plain or gzipped.

    Raises:
        UserError: a file is missing, of another kind, too short or too long, or the two do not match.
    """
    pixels = _read_idx(images, "images")
    targets = as_labels(_read_idx(labels, "labels"), len(pixels), f"The IDX file of labels {labels}")
    files = [file_facts(path, "IDX file") for path in (images, labels)]
    return LabelledArrays.of(pixels[..., None], targets, dataset, files)


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """uint8 [N, H, W] (kind "images") or [N] (kind "labels")."""
    what, magic = f"IDX file of {kind}", _MAGIC[kind]
    num_dims = magic & 0xFF
    with reading(path, what), open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
        header = _read_up_to(stream, 4 * (1 + num_dims))
        found = int.from_bytes(header[:4], "big")
        if len(header) < 4 * (1 + num_dims) or found != magic:
            raise UserError(
                f"The {what} {path} begins with {found:#x}, expected {magic:#x}. Give the images first, then the labels."
            )
        shape = struct.unpack(f">{num_dims}I", header[4:])
        data = _read_up_to(stream, math.prod(shape) + 1)  # one more, to detect trailing bytes
        if min(shape) < 1 or len(data) != math.prod(shape):
            wrong = f"only {len(data)}" if len(data) < math.prod(shape) else "more"
            stated = f"its header states {list(shape)}, that is {math.prod(shape)} bytes, but there are {wrong}"
            raise UserError(f"The {what} {path} is damaged: {stated}. {COPY_AGAIN}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(stream: BinaryIO, num_bytes: int) -> bytes:
    """The next `num_bytes` bytes, or fewer at the end; memory grows with the file, not with what its header states."""
    data = bytearray()
    while len(data) < num_bytes and (chunk := stream.read(min(CHUNK, num_bytes - len(data)))):
        data += chunk
    return bytes(data)
