"""SVHN's cropped digits: the two arrays of a MATLAB 5 file, and nothing else.

SciPy's reader believes what a file states: one wrong bit in a size ends the process by a segmentation fault. The part of
the format that SVHN needs, two plain arrays of numbers, is small enough to be read with every size checked.

    128 bytes of header, then elements: type, size, content, padded to 8 bytes
    an array is an element of four: flags with its class, dimensions, name, numbers in Fortran order
    it may be packed by zlib as a whole, whose checksum is then verified
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.arrays import COPY_AGAIN, as_labels, facts_of, labelled_arrays, reading

_SHAPE = (32, 32, 3)  # of an image in X
_HEADER = 128  # bytes; the last four tell version and byte order
_ORDER = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
_MATRIX, _PACKED, _INT8, _INT32, _UINT32 = 14, 15, 1, 5, 6
# Stored number types, and the classes that an array of numbers may have: double, single, and the integers.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "double", 7: "single", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32"}
_CLASSES |= {14: "int64", 15: "uint64"}
_COMPLEX = 0x800
_MAX_DIMENSIONS = 32
_CHUNK = 1 << 20


def read_svhn(path: Path) -> LabelledArrays:
    """SVHN's cropped digits: X (uint8 [32, 32, 3, N]) and y ([N, 1], where 10 means the digit 0).

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    with reading(path, "SVHN file"):
        arrays = _arrays(path)
    if set(arrays) != {"X", "y"}:
        names = ", ".join(sorted(map(repr, arrays))) or "nothing"
        raise UserError(f"{path} holds {names}, expected `X` and `y`: SVHN's cropped digits (format 2).")
    images, targets = arrays["X"], arrays["y"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != _SHAPE:
        raise UserError(f"`X` in {path} is {images.dtype} {list(images.shape)}, expected uint8 [32, 32, 3, N].")
    labels = _labels(targets, images.shape[3], f"`y` in {path}")
    return labelled_arrays(images.transpose(3, 0, 1, 2), labels, "svhn", [facts_of(path, "SVHN file")])


def _labels(targets: np.ndarray, num_images: int, where: str) -> np.ndarray:
    """int64 [N] in 0..9 of y, which counts the digits from 1 and calls the zero 10."""
    if targets.shape not in ((num_images, 1), (1, num_images)):
        raise UserError(
            f"{where} has shape {list(targets.shape)}, expected [{num_images}, 1]: one label for each image."
        )
    numbers = targets.reshape(-1)
    if numbers.dtype.kind == "f" and np.isin(numbers, np.arange(1, 11)).all():
        numbers = numbers.astype(np.int64)  # MATLAB's numbers are doubles
    labels = as_labels(numbers, num_images, where)
    if labels.min() < 1 or labels.max() > 10:
        raise UserError(
            f"{where} has values from {labels.min()} to {labels.max()}, expected 1..10 (10 is the digit 0)."
        )
    return np.asarray(labels % 10)


# ---- the format -----------------------------------------------------------------------------------------------------


class _Content:
    """The `num_bytes` at a file's position, unpacked by zlib where `packed`: read exactly, and to the end."""

    def __init__(self, file: BinaryIO, num_bytes: int, packed: bool) -> None:
        self._file, self._left = file, num_bytes
        self._zlib = zlib.decompressobj() if packed else None

    def read(self, num_bytes: int) -> bytearray:
        """Exactly so many bytes; what is stated but not there costs no memory."""
        data = bytearray()
        while len(data) < num_bytes:
            chunk = self._some(num_bytes - len(data))
            if not chunk:
                raise ValueError(f"{num_bytes} bytes are stated, but there are {len(data)}")
            data += chunk
        return data

    def _some(self, most: int) -> bytes:
        if self._zlib is None:
            return self._taken(most)
        while True:
            packed = self._zlib.unconsumed_tail or self._taken(_CHUNK)
            chunk = self._zlib.decompress(packed, min(most, _CHUNK))
            if chunk or self._zlib.eof or not packed:
                return chunk

    def _taken(self, most: int) -> bytes:
        data = self._file.read(min(most, self._left, _CHUNK))
        self._left -= len(data)
        return data

    def finish(self) -> None:
        """Whatever follows the numbers was not meant to be there; at its end, zlib has verified its checksum."""
        if self._some(1) or self._left or (self._zlib is not None and (not self._zlib.eof or self._zlib.unused_data)):
            raise ValueError("an array is followed by something")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers in a MATLAB 5 file, by name."""
    arrays: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        order = _ORDER.get(file.read(_HEADER)[_HEADER - 4 :])
        if order is None:
            raise UserError(
                f"{path} is no MATLAB 5 file. Give train_32x32.mat, test_32x32.mat or extra_32x32.mat as published at "
                "http://ufldl.stanford.edu/housenumbers."
            )
        for kind, num_bytes in _elements(file, order, path.stat().st_size):
            content = _Content(file, num_bytes, kind == _PACKED)
            if kind == _PACKED:
                kind, num_bytes = struct.unpack(f"{order}II", content.read(8))
            if kind != _MATRIX:
                raise ValueError(f"an element of type {kind}, where an array should be")
            name, array = _array(content, order, path)
            content.finish()
            if name in arrays:
                raise ValueError(f"{name!r} is there twice")
            arrays[name] = array
    return arrays


def _elements(file: BinaryIO, order: str, size: int) -> Iterator[tuple[int, int]]:
    """(type, size) of every outermost element; the file stands at its content."""
    while tag := file.read(8):
        if len(tag) < 8:
            raise ValueError("its end is missing")
        kind, num_bytes = struct.unpack(f"{order}II", tag)
        start = file.tell()
        if num_bytes > size - start:
            raise ValueError(f"{num_bytes} bytes are stated, but {size - start} follow")
        yield kind, num_bytes
        file.seek(start + num_bytes)


def _array(content: _Content, order: str, path: Path) -> tuple[str, np.ndarray]:
    """(name, numbers in the array's shape)."""
    kind, flags = _part(content, order, 8)
    word = struct.unpack(f"{order}I", flags[:4])[0] if kind == _UINT32 and len(flags) == 8 else 0
    kind, dimensions = _part(content, order, 4 * _MAX_DIMENSIONS)
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions) if kind == _INT32 else ()
    kind, name = _part(content, order, 64)
    what = f"`{bytes(name).decode('ascii')}` in {path}"
    if word & 0xFF not in _CLASSES or word & _COMPLEX:
        raise UserError(f"{what} is no array of numbers, expected `X` and `y`: SVHN's cropped digits (format 2).")
    if kind != _INT8 or len(shape) < 2 or min(shape) < 1:
        raise UserError(f"{what} is empty or damaged: its shape is {list(shape)}. {COPY_AGAIN}")
    kind, data = _part(content, order, None)
    if kind not in _NUMBERS:
        raise ValueError(f"an array of numbers of type {kind}")
    numbers = np.frombuffer(data, f"{order}{_NUMBERS[kind]}")
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{len(numbers)} numbers for the shape {list(shape)}")
    return bytes(name).decode("ascii"), numbers.reshape(shape, order="F")


def _part(content: _Content, order: str, most: int | None) -> tuple[int, bytearray]:
    """(type, content) of an inner element of at most `most` bytes; up to four stand within its tag."""
    tag = content.read(8)
    kind, num_bytes = struct.unpack(f"{order}II", tag[:8])
    if kind >> 16:
        kind, num_bytes = kind & 0xFFFF, kind >> 16
        if num_bytes > 4:
            raise ValueError("a short element is too long")
        return kind, tag[4 : 4 + num_bytes]
    if most is not None and num_bytes > most:
        raise ValueError(f"an inner element has {num_bytes} bytes")
    data = content.read(num_bytes)
    content.read(-num_bytes % 8)
    return kind, data
