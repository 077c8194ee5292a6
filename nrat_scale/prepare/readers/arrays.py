"""The formats that `shard_dataset.py` reads: one function each, from files to a `Source`.

Images stay on disk wherever the format allows it (memory maps: an npz of 150 GB needs no more memory than a small one);
labels are checked, and nothing is ever unpickled (but by reader_cifar.py: CIFAR's published batches).

Here: npz, IDX, scikit-learn's digits, and what all readers share. reader_cifar.py, reader_mat.py (SVHN), reader_images.py
(Tiny ImageNet) and reader_tars.py (other people's WebDataset shards) have the rest.
"""

import gzip
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import ImageArray, LabelledArrays

CHUNK = 1 << 20  # bytes read at a time
_ROWS = 1 << 16  # one-hot labels converted at a time
MAX_CLASSES = 100_000  # without --dataset; a larger label is no class number
COPY_AGAIN = "Download or copy it again."


# ---- what the readers share -----------------------------------------------------------------------------------------


class Concatenated:
    """Several arrays of images, one after the other, as one array that is read only where it is indexed.

    Args:
        arrays: uint8 [n_i, H, W, C] each; memory maps stay on disk.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])

    def __getitem__(self, ids: Any) -> np.ndarray:
        """uint8 [m, H, W, C] of the images `ids` (integers [m] in [0, N))."""
        ids = np.asarray(ids, dtype=np.int64)
        out = np.empty((len(ids), *self.shape[1:]), np.uint8)
        part = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(part):
            here = part == number
            array = self._arrays[number]
            out[here] = array[ids[here] - (self._ends[number] - len(array))]
        return out


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn everything that can go wrong while `path` is read into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"There is no {what} at {path}. Check the path.") from None
    except (EOFError, zlib.error, struct.error, zipfile.BadZipFile, gzip.BadGzipFile, ValueError) as error:
        raise UserError(f"The {what} {path} is damaged or cut short ({error}). {COPY_AGAIN}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: a method it does not know
        raise UserError(f"The {what} {path} cannot be read ({error}). Save it again with numpy.savez.") from error
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror or error}).") from error


def facts_of(path: Path, what: str) -> dict[str, Any]:
    """Name, size and hash of an input file, for the index."""
    with reading(path, what):
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def as_images(array: np.ndarray, where: str) -> np.ndarray:
    """A view uint8 [N, H, W, C] of `array` ([N, H, W, C], [N, C, H, W] or [N, H, W])."""
    if array.dtype != np.uint8:
        raise UserError(
            f"{where} has dtype {array.dtype}, expected uint8 (0..255). Convert it and save it again; "
            "pixels in [0, 1] are to be multiplied by 255 and rounded."
        )
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return array
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array.transpose(0, 2, 3, 1)
    raise UserError(
        f"{where} has shape {list(array.shape)}, expected [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, or [N, H, W]."
    )


def as_labels(array: np.ndarray, num_images: int, where: str) -> np.ndarray:
    """int64 [num_images] of `array`: as many integers of 0 or more, or one-hot rows ([num_images, K] of 0 and one 1)."""
    if array.ndim == 2 and array.shape[0] == num_images and array.shape[1] > 1 and array.dtype.kind in "iub":
        return _from_one_hot(array, where)
    if array.dtype.kind not in "iu":
        raise UserError(f"{where} has dtype {array.dtype}, expected integers (class numbers 0, 1, 2, ...).")
    if array.shape != (num_images,):
        raise UserError(
            f"{where} has shape {list(array.shape)}, expected [{num_images}]: one label for each of the {num_images} images."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MAX_CLASSES:
        raise UserError(
            f"{where} has values from {low} to {high}, expected class numbers 0, 1, 2, ... (at most {MAX_CLASSES - 1})."
        )
    return array.astype(np.int64)


def _from_one_hot(array: np.ndarray, where: str) -> np.ndarray:
    labels = np.empty(len(array), np.int64)
    for first in range(0, len(array), _ROWS):  # [50 million, 100] may lie on disk
        rows = array[first : first + _ROWS]
        wrong = np.flatnonzero(((rows != 0) & (rows != 1)).any(axis=1) | (np.count_nonzero(rows, axis=1) != 1))
        if len(wrong):
            raise UserError(
                f"{where} has shape {list(array.shape)}, but row {first + wrong[0]} is not one-hot (zeros and one 1). "
                f"Expected [{len(array)}], one class number for each image, or one-hot rows."
            )
        labels[first : first + _ROWS] = rows.argmax(axis=1)
    return labels


def labelled_arrays(
    images: ImageArray, labels: np.ndarray, dataset: str | None, files: Sequence[dict[str, Any]]
) -> LabelledArrays:
    """A `Source` with the class names of `dataset`, or with "0".."K-1" where none is named."""
    if dataset is None:
        names = tuple(str(label) for label in range(int(labels.max()) + 1))
        return LabelledArrays(images, labels, "custom", names, tuple(files))
    known, channels = DATASETS[dataset], images.shape[3]
    if len(known.mean) != channels:
        raise UserError(
            f"The images have {channels} channel(s), but those of '{dataset}' have {len(known.mean)}. "
            "Name the right data set with --dataset, or leave --dataset out."
        )
    return LabelledArrays(images, labels, dataset, known.class_names, tuple(files))


def npy_array(data: np.ndarray, where: str) -> np.ndarray:
    """The array in the bytes `data` (uint8 [m]) of an .npy file: a view, nothing is copied and nothing unpickled."""
    stream = io.BytesIO(data[: 1 << 14].tobytes())  # numpy refuses a header longer than 10,000 bytes
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        else:  # version 3 is for structured arrays, which are refused just the same
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    except (ValueError, TypeError, LookupError, SyntaxError, RecursionError) as error:
        raise UserError(f"{where} has no readable .npy header ({error}). Save it again with numpy.savez.") from error
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects, and nothing is ever unpickled. Save it as an array of numbers.")
    needed, there = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if any(size < 1 for size in shape) or needed != there:
        raise UserError(
            f"{where} is empty, damaged or cut short: shape {list(shape)} of {dtype} needs {needed} bytes, there are "
            f"{there}. {COPY_AGAIN}"
        )
    return np.ndarray(shape, dtype, buffer=data.data, offset=stream.tell(), order="F" if fortran_order else "C")
