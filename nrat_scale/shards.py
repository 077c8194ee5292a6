"""Shards: plain WebDataset tars of image blocks, and the index by which they are verified and randomly accessed.

    DIR/shard-00000.tar   members 00000000.images.npy (uint8 [n, H, W, C]), 00000000.labels.npy (int64 [n]), 00000001...
    DIR/index.json        written last: everything else trusts only this file

Sample *positions* 0..N-1 are the order in the shards. They are a keyed permutation of the *source ids* 0..N-1 (the
order in the files that were converted), because published files are sorted by class; the index names the permutation,
so each can be computed from the other. Blocks are stored back to back at known offsets: reading a sample is one copy
out of a memory map, and no tar is parsed nor anything unpickled.
"""

import hashlib
import io
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset
from tqdm import tqdm

from nrat_scale.errors import UserError
from nrat_scale.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json
from nrat_scale.seeds import KeyedPermutation

FORMAT, VERSION = "nrat_scale.shards", 1
INDEX = "index.json"
BLOCK_SIZE, SHARD_SIZE = 512, 51_200  # images; a CIFAR shard of 100 blocks is about 157 MB
_TAR_BLOCK = 512  # bytes
_MAX_BLOCK_BYTES = 1 << 32  # beyond 8 GiB a tar member gets a longer header; a block must fit into memory several times
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


class ImageArray(Protocol):
    """What can be converted: anything that gives uint8 [m, H, W, C] for integer ids [m]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, ids: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """Images and labels to convert, in source order.

    Attributes:
        images: uint8 [N, H, W, C], an array or a memory map.
        labels: int64 [N].
        dataset: name of the data set (a key of `DATASETS` where it is known).
        class_names: in label order; their number is K.
        files: name, size and sha256 of each file that was read.
    """

    images: ImageArray
    labels: np.ndarray
    dataset: str
    class_names: tuple[str, ...]
    files: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"Images must have shape [N, H, W, C] with 1 or 3 channels and N > 0, not {list(shape)}.")
        if len(self.labels) != shape[0]:
            raise UserError(f"There are {shape[0]} images but {len(self.labels)} labels.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(
                f"Labels range from {low} to {high}, but the data set '{self.dataset}' has {len(self.class_names)} classes: "
                f"they must lie in 0..{len(self.class_names) - 1}. Name the right data set with --dataset."
            )


# ---- writing --------------------------------------------------------------------------------------------------------


def write_shards(
    source: Source,
    folder: Path,
    *,
    block_size: int = BLOCK_SIZE,
    shard_size: int = SHARD_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write `source` as shards into the new folder `folder`; the same arguments give the same bytes.

    Everything is written into a temporary sibling that is renamed at the end, so `folder` is whole or not there.

    Args:
        block_size: images in a block.
        shard_size: images in a shard, rounded up to whole blocks.
        seed: of the permutation of the samples.

    Returns:
        `folder`.

    Raises:
        UserError: bad sizes, `folder` exists already, or it cannot be written.
    """
    if block_size < 1 or shard_size < 1:
        raise UserError(f"--block-size ({block_size}) and --shard-size ({shard_size}) must be at least 1.")
    block_bytes = min(block_size, source.images.shape[0]) * int(np.prod(source.images.shape[1:], dtype=np.int64))
    if block_bytes > _MAX_BLOCK_BYTES:
        raise UserError(
            f"A block of {block_size} images has {block_bytes} bytes, more than {_MAX_BLOCK_BYTES}. Lower --block-size."
        )
    require_new_folder(folder)
    make_folder(folder.parent)
    temporary = temporary_sibling(folder)
    try:
        temporary.mkdir()
        shards = _write_tars(source, temporary, block_size, shard_size, seed, progress)
        write_json(temporary / INDEX, _index_of(source, shards, block_size, seed))
        if folder.exists():
            folder.rmdir()  # empty, checked above
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"The shards cannot be written to {folder} ({error.strerror}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def require_new_folder(folder: Path) -> None:
    """Raise `UserError` where `folder` is anything but absent or empty: nothing is ever overwritten."""
    try:
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as error:
        raise UserError(f"{folder} cannot be used as --out ({error.strerror}). Choose another place.") from error
    if taken:
        raise UserError(
            f"{folder} exists already and is never overwritten. Choose another --out, or remove it yourself."
        )


