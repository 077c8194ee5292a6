"""Read CIFAR-10 and CIFAR-100 as published: pickles (Python version) or records (binary version).

These are the only pickles that data preparation opens. Their md5 must be the published one, and the unpickler rebuilds
nothing but uint8 arrays. tests/system/test_layers.py checks both.
"""

import hashlib
import http.client
import io
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import make_folder, temporary_sibling
from nrat_scale.prepare.input import Classes, Concatenated, LabelledArrays
from nrat_scale.prepare.readers.checks import COPY_AGAIN, as_labels, file_facts, reading

# https://www.cs.toronto.edu/~kriz/cifar.html. A pickle can run any program, so files with another md5 are never opened.
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


class _Version(NamedTuple):
    """What differs between the two data sets."""

    title: str  # without its hyphen, the name of torchvision's class
    python: str  # folder of the Python version
    binary: str  # folder of the binary version, whose batches end in ".bin"
    md5: Mapping[str, str]  # batch -> md5 of its pickle
    label_key: bytes  # in a pickle
    label_bytes: int  # before the pixels of a record; the last one is the label (CIFAR-100: coarse label, fine label)

    def batches(self, split: str) -> list[str]:
        return [name for name in self.md5 if name.startswith("test") == (split == "test")]


_VERSIONS = {
    "cifar10": _Version("CIFAR-10", "cifar-10-batches-py", "cifar-10-batches-bin", CIFAR10_MD5, b"labels", 1),
    "cifar100": _Version("CIFAR-100", "cifar-100-python", "cifar-100-binary", CIFAR100_MD5, b"fine_labels", 2),
}


def read_cifar(dataset: str, root: Path, split: str, *, download: bool = False) -> LabelledArrays:
    """One split of CIFAR-10 or CIFAR-100 (with its 100 fine labels).

    Args:
        root: the folder of the Python or the binary version, or the folder that contains it.
        download: download the Python version into `root` if neither version is present.
    """
    version = _VERSIONS[dataset]
    if download and _folder(version, root, split) is None:
        _download(version, root)
    if (folder := _folder(version, root, split)) is None:
        raise UserError(
            f"There is no {version.title} at {root}: no batches of the split '{split}' there, in {version.python} or in "
            f"{version.binary}. Give the folder that contains one of these, or add --download."
        )
    what = f"{version.title} batch"
    images, labels, files = [], [], []
    for name in version.batches(split):
        binary = folder / f"{name}.bin"
        path, read = (binary, _read_records) if binary.is_file() else (folder / name, _read_pickle)
        with reading(path, what):
            batch, batch_labels = read(version, path)
        images.append(batch.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(as_labels(batch_labels, len(batch), f"The labels of {path}"))
        files.append(file_facts(path, what))
    return LabelledArrays.of(Concatenated(images), np.concatenate(labels), Classes(dataset), files)


def _folder(version: _Version, root: Path, split: str) -> Path | None:
    names = {f"{name}{suffix}" for name in version.batches(split) for suffix in ("", ".bin")}
    folders = (root / version.python, root / version.binary, root)
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def _read_records(version: _Version, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 3072], uint8 [n]) of a binary batch: records of label bytes and three colour planes."""
    size, record = path.stat().st_size, version.label_bytes + _PIXELS
    if size < record or size % record:
        raise UserError(f"{path} has {size} bytes, expected a multiple of {record}, the size of a record. {COPY_AGAIN}")
    records = np.asarray(np.memmap(path, np.uint8, mode="r")).reshape(-1, record)
    return records[:, version.label_bytes :], records[:, version.label_bytes - 1]


def _read_pickle(version: _Version, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 3072], int64 [n]) of a Python batch with the published md5."""
    data = path.read_bytes()
    md5, published = hashlib.md5(data, usedforsecurity=False).hexdigest(), version.md5[path.name]
    if md5 != published:
        found = f"{path} has md5 {md5}, expected {published} as published"
        raise UserError(f"{found}. It is a pickle and was not opened. Remove it and download it again (--download).")
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[version.label_key])
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} is not a batch of {version.title} ({first_line(error)}). {COPY_AGAIN}") from error
    is_bytes = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_bytes or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        raise UserError(f"{path} has no uint8 data of shape [n, {_PIXELS}]. {COPY_AGAIN}")
    return pixels, labels


def _uint8_only(name: str | bytes, align: bool = False, copy: bool = False) -> np.dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it contains an array of dtype {name!r}; only uint8 is allowed")
    return np.dtype("u1", copy=True)


class _BatchUnpickler(pickle.Unpickler):
    """Rebuilds dicts, lists, bytes, numbers and uint8 arrays: all that a CIFAR batch contains, and nothing else."""

    # numpy's function that creates an empty array to be filled; numpy 2 renamed its module.
    _RECONSTRUCT = np.zeros(0).__reduce__()[0]
    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _uint8_only,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed and was not run")
        return self._ALLOWED[module, name]


def _download(version: _Version, root: Path) -> None:
    """Download the Python version into its folder in `root`, with torchvision's address and checksum."""
    import torchvision
    from torchvision.datasets.utils import download_and_extract_archive

    # torchvision's own class would unpickle the batches without `_BatchUnpickler`.
    published = getattr(torchvision.datasets, version.title.replace("-", ""))
    make_folder(root)
    temporary = temporary_sibling(root / version.python)
    try:
        download_and_extract_archive(published.url, str(temporary), filename=published.filename, md5=published.tgz_md5)
        os.replace(temporary / version.python, root / version.python)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: a wrong md5
        what = f"{version.title} cannot be downloaded from {published.url} into {root} ({first_line(error)})"
        raise UserError(f"{what}. Check the network, or copy {version.python} there yourself.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
