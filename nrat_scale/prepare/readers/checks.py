"""Checks shared by the readers: dtypes, shapes, labels, .npy headers. Every error names the file.

No reader unpickles anything, except the published CIFAR batches (cifar.py).
"""

import gzip
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import manifest_entry

CHUNK = 1 << 20  # bytes read at a time
MAX_CLASSES = 100_000  # without --dataset; a larger label is not a class number
COPY_AGAIN = "Download or copy it again."
_ONE_HOT_ROWS = 1 << 16  # converted at a time: [50 million, 100] may be a memory map

_DAMAGED = (EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn any error while `path` is read into a `UserError` that names it; `what` is e.g. "npz file"."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"There is no {what} at {path}. Check the path.") from None
    except _DAMAGED as error:
        raise UserError(f"The {what} {path} is damaged or cut short ({first_line(error)}). {COPY_AGAIN}") from error
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror or error}).") from error


def read_small(path: Path, what: str, most: int) -> bytes:
    """The bytes of a file whose published size is far below `most`; a larger one is refused without being read."""
    with reading(path, what):
        if path.stat().st_size > most:
            raise UserError(f"The {what} {path} has {path.stat().st_size} bytes, too many to be one. {COPY_AGAIN}")
        return path.read_bytes()


def file_facts(path: Path, what: str) -> dict[str, Any]:
    """Name, size and sha256 of an input file, for the index."""
    with reading(path, what):
        return {"name": path.name, **manifest_entry(path)}


def as_images(array: np.ndarray, where: str) -> np.ndarray:
    """A view uint8 [N, H, W, C] of `array` ([N, H, W, C], [N, C, H, W] or [N, H, W])."""
    if array.dtype != np.uint8:
        way_out = "Save it again as uint8; multiply pixels in [0, 1] by 255 and round them."
        raise UserError(f"{where} has dtype {array.dtype}, expected uint8 (0..255). {way_out}")
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return array
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array.transpose(0, 2, 3, 1)
    expected = "[N, H, W, C] or [N, C, H, W] with 1 or 3 channels, or [N, H, W]"
    raise UserError(f"{where} has shape {list(array.shape)}, expected {expected}.")


def as_labels(array: np.ndarray, num_images: int, where: str) -> np.ndarray:
    """int64 [num_images] of `array`: non-negative integers [num_images], or one-hot rows [num_images, K]."""
    if array.ndim == 2 and array.shape[0] == num_images and array.shape[1] > 1 and array.dtype.kind in "iubf":
        return _from_one_hot(array, where)
    if array.dtype.kind not in "iu":
        raise UserError(f"{where} has dtype {array.dtype}, expected integers (class numbers 0, 1, 2, ...).")
    if array.shape != (num_images,):
        raise UserError(f"{where} has shape {list(array.shape)}, expected [{num_images}]: one label for each image.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MAX_CLASSES:
        raise UserError(f"{where} has values from {low} to {high}, expected class numbers in 0..{MAX_CLASSES - 1}.")
    return array.astype(np.int64)


def one_hot_width(array: np.ndarray) -> int | None:
    """K of one-hot labels [N, K], None for class numbers [N]."""
    return array.shape[1] if array.ndim == 2 else None


def _from_one_hot(array: np.ndarray, where: str) -> np.ndarray:
    labels = np.empty(len(array), np.int64)
    for first in range(0, len(array), _ONE_HOT_ROWS):
        rows = array[first : first + _ONE_HOT_ROWS]
        wrong = np.flatnonzero(((rows != 0) & (rows != 1)).any(axis=1) | (np.count_nonzero(rows, axis=1) != 1))
        if len(wrong):
            found = f"shape {list(array.shape)}, but row {first + wrong[0]} is not one-hot"
            raise UserError(f"{where} has {found}. Expected one class number for each image, or one-hot rows.")
        labels[first : first + _ONE_HOT_ROWS] = rows.argmax(axis=1)
    return labels


def npy_array(data: np.ndarray, where: str) -> np.ndarray:
    """The array in the bytes `data` (uint8 [m]) of an .npy file, as a view; nothing is unpickled."""
    stream = io.BytesIO(data[: 1 << 14].tobytes())  # numpy refuses headers above 10,000 bytes
    try:
        is_first = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)  # version 3 is for structured arrays, which are refused either way
    except (ValueError, TypeError, LookupError, SyntaxError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{where} has no readable .npy header ({reason}). Save it again with numpy.savez.") from error
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects, and nothing is ever unpickled. Save it as an array of numbers.")
    needed, given = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if any(size < 1 for size in shape) or needed != given:
        wrong = f"shape {list(shape)} of {dtype} needs {needed} bytes, found {given}"
        raise UserError(f"{where} is empty, damaged or cut short: {wrong}. {COPY_AGAIN}")
    return np.ndarray(shape, dtype, buffer=data.data, offset=stream.tell(), order="F" if fortran_order else "C")