def _index_of(source: Source, shards: list[dict[str, Any]], block_size: int, seed: int) -> dict[str, Any]:
    num_classes = len(source.class_names)
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": source.dataset,
        "class_names": list(source.class_names),
        "image_shape": [int(n) for n in source.images.shape[1:]],
        "num_images": int(source.images.shape[0]),
        "class_counts": np.bincount(source.labels, minlength=num_classes).tolist(),
        "permutation": {"seed": seed, "n": int(source.images.shape[0])},
        "block_size": block_size,
        "source": list(source.files),
        "shards": shards,
    }


def _write_tars(
    source: Source, folder: Path, block_size: int, shard_size: int, seed: int, progress: bool
) -> list[dict[str, Any]]:
    num_images = int(source.images.shape[0])
    permutation = KeyedPermutation(num_images, seed, "shards")
    per_shard = block_size * -(-shard_size // block_size)
    shards = []
    with tqdm(total=num_images, desc="writing shards", unit="img", disable=not progress) as bar:
        for number, start in enumerate(range(0, num_images, per_shard)):
            name = f"shard-{number:05d}.tar"
            blocks: list[list[int]] = []
            with open(folder / name, "wb") as file:
                writer = webdataset.TarWriter(file, encoder=False, mtime=0)
                offset = 0
                for first in range(start, min(start + per_shard, num_images), block_size):
                    positions = np.arange(first, min(first + block_size, start + per_shard, num_images))
                    ids = permutation(positions)
                    images = _npy(np.ascontiguousarray(source.images[ids], dtype=np.uint8))
                    labels = _npy(np.ascontiguousarray(source.labels[ids], dtype="<i8"))
                    key = f"{first // block_size:08d}"
                    writer.write({"__key__": key, "images.npy": images.data, "labels.npy": labels.data})
                    at_images = offset + _TAR_BLOCK + images.header_bytes
                    offset += _TAR_BLOCK + _padded(len(images.data))
                    at_labels = offset + _TAR_BLOCK + labels.header_bytes
                    offset += _TAR_BLOCK + _padded(len(labels.data))
                    blocks.append([at_images, at_labels, len(ids), first])
                    bar.update(len(ids))
                writer.close()
                file.flush()
                os.fsync(file.fileno())
            path = folder / name
            shards.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "blocks": blocks})
    return shards


@dataclass(frozen=True)
class _Npy:
    data: bytes
    header_bytes: int


def _npy(array: np.ndarray) -> _Npy:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return _Npy(stream.getvalue(), len(stream.getvalue()) - array.nbytes)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _TAR_BLOCK) * _TAR_BLOCK


# ---- reading --------------------------------------------------------------------------------------------------------


