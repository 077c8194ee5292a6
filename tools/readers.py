"""The formats that `shard_dataset.py` reads: one function each, from files to a `Source`.

Images stay on disk wherever the format allows it (memory maps: an npz of 150 GB needs no more memory than a small one);
labels are checked, and nothing is ever unpickled (but by reader_cifar.py: CIFAR's published batches).

Here: npz, IDX, scikit-learn's digits, and what all readers share. reader_cifar.py, reader_mat.py (SVHN), reader_images.py
(Tiny ImageNet) and reader_tars.py (other people's WebDataset shards) have the rest.
"""

import gzip
import hashlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nrat_scale.datasets import DATASETS
from nrat_scale.errors import UserError
from nrat_scale.files import sha256_of
from nrat_scale.pack import ImageArray, Source
from nrat_scale.seeds import derive, hash64

_CHUNK = 1 << 20  # bytes read at a time
_ROWS = 1 << 16  # one-hot labels converted at a time
MAX_CLASSES = 100_000  # without --dataset; a larger label is no class number
COPY_AGAIN = "Download or copy it again."

_IDX_MAGIC = {"images": 0x803, "labels": 0x801}  # unsigned bytes, in three dimensions and in one

NUM_DIGITS_TEST = 500


# ---- what the readers share -----------------------------------------------------------------------------------------


class Parts:
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


def make_source(images: ImageArray, labels: np.ndarray, dataset: str | None, files: Sequence[dict[str, Any]]) -> Source:
    """A `Source` with the class names of `dataset`, or with "0".."K-1" where none is named."""
    if dataset is None:
        names = tuple(str(label) for label in range(int(labels.max()) + 1))
        return Source(images, labels, "custom", names, tuple(files))
    known, channels = DATASETS[dataset], images.shape[3]
    if len(known.mean) != channels:
        raise UserError(
            f"The images have {channels} channel(s), but those of '{dataset}' have {len(known.mean)}. "
            "Name the right data set with --dataset, or leave --dataset out."
        )
    return Source(images, labels, dataset, known.class_names, tuple(files))


# ---- npz ------------------------------------------------------------------------------------------------------------


def read_npz(names: Sequence[str], dataset: str | None, scratch: Path) -> Source:
    """The parts of one data set: npz files with members `image` and `label`, in the order given.

    Args:
        names: paths, or `hf://datasets/USER/REPO/FILE`.
        dataset: a key of `DATASETS`, or None.
        scratch: an existing folder; a compressed `image` is unpacked there and mapped, a stored one is mapped in place.

    Raises:
        UserError: a file is missing, damaged, or holds anything but uint8 images and integer labels that match.
    """
    images: list[np.ndarray] = []
    labels, files = [], []
    for number, name in enumerate(names):
        path = _fetched(name)
        with reading(path, "npz file"), zipfile.ZipFile(path) as archive:
            stored = scratch / str(number)
            part = as_images(_npz_member(archive, path, "image", stored), f"`image` in {path}")
            label = as_labels(_npz_member(archive, path, "label", stored), len(part), f"`label` in {path}")
        if images and part.shape[1:] != images[0].shape[1:]:
            raise UserError(
                f"The images in {path} have shape {list(part.shape[1:])}, but those in {names[0]} have "
                f"{list(images[0].shape[1:])}. All parts of a data set must have one shape."
            )
        images.append(part)
        labels.append(label)
        files.append(facts_of(path, "npz file"))
    return make_source(Parts(images), np.concatenate(labels), dataset, files)


def _fetched(name: str) -> Path:
    """The local path of `name`; what lies on the Hugging Face Hub is downloaded into its cache first."""
    if "://" not in name:
        return Path(name)
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", name)
    if not match:
        raise UserError(
            f"{name} cannot be fetched: expected a path or hf://datasets/USER/REPO/FILE. Download it first."
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(match[1], match[2], repo_type="dataset"))
    except Exception as error:  # below the Hub's client lie different HTTP libraries, whose errors share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} cannot be fetched ({reason}). Check the name and the network; private data needs `hf auth login`."
        ) from error


def _npz_member(archive: zipfile.ZipFile, path: Path, member: str, unpacked: Path) -> np.ndarray:
    """The array `member` of an npz file as a read-only memory map, its checksum verified.

    Args:
        unpacked: where to unpack a compressed member, as a file with the member's name added.
    """
    try:
        info = archive.getinfo(f"{member}.npy")
    except KeyError:
        there = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:10]) or "nothing"
        raise UserError(
            f"{path} has no member `{member}`. It has: {there}. Expected `image` (uint8) and `label` (integers); "
            "save it again with these names."
        ) from None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"`{member}` in {path} is encrypted or packed with an unusual method. Save it with numpy.savez."
        )
    if info.compress_type == zipfile.ZIP_STORED:
        return npy_array(_map_stored(path, info), f"`{member}` in {path}")
    return npy_array(_inflate(archive, path, info, unpacked.with_suffix(f".{member}")), f"`{member}` in {path}")


