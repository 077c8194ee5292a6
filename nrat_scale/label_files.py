"""Labels and scores in files of NumPy, which others may have made: headers are checked first, and nothing is unpickled."""

import math
import zlib
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from nrat_scale.core.errors import UserError, first_line

# CIFAR-10N (Wei et al. 2022): name in a recipe -> key in the published file. Three people labelled every image: `aggre`
# is the majority of their labels, `worse` a wrong one, if any.
HUMAN_SETS = {
    "aggre": "aggre_label",
    "worse": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
}
CIFAR10N = "the .npz that python -m nrat_scale.prepare cifar10n writes"
NO_SCORES = (
    "badlabel needs {}.scores: label_scores.npy of a run with objective.name=natural objective.refine.kind=scores."
)
_MAX_LABEL_BYTES = 1 << 30
# Errors of NumPy and zipfile on a damaged file.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, EOFError, SyntaxError, RuntimeError, BadZipFile, zlib.error)


def load_human_labels(path: str, which: str, key: str = "data.real.noise") -> np.ndarray:
    """int [n] from an .npy file, or the labels `which` (a key of `HUMAN_SETS`) of an .npz; never unpickled.

    `key` is the section of the recipe that messages name.

    Raises:
        UserError: a missing file, or not such an array.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                with ZipFile(file) as archive, archive.open(f"{HUMAN_SETS[which]}.npy") as member:
                    return _npy_labels(member, archive.getinfo(member.name).file_size)
            size = file.seek(0, 2)
            file.seek(0)
            return _npy_labels(file, size)
    except FileNotFoundError:
        raise UserError(f"There is no file of human labels at {path} ({key}.human_labels).") from None
    except _UNREADABLE as error:
        formats = f"an .npy array of integers, nor as {CIFAR10N}"
        raise UserError(f"The human labels {path} cannot be read as {formats} ({first_line(error)}).") from error


def _npy_labels(stream: Any, size: int) -> np.ndarray:
    """int [n] of the .npy file of `size` bytes in `stream`; its header is checked before anything is allocated."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    needed = math.prod(shape) * dtype.itemsize
    whole = stream.tell() + needed == size <= _MAX_LABEL_BYTES
    if not whole or dtype.kind not in "iu" or len(shape) != 1 or shape[0] < 0:
        raise ValueError(f"it holds {dtype} {list(shape)} in {size} bytes")
    return np.frombuffer(stream.read(needed), dtype, shape[0]).astype(np.int64)


def load_scores(path: str, key: str = "data.real.noise") -> np.ndarray:
    """float64 [n, K] of `badlabel`, from an .npy file; raises `UserError` if it is no finite matrix of floats.

    `key` is the section of the recipe that messages name.
    """
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # a header alone allocates nothing
        if stored.ndim != 2 or stored.dtype.kind != "f":
            raise ValueError(f"it holds {stored.dtype} {list(stored.shape)}")
        scores = np.asarray(stored, np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("not all are finite")
    except FileNotFoundError:
        raise UserError(f"There is no file of scores at {path} ({key}.scores).") from None
    except (*_UNREADABLE, AttributeError) as error:  # an .npz has no ndim
        raise UserError(f"{key}.scores: {path} is no .npy matrix of floats ({first_line(error)}).") from error
    return scores