class ShardSet:
    """The verified shards of one folder, open for random access. Make it with `open_shards`."""

    def __init__(self, folder: Path, index: dict[str, Any], what: str) -> None:
        self.folder = folder
        self._what = what
        try:
            self._read_index(index)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"it lacks or garbles {error}") from error
        self._maps: list[np.ndarray | None] = [None] * len(self._names)

    def _damaged(self, why: str) -> UserError:
        return UserError(f"The index {self.folder / INDEX} of {self._what} is damaged: {why}. Make the shards again.")

    def _read_index(self, index: dict[str, Any]) -> None:
        if index.get("format") != FORMAT:
            raise UserError(f"{self.folder / INDEX} is not an index of shards (its format is {index.get('format')!r}).")
        if index.get("version") != VERSION:
            raise UserError(
                f"{self.folder / INDEX} has version {index.get('version')!r}; this program reads version {VERSION}. "
                "Make the shards again with tools/shard_dataset.py."
            )
        self.dataset = str(index["dataset"])
        self.class_names = tuple(str(name) for name in index["class_names"])
        self.num_classes = len(self.class_names)
        height, width, channels = (int(n) for n in index["image_shape"])
        self.image_shape = (height, width, channels)
        self.num_images = int(index["num_images"])
        self.class_counts = tuple(int(n) for n in index["class_counts"])
        self.source_files = list(index["source"])
        self.permutation_seed = int(index["permutation"]["seed"])
        self._names = [str(shard["name"]) for shard in index["shards"]]
        self._bytes = [int(shard["bytes"]) for shard in index["shards"]]
        self._sha256 = [str(shard["sha256"]) for shard in index["shards"]]
        for name in self._names:
            if not _SHARD_NAME.fullmatch(name):  # nothing outside the folder is ever opened
                raise self._damaged(f"{name!r} is no name of a shard")
        blocks = [np.asarray(shard["blocks"], dtype=np.int64).reshape(-1, 4) for shard in index["shards"]]
        self._shard_of_block = np.repeat(np.arange(len(blocks)), [len(b) for b in blocks])
        table = np.concatenate(blocks) if blocks else np.zeros((0, 4), np.int64)
        self._image_offset, self._label_offset, counts, self._first = np.ascontiguousarray(table.T)
        self._image_bytes = height * width * channels
        ends = np.asarray(self._bytes, np.int64)[self._shard_of_block] if len(table) else table[:, 0]
        if (
            self.num_images < 1
            or min(self.image_shape) < 1
            or int(index["permutation"]["n"]) != self.num_images
            or (counts < 1).any()
            or (self._first != np.concatenate([[0], np.cumsum(counts)[:-1]])).any()
            or int(counts.sum()) != self.num_images
            # By division, so that no number of a damaged index can overflow.
            or (self._image_offset < 0).any()
            or (counts > (ends - self._image_offset) // self._image_bytes).any()
            or (self._label_offset < 0).any()
            or (counts > (ends - self._label_offset) // 8).any()
            or not self._labels_follow_images(counts)
            or min(self.class_counts) < 0
            or sum(self.class_counts) != self.num_images
            or len(self.class_counts) != self.num_classes
        ):
            raise self._damaged("its counts and offsets contradict each other")

    def _labels_follow_images(self, counts: np.ndarray) -> bool:
        # Between them lie padding (less than a tar block), a tar header (one) and an npy header (less than one): any
        # other distance means that `image_shape` or an offset is wrong.
        gap = self._label_offset - (self._image_offset + counts * self._image_bytes)
        return bool(((gap > _TAR_BLOCK) & (gap < 3 * _TAR_BLOCK)).all())

    def __len__(self) -> int:
        return self.num_images

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files and computes the permutation anew.
        state = {key: value for key, value in self.__dict__.items() if key != "permutation"}
        return {**state, "_maps": [None] * len(self._names)}

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' own sha256: names the data, whatever folder they lie in."""
        return hashlib.sha256("\n".join(self._sha256).encode()).hexdigest()

    @cached_property
    def permutation(self) -> KeyedPermutation:
        """position -> source id; its `inverse` is source id -> position."""
        return KeyedPermutation(self.num_images, self.permutation_seed, "shards")

    def verify(self, *, full: bool = False) -> None:
        """Check that every shard is there, has its size and (once per file and remembered, or always if `full`) its hash.

        Raises:
            UserError: names the shard that is missing or damaged.
        """
        remembered = {} if full else self._remembered()
        checked: dict[str, list[int]] = {}
        for name, size, sha256 in zip(self._names, self._bytes, self._sha256, strict=True):
            path = self.folder / name
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(
                    f"The shard {path} of {self._what} cannot be opened ({error.strerror}). "
                    "Bring it back, or make the shards again with tools/shard_dataset.py."
                ) from error
            wrong = f"it has {stat.st_size} bytes instead of {size}" if stat.st_size != size else ""
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            if not wrong and remembered.get(f"{name}:{sha256}") != stamp and _sha256_of_shard(path) != sha256:
                wrong = "its sha256 is not the one in the index"
            if wrong:
                raise UserError(
                    f"The shard {path} of {self._what} is damaged: {wrong}. "
                    "Copy it again, or make the shards again with tools/shard_dataset.py."
                )
            checked[f"{name}:{sha256}"] = stamp
        if checked != remembered and os.access(self.folder, os.W_OK):
            with suppress(UserError):  # only a memory aid: without it everything is hashed again
                write_json(self.folder / ".verified.json", checked)

    def _remembered(self) -> dict[str, Any]:
        path = self.folder / ".verified.json"
        if not path.is_file():
            return {}
        try:
            return read_json(path, "record of verified shards")
        except UserError:
            return {}

    def images(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [m, H, W, C] of the samples at `positions` [m]."""
        rows = self._gather(positions, self._image_offset, self._image_bytes)
        return rows.reshape(len(rows), *self.image_shape)

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m] of the samples at `positions` [m], as stored (before any label noise)."""
        rows = self._gather(positions, self._label_offset, 8)
        return rows.reshape(-1).view("<i8").astype(np.int64)

    def labels_in_source_order(self) -> np.ndarray:
        """int64 [N]: all labels by source id."""
        labels = np.empty(self.num_images, np.int64)
        positions = np.arange(self.num_images)
        labels[self.permutation(positions)] = self.labels(positions)
        return labels

    def images_in_source_order(self) -> np.ndarray:
        """uint8 [N, H, W, C]: all images by source id, in memory."""
        return self.images(self.permutation.inverse(np.arange(self.num_images)))

    def _gather(self, positions: np.ndarray, offsets: np.ndarray, row_bytes: int) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.num_images), "no such sample"
        block = np.searchsorted(self._first, positions, side="right") - 1
        start = offsets[block] + (positions - self._first[block]) * row_bytes
        shard = self._shard_of_block[block]
        out = np.empty((len(positions), row_bytes), np.uint8)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            flat = self._map(int(number))
            # Every byte offset is a possible row: one gather copies the wanted rows and nothing else.
            windows = np.lib.stride_tricks.as_strided(
                flat, (len(flat) - row_bytes + 1, row_bytes), (1, 1), writeable=False
            )
            out[here] = windows[start[here]]
        return out

    def _map(self, number: int) -> np.ndarray:
        mapped = self._maps[number]
        if mapped is None:
            path = self.folder / self._names[number]
            try:
                mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=(self._bytes[number],)))
            except (OSError, ValueError) as error:
                raise UserError(f"The shard {path} cannot be read ({error}).") from error
            self._maps[number] = mapped
        return mapped


def _sha256_of_shard(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"The shard {path} cannot be read ({error.strerror}). Copy it again.") from error


def open_shards(folder: str | Path, what: str = "the data", *, commands: Sequence[str] = ()) -> ShardSet:
    """The shards in `folder`, whose index is read and checked; call `verify` before trusting the images.

    Args:
        folder: where `tools/shard_dataset.py` wrote.
        what: names the data in errors, for instance the recipe key that gives `folder`.
        commands: what to type to make these shards, shown where they are missing.

    Raises:
        UserError: no such folder or index, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        way_out = (
            "Prepare them with:\n  " + "\n  ".join(commands) if commands else "Make them with tools/shard_dataset.py."
        )
        raise UserError(f"There are no shards of {what} at {folder} (no {INDEX}). {way_out}")
    return ShardSet(folder, read_json(folder / INDEX, f"index of {what}"), what)
