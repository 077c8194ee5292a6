"""CIFAR-10 and CIFAR-100 as their authors publish them: pickles (Python version) or records (binary version).

The pickles are the only ones that are ever opened here: those with the published md5, by an unpickler that rebuilds
uint8 arrays and nothing else. tests/test_layers.py holds this module to it.
"""

import hashlib
import http.client
import io
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, temporary_sibling
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.arrays import COPY_AGAIN, Concatenated, as_labels, facts_of, labelled_arrays, reading

# As published with the data sets (https://www.cs.toronto.edu/~kriz/cifar.html). The batches are pickles, which can run
# any program: a file with another md5 is never unpickled.
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
SPLITS = ("train", "test")
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """What differs between the two data sets.

    Attributes:
        name: as torchvision calls its class, and in messages with a hyphen.
        python, binary: the folders of the two versions.
        batches: split -> its files, in order; the binary version adds ".bin".
        md5: of the pickles.
        key: of the labels in a pickle.
        label_bytes: before the pixels of a record; the label is the last of them.
    """

    name: str
    python: str
    binary: str
    batches: Mapping[str, list[str]]
    md5: Mapping[str, str]
    key: bytes
    label_bytes: int

    @property
    def title(self) -> str:
        return self.name.replace("CIFAR", "CIFAR-")


_CIFAR10 = _Version(
    "CIFAR10",
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    CIFAR10_MD5,
    b"labels",
    1,
)
# Its records begin with the coarse label; the label of the hundred classes is the fine one.
_CIFAR100 = _Version(
    "CIFAR100",
    "cifar-100-python",
    "cifar-100-binary",
    {"train": ["train"], "test": ["test"]},
    CIFAR100_MD5,
    b"fine_labels",
    2,
)


def read_cifar10(root: Path, split: str, *, download: bool = False) -> LabelledArrays:
    """One split of CIFAR-10: `cifar-10-batches-py` (pickles) or `cifar-10-batches-bin`.

    Args:
        root: the folder that holds one of these two, or one of them itself.
        split: "train" or "test".
        download: fetch it into `root` first where it is not there.

    Raises:
        UserError: nothing there, a missing or damaged batch, or a pickle that is not the published one.
    """
    return _read(_CIFAR10, root, split, download)


def read_cifar100(root: Path, split: str, *, download: bool = False) -> LabelledArrays:
    """One split of CIFAR-100 with its fine labels, from `cifar-100-python` or `cifar-100-binary`; as `read_cifar10`."""
    return _read(_CIFAR100, root, split, download)


def _read(version: _Version, root: Path, split: str, download: bool) -> LabelledArrays:
    folder = _folder(version, root, split)
    if folder is None and download:
        _download(version, root)
        folder = _folder(version, root, split)
    if folder is None:
        raise UserError(
            f"There is no {version.title} at {root}: no batches of the split '{split}' in it, nor in {version.python} or "
            f"{version.binary} there. Give the folder that holds one of these, or add --download."
        )
    what = f"{version.title} batch"
    images, labels, files = [], [], []
    for name in version.batches[split]:
        binary = folder / f"{name}.bin"
        path, read = (binary, _read_records) if binary.is_file() else (folder / name, _read_pickle)
        with reading(path, what):
            batch, batch_labels = read(version, path)
        images.append(batch.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(as_labels(batch_labels, len(batch), f"The labels of {path}"))
        files.append(facts_of(path, what))
    return labelled_arrays(Concatenated(images), np.concatenate(labels), version.name.lower(), files)


def _folder(version: _Version, root: Path, split: str) -> Path | None:
    for folder in (root / version.python, root / version.binary, root):
        if any((folder / f"{name}{suffix}").is_file() for name in version.batches[split] for suffix in ("", ".bin")):
            return folder
    return None


def _read_records(version: _Version, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 3072], uint8 [n]) of the binary version: records of label bytes and the three colour planes."""
    size, record = path.stat().st_size, version.label_bytes + _PIXELS
    if size < record or size % record:
        raise UserError(
            f"The {version.title} batch {path} has {size} bytes, expected a multiple of {record}: {version.label_bytes} "
            f"for the labels of an image and {_PIXELS} for its pixels. {COPY_AGAIN}"
        )
    records = np.asarray(np.memmap(path, np.uint8, mode="r")).reshape(-1, record)
    return records[:, version.label_bytes :], records[:, version.label_bytes - 1]


def _read_pickle(version: _Version, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 3072], int64 [n]) of the Python version; only the published bytes are unpickled."""
    data = path.read_bytes()
    md5, published = hashlib.md5(data, usedforsecurity=False).hexdigest(), version.md5[path.name]
    if md5 != published:
        raise UserError(
            f"The {version.title} batch {path} has md5 {md5}, expected {published} as published. It is a pickle and was "
            "not opened. Remove it and fetch it again (--download)."
        )
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[version.key])
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"The {version.title} batch {path} is no batch of {version.title} ({error}).") from error
    is_bytes = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_bytes or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or pixels.size < 1:
        raise UserError(f"The {version.title} batch {path} holds no uint8 data of shape [n, {_PIXELS}].")
    return pixels, labels


def _uint8_only(name: str | bytes, align: bool = False, copy: bool = False) -> np.dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it holds an array of dtype {name!r}; only uint8 is admitted")
    return np.dtype("u1", copy=True)


class _BatchUnpickler(pickle.Unpickler):
    """Rebuilds dicts, lists, bytes, numbers and uint8 arrays: all that a batch of CIFAR holds, and nothing else."""

    # numpy's function that makes an empty array to be filled; its module was renamed in numpy 2.
    _RECONSTRUCT = np.zeros(0).__reduce__()[0]
    _ADMITTED: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _uint8_only,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted and was not run")
        return self._ADMITTED[module, name]


def _download(version: _Version, root: Path) -> None:
    """Fetch the Python version into its folder in `root`, with torchvision's address and checksum."""
    import torchvision
    from torchvision.datasets.utils import download_and_extract_archive

    published = getattr(torchvision.datasets, version.name)
    make_folder(root)
    # Beside its place and renamed, so that a broken download leaves nothing. torchvision's own class would go on to
    # unpickle the batches without `_BatchUnpickler`.
    temporary = temporary_sibling(root / version.python)
    try:
        download_and_extract_archive(published.url, str(temporary), filename=published.filename, md5=published.tgz_md5)
        os.replace(temporary / version.python, root / version.python)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: a wrong md5
        raise UserError(
            f"{version.title} cannot be fetched from {published.url} into {root} ({error}). Check the network, or copy "
            f"{version.python} there from another machine."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