def _map_stored(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """uint8 [file_size]: the bytes of a member that is not compressed, mapped where they lie in the npz file."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no local header for {info.filename}")
        # The lengths of name and extra field stand here; those in the zip's directory may differ.
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.file_size < 1 or info.file_size != info.compress_size or start + info.file_size > path.stat().st_size:
            raise zipfile.BadZipFile(f"{info.filename} reaches beyond its end")
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r", offset=start, shape=(info.file_size,)))
    checksum = 0
    for first in range(0, len(mapped), _CHUNK):
        checksum = zlib.crc32(mapped.data[first : first + _CHUNK], checksum)
    if checksum != info.CRC:
        raise zipfile.BadZipFile(f"the checksum of {info.filename} is wrong")
    return mapped


def _inflate(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo, unpacked: Path) -> np.ndarray:
    """uint8 [file_size]: the bytes of a compressed member, unpacked in chunks into the file `unpacked` and mapped."""
    try:
        with open(unpacked, "wb") as output, archive.open(info) as packed:
            while chunk := packed.read(_CHUNK):  # at the end, zipfile checks the checksum
                output.write(chunk)
    except OSError as error:
        raise UserError(
            f"`{info.filename}` in {path} is compressed and cannot be unpacked beside --out ({error.strerror or error}): "
            f"that takes {info.file_size / 1e6:.1f} MB for a while. Free some space, or choose another --out."
        ) from error
    if info.file_size < 1 or unpacked.stat().st_size != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} does not have the size that the zip's directory states")
    return np.asarray(np.memmap(unpacked, np.uint8, mode="r"))


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


# ---- IDX (MNIST) ----------------------------------------------------------------------------------------------------


def read_idx(images: Path, labels: Path, dataset: str | None) -> Source:
    """MNIST, Fashion-MNIST and the like: a file of images and one of labels, plain or gzipped.

    Raises:
        UserError: a file is missing, not of its kind, too short or too long, or the two do not match.
    """
    pixels = _read_idx(images, "images")
    targets = as_labels(_read_idx(labels, "labels"), len(pixels), f"The IDX file of labels {labels}")
    files = [facts_of(path, "IDX file") for path in (images, labels)]
    return make_source(pixels[..., None], targets, dataset, files)


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """uint8 [N, H, W] (kind "images") or [N] (kind "labels")."""
    what, magic = f"IDX file of {kind}", _IDX_MAGIC[kind]
    num_dims = magic & 0xFF
    with reading(path, what), open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        header = _read_up_to(stream, 4 * (1 + num_dims))
        found = int.from_bytes(header[:4], "big")
        if len(header) < 4 * (1 + num_dims) or found != magic:
            raise UserError(
                f"The {what} {path} begins with {found:#x}, expected {magic:#x}. Give the file of images first and the "
                "file of labels second."
            )
        shape = struct.unpack(f">{num_dims}I", header[4:])
        data = _read_up_to(stream, math.prod(shape) + 1)  # one more, to notice what does not belong
        if min(shape) < 1 or len(data) != math.prod(shape):
            wrong = f"only {len(data)}" if len(data) < math.prod(shape) else "more"
            raise UserError(
                f"The {what} {path} is damaged: its header states {list(shape)}, that is {math.prod(shape)} bytes, but "
                f"there are {wrong}. {COPY_AGAIN}"
            )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(stream: BinaryIO, num_bytes: int) -> bytes:
    """The next `num_bytes` bytes, or fewer at the end; a header that states too much costs no memory."""
    data = bytearray()
    while len(data) < num_bytes and (chunk := stream.read(min(_CHUNK, num_bytes - len(data)))):
        data += chunk
    return bytes(data)


# ---- digits ---------------------------------------------------------------------------------------------------------


def read_digits(split: str, seed: int) -> Source:
    """scikit-learn's 1,797 real handwritten digits (8 x 8, grey values 0..16) as uint8 [n, 16, 16, 1].

    Args:
        split: "train" (1,297) or "test" (500): stratified by class, ascending in scikit-learn's order.
        seed: of the split.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    grey, labels = load_digits(return_X_y=True)
    grey = np.ascontiguousarray(grey.reshape(-1, 8, 8), dtype="<f8")
    labels = np.ascontiguousarray(labels, dtype="<i8")
    data = grey.tobytes() + labels.tobytes()
    facts = {"name": "sklearn.datasets.load_digits", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    is_test = _stratified_choice(labels, NUM_DIGITS_TEST, seed)
    ids = np.flatnonzero(is_test if split == "test" else ~is_test)
    # Each pixel becomes 2 x 2 equal ones: exact, and it keeps the contrast that smoothing would take away.
    images = np.rint(grey[ids] * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    return make_source(images[..., None], labels[ids], "digits", [facts])


def _stratified_choice(labels: np.ndarray, num_chosen: int, seed: int) -> np.ndarray:
    """bool [N]: `num_chosen` samples, from each class its share to within one, the largest remainders rounded up."""
    rank = hash64(derive(seed, "digits test split"), np.arange(len(labels)))
    share = np.bincount(labels) * num_chosen / len(labels)
    take = np.floor(share).astype(np.int64)
    take[np.argsort(take - share, kind="stable")[: num_chosen - take.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for label, count in enumerate(take):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(rank[members], kind="stable")[:count]]] = True
    return chosen
