"""Shards: plain WebDataset tars of image blocks, and the index by which they are verified and randomly accessed.

    DIR/shard-00000.tar   members 00000000.images.npy (uint8 [n, H, W, C]), 00000000.labels.npy (int64 [n]), 00000001...
    DIR/index.json        written last: everything else trusts only this file

DIR is a local folder or an address (https://, s3://, hf://); shards behind an address are read through a cache of
verified files. Sample *positions* 0..N-1 are the order in the shards; *source ids* name the samples in the order of the
files that were converted. Shards are permuted when they are written, because published files are sorted by class; the
index names the permutation, so each can be computed from the other. Blocks stand at known offsets: reading a sample is
one copy out of a memory map, and no tar is parsed nor anything unpickled. docs/data.md has every field.
"""

import hashlib
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import parse_json, read_json, sha256_of, write_json
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.remote.address import expand, is_remote
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.transfer import fetch_bytes

assert sys.byteorder == "little", "shards hold little-endian integers and are read where they lie"

FORMAT, VERSION = "nrat_scale.shards", 2
INDEX = "index.json"
PERMUTATION = "shards"  # names the stream of the permutation, as in `seeds.derive`
TAR_BLOCK = 512  # bytes
_MAX_INDEX_BYTES = 1 << 30
_SHARD_NAME = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)*[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
_GATHERED = 4096  # images copied at a time
_MAX_REMOVED = 10  # times that a shard vanishes from a cache that is far too small
_MAX_OPEN = 4096  # memory maps of local shards; far below the 65,530 that Linux admits
_REMAKE = "Make the shards again with tools/shard_dataset.py."


class ShardUnusable(UserError):
    """A shard is missing or damaged, and stays so. `name` is its name in the index, `reason` what is wrong."""

    def __init__(self, message: str, name: str, reason: str) -> None:
        super().__init__(message)
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class Segment:
    """Consecutive positions that were converted together.

    Attributes:
        num_images: positions of this part.
        first_id: its source ids are `first_id` .. `first_id + num_ids - 1`.
        num_ids: equal to `num_images` where the order is a permutation.
        seed: of the permutation; None where each block stores its ids.
    """

    num_images: int
    first_id: int
    num_ids: int
    seed: int | None

    @cached_property
    def permutation(self) -> KeyedPermutation:
        """Position within the part -> source id less `first_id`."""
        assert self.seed is not None
        return KeyedPermutation(self.num_images, self.seed, PERMUTATION)

    def __getstate__(self) -> dict[str, Any]:
        # The table of a permutation is computed anew in a worker process.
        return {key: value for key, value in self.__dict__.items() if key != "permutation"}


class Block(NamedTuple):
    """Where the data of one block stand in its shard, in bytes.

    Attributes:
        id_offset: -1 where the block stores no ids.
        num_ids: stored ids are below it.
    """

    image_offset: int
    label_offset: int
    num_images: int
    id_offset: int
    num_ids: int


class ShardSet:
    """The shards of one index, open for random access. Make it with `open_shards`.

    Attributes:
        folder: where the shards are, a path or an address.
        dataset, class_names, class_counts, image_shape ((H, W, C)), num_images, source_files: of the index.
        names: of the shards, as in the index.
        unusable: what was found missing or damaged; these shards are not read.
        max_open: how many memory maps are kept.
        shard_starts: int64 [S + 1]; shard s holds the positions shard_starts[s] .. shard_starts[s + 1] - 1.
    """

    def __init__(
        self,
        folder: Path | str,
        index: dict[str, Any],
        what: str,
        *,
        only: Sequence[str] | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.folder = folder
        self._what = what
        self._cache = cache
        try:
            self._read_index(index, only)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"it lacks or garbles {error}") from error
        self._maps: OrderedDict[int, tuple[memoryview, memoryview]] = OrderedDict()
        self.unusable: dict[int, ShardUnusable] = {}
        self.max_open = _MAX_OPEN

    # ---- the index ----

    @property
    def _index_path(self) -> str:
        return f"{str(self.folder).rstrip('/')}/{INDEX}"

    def _damaged(self, why: str) -> UserError:
        return UserError(f"The index {self._index_path} of {self._what} is damaged: {why}. {_REMAKE}")

    def _read_index(self, index: dict[str, Any], only: Sequence[str] | None) -> None:
        if index.get("format") != FORMAT:
            raise UserError(f"{self._index_path} is not an index of shards (its format is {index.get('format')!r}).")
        version = index.get("version")
        if version != VERSION:
            newer = isinstance(version, int) and version > VERSION
            way_out = "Update nrat_scale." if newer else _REMAKE
            raise UserError(
                f"{self._index_path} has version {version!r}; this program reads version {VERSION}. {way_out}"
            )
        self.dataset = str(index["dataset"])
        self.class_names = tuple(str(name) for name in index["class_names"])
        self.num_classes = len(self.class_names)
        height, width, channels = (int(n) for n in index["image_shape"])
        self.image_shape = (height, width, channels)
        if min(self.image_shape) < 1:
            raise self._damaged(f"its image shape is {list(self.image_shape)}")
        self.source_files = list(index["source"])
        self.parts = [
            Segment(int(part["num_images"]), int(part["first_id"]), int(part["num_ids"]), _optional_int(part["seed"]))
            for part in index["parts"]
        ]
        entries = list(index["shards"])
        for entry in entries:
            if not _SHARD_NAME.fullmatch(str(entry["name"])):  # nothing outside the folder is ever opened
                raise self._damaged(f"{entry['name']!r} is no name of a shard")
        self._read_shards(entries, int(index["num_images"]))
        if self._class_counts.sum(axis=0).tolist() != list(index["class_counts"]):
            raise self._damaged("its counts contradict each other")
        self._keep(only)

    def _read_shards(self, entries: list[dict[str, Any]], num_images: int) -> None:
        self.names = [str(entry["name"]) for entry in entries]
        self._bytes = [int(entry["bytes"]) for entry in entries]
        self._sha256 = [str(entry["sha256"]) for entry in entries]
        self._class_counts = np.asarray([entry["class_counts"] for entry in entries], np.int64)
        # Blocks that store no ids have three numbers, the others four.
        blocks = [[*block, -1] if len(block) == 3 else block for entry in entries for block in entry["blocks"]]
        table = np.asarray(blocks, np.int64).reshape(-1, 4)
        self._shard_of_block = np.repeat(np.arange(len(entries)), [len(entry["blocks"]) for entry in entries])
        self._image_offset, self._label_offset, self._counts, self._id_offset = np.ascontiguousarray(table.T)
        self._image_bytes = math.prod(self.image_shape)
        self._origin = np.cumsum(self._counts) - self._counts  # position in the whole index of a block's first image
        ends = np.asarray(self._bytes, np.int64)[self._shard_of_block]
        per_shard = np.bincount(self._shard_of_block, self._counts, len(entries)).astype(np.int64)
        part_ends = np.cumsum([part.num_images for part in self.parts])
        stored = [part.seed is None for part in self.parts]
        if (
            not entries
            or not self.parts
            or len(set(self.names)) != len(self.names)
            or num_images < 1
            or (self._counts < 1).any()
            or int(self._counts.sum()) != num_images
            or int(part_ends[-1]) != num_images
            or any(min(part.num_images, part.num_ids) < 1 or part.first_id < 0 for part in self.parts)
            or any(part.seed is not None and part.num_ids != part.num_images for part in self.parts)
            # By division, so that no number of a damaged index can overflow.
            or not self._fits(self._image_offset, ends, self._image_bytes).all()
            or not self._fits(self._label_offset, ends, 8).all()
            or not self._fits(self._id_offset, ends, 8)[self._id_offset != -1].all()
            or (self._label_offset % 8).any()
            or (self._id_offset[self._id_offset != -1] % 8).any()
            or not self._labels_follow_images()
            or ((self._id_offset >= 0) != np.asarray(stored)[np.searchsorted(part_ends, self._origin, "right")]).any()
            or self._class_counts.shape != (len(entries), self.num_classes)
            or (self._class_counts < 0).any()
            or (self._class_counts.sum(axis=1) != per_shard).any()
        ):
            raise self._damaged("its counts and offsets contradict each other")

    def _fits(self, offsets: np.ndarray, ends: np.ndarray, row_bytes: int) -> np.ndarray:
        return np.asarray((offsets >= 0) & (self._counts <= (ends - offsets) // row_bytes))

    def _labels_follow_images(self) -> bool:
        # Between them lie padding (less than a tar block), a tar header (one) and an npy header (less than one): any
        # other distance means that `image_shape` or an offset is wrong.
        gap = self._label_offset - (self._image_offset + self._counts * self._image_bytes)
        return bool(((gap > TAR_BLOCK) & (gap < 3 * TAR_BLOCK)).all())

    def _keep(self, only: Sequence[str] | None) -> None:
        """Restrict the set to the shards named `only` (all where None) and number the positions."""
        if only is not None:
            unknown = sorted(set(only) - set(self.names))
            if unknown:
                raise UserError(f"{self._index_path} lists no shard {unknown[0]}; it has {len(self.names)} others.")
            kept = [number for number, name in enumerate(self.names) if name in set(only)]
            blocks = np.isin(self._shard_of_block, kept)
            self._shard_of_block = np.searchsorted(kept, self._shard_of_block[blocks])
            for name in ("_image_offset", "_label_offset", "_counts", "_id_offset", "_origin"):
                setattr(self, name, getattr(self, name)[blocks])
            self.names = [self.names[number] for number in kept]
            self._bytes = [self._bytes[number] for number in kept]
            self._sha256 = [self._sha256[number] for number in kept]
            self._class_counts = self._class_counts[kept]
        self.num_images = int(self._counts.sum())
        self.class_counts = tuple(self._class_counts.sum(axis=0).tolist())
        self._first = np.cumsum(self._counts) - self._counts
        per_shard = np.bincount(self._shard_of_block, self._counts, len(self.names)).astype(np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(per_shard)])

    def __len__(self) -> int:
        return self.num_images

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files anew.
        return {**self.__dict__, "_maps": OrderedDict()}

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie behind an address."""
        return self._cache is not None

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' own sha256: names the data, whatever folder they lie in."""
        return hashlib.sha256("\n".join(self._sha256).encode()).hexdigest()

    def bytes_of(self, numbers: Sequence[int]) -> int:
        """The size of some shards together."""
        return sum(self._bytes[number] for number in numbers)

    def blocks_of(self, number: int) -> list[Block]:
        """The blocks of shard `number`, in their order."""
        here = np.flatnonzero(self._shard_of_block == number)
        columns = (self._image_offset, self._label_offset, self._counts, self._id_offset)
        part_ends = np.cumsum([part.num_images for part in self.parts])
        parts = np.searchsorted(part_ends, self._origin[here], "right")
        num_ids = [self.parts[part].num_ids for part in parts]
        return [Block(*row) for row in zip(*(column[here].tolist() for column in columns), num_ids, strict=True)]

    def class_counts_of(self, number: int) -> np.ndarray:
        """int64 [K]: the images of each class in shard `number`, as the index states them."""
        return np.asarray(self._class_counts[number])

    @property
    def num_ids(self) -> int:
        """The source ids lie in 0 .. num_ids - 1."""
        return max(part.first_id + part.num_ids for part in self.parts)

    # ---- verification ----

    def verify(self, *, full: bool = False) -> None:
        """Check that every local shard is there, has its size and its hash; remote ones are verified as they arrive.

        A hash is computed once per file and remembered, or always if `full`.

        Raises:
            ShardUnusable: names the shard that is missing or damaged.
        """
        for error in self.check(full=full).values():
            raise error

    def check(self, *, full: bool = False) -> dict[int, ShardUnusable]:
        """As `verify`, but finds every unusable shard and keeps them in `unusable`."""
        if self._cache is not None:
            return {}
        assert isinstance(self.folder, Path)
        remembered = {} if full else _remembered(self.folder)
        checked: dict[str, list[int]] = {}
        self.unusable = {}
        for number, name in enumerate(self.names):
            try:
                stamp = self._checked(number, remembered)
            except ShardUnusable as error:
                self.unusable[number] = error
            else:
                checked[f"{name}:{self._sha256[number]}"] = stamp
        if {**remembered, **checked} != remembered and os.access(self.folder, os.W_OK):
            with suppress(UserError):  # only a memory aid: without it everything is hashed again
                write_json(self.folder / ".verified.json", {**remembered, **checked})
        return self.unusable

    def _checked(self, number: int, remembered: dict[str, Any]) -> list[int]:
        assert isinstance(self.folder, Path)
        name, size, sha256 = self.names[number], self._bytes[number], self._sha256[number]
        path = self.folder / name
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            wrong = f"it has {stat.st_size} bytes instead of {size}" if stat.st_size != size else ""
            if not wrong and remembered.get(f"{name}:{sha256}") != stamp and sha256_of(path) != sha256:
                wrong = "its sha256 is not the one in the index"
        except OSError as error:
            raise ShardUnusable(
                f"The shard {path} of {self._what} cannot be opened ({error.strerror}). "
                "Bring it back, or make the shards again with tools/shard_dataset.py.",
                name,
                str(error.strerror),
            ) from error
        if wrong:
            raise ShardUnusable(
                f"The shard {path} of {self._what} is damaged: {wrong}. "
                "Copy it again, or make the shards again with tools/shard_dataset.py.",
                name,
                wrong,
            )
        return stamp

    # ---- samples ----

    def rows(self, positions: np.ndarray) -> tuple[list[memoryview], np.ndarray]:
        """(the pixels of each sample where they lie, H * W * C bytes each; labels int64 [m]) at `positions` [m].

        For batches: the caller copies the pixels once, to where he needs them.
        """
        block, offset = self._located(positions)
        shard = self._shard_of_block[block].tolist()
        data, integers = {}, {}
        for number in dict.fromkeys(shard):
            data[number], integers[number] = self._map(number)
        start = self._image_offset[block] + offset * self._image_bytes
        stop = start + self._image_bytes
        at_label = self._label_offset[block] // 8 + offset
        pixels = [data[n][i:j] for n, i, j in zip(shard, start.tolist(), stop.tolist(), strict=True)]
        labels = [integers[n][i] for n, i in zip(shard, at_label.tolist(), strict=True)]
        return pixels, self._checked_labels(np.asarray(labels, np.int64), positions)

    def images(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [m, H, W, C] of the samples at `positions` [m]."""
        out = np.empty((len(positions), self._image_bytes), np.uint8)
        for first in range(0, len(positions), _GATHERED):
            part = positions[first : first + _GATHERED]
            out[first : first + _GATHERED] = concatenated(self.rows(part)[0]).reshape(len(part), -1)
        return out.reshape(len(out), *self.image_shape)

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m] of the samples at `positions` [m], as stored (before any label noise)."""
        return self._checked_labels(self._integers(positions, self._label_offset), positions)

    def _checked_labels(self, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`labels`, each of which is a class: shards that agree with their index can still have been made wrongly."""
        if len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
            at = int(np.flatnonzero((labels < 0) | (labels >= self.num_classes))[0])
            name = self.names[int(self.shards_of(np.asarray(positions)[[at]])[0])]
            reason = f"it holds the label {labels[at]}, but there are {self.num_classes} classes"
            raise ShardUnusable(f"The shard {name} of {self._what} is wrong: {reason}. {_REMAKE}", name, reason)
        return labels

    def source_ids(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]: the source ids of the samples at `positions` [m]."""
        positions = np.asarray(positions, np.int64)
        block, offset = self._located(positions)
        origin = self._origin[block] + offset
        ids = np.empty(len(positions), np.int64)
        for first, part in zip(self._part_starts, self.parts, strict=True):
            here = np.flatnonzero((origin >= first) & (origin < first + part.num_images))
            if not len(here):
                continue
            if part.seed is None:
                ids[here] = part.first_id + self._integers(positions[here], self._id_offset)
            else:
                ids[here] = part.first_id + part.permutation(origin[here] - first)
        return ids

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [m]: the positions of the samples with the source ids [m]; -1 where there is no such sample here."""
        ids = np.asarray(ids, np.int64)
        positions = np.full(len(ids), -1)
        for first, part in zip(self._part_starts, self.parts, strict=True):
            here = np.flatnonzero((ids >= part.first_id) & (ids < part.first_id + part.num_ids))
            if not len(here):
                continue
            if part.seed is None:
                stored, order = self._stored_ids
                at = np.minimum(np.searchsorted(stored, ids[here]), len(stored) - 1)
                positions[here] = np.where(stored[at] == ids[here], order[at], -1)
                continue
            origin = first + part.permutation.inverse(ids[here] - part.first_id)
            block = np.searchsorted(self._origin, origin, side="right") - 1
            offset = origin - self._origin[block]
            there = (block >= 0) & (offset < self._counts[block])
            positions[here] = np.where(there, self._first[block] + offset, -1)
        return positions

    @cached_property
    def _part_starts(self) -> np.ndarray:
        sizes = np.asarray([part.num_images for part in self.parts])
        return np.asarray(np.cumsum(sizes) - sizes)

    @cached_property
    def _stored_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """(source ids, ascending; positions) of the samples whose ids are stored in their blocks."""
        blocks = np.flatnonzero(self._id_offset >= 0)
        positions = np.concatenate([self._first[b] + np.arange(self._counts[b]) for b in blocks])
        ids = self.source_ids(positions)
        order = np.argsort(ids, kind="stable")
        return ids[order], positions[order]

    def first_in_source_order(self, count: int) -> np.ndarray:
        """int64 [count]: the positions of the samples with the smallest source ids."""
        positions = self.positions_of(np.arange(count))
        return self.in_source_order()[:count] if (positions < 0).any() else positions

    def in_source_order(self) -> np.ndarray:
        """int64 [N]: all positions, in the order of their source ids."""
        if len(self.parts) == 1 and self.parts[0].seed is not None and self.num_images == self.parts[0].num_images:
            return self.parts[0].permutation.inverse(np.arange(self.num_images))
        return np.argsort(self.source_ids(np.arange(self.num_images)), kind="stable")

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]: which shards hold the samples at `positions` [m]."""
        return np.searchsorted(self.shard_starts, positions, side="right") - 1

    def _located(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, place in it), int64 [m] each."""
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.num_images), "no such sample"
        block = np.searchsorted(self._first, positions, side="right") - 1
        return block, positions - self._first[block]

    def _integers(self, positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """int64 [m] out of the members whose data stand at `offsets` by block."""
        block, offset = self._located(positions)
        at, shard = offsets[block] // 8 + offset, self._shard_of_block[block]
        out = np.empty(len(at), np.int64)
        for number in np.unique(shard).tolist():
            here = shard == number
            out[here] = np.asarray(self._map(number)[1])[at[here]]
        return out

    def fetch(self, number: int, *, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The local, verified file of shard `number`; one behind an address is fetched into the cache first.

        Raises:
            ShardUnusable: it stays missing or damaged.
        """
        if number in self.unusable:
            raise self.unusable[number]
        if self._cache is None:
            return Path(self.folder) / self.names[number]
        url = f"{self.folder}/{self.names[number]}"
        try:
            return self._cache.fetch(url, self._bytes[number], self._sha256[number], stopped=stopped)
        except UserError as error:
            message = f"The shard {self.names[number]} of {self._what} cannot be used: {error}"
            self.unusable[number] = ShardUnusable(message, self.names[number], str(error))
            raise self.unusable[number] from error

    def open(self, number: int) -> None:
        """Map shard `number` into memory, unless it is already.

        Raises:
            ShardUnusable: it stays missing or damaged.
        """
        self._map(number)

    def _map(self, number: int) -> tuple[memoryview, memoryview]:
        """Shard `number` in memory: as bytes and as int64."""
        mapped = self._maps.get(number)
        if mapped is None:
            data = self._mapped(number)
            mapped = self._maps[number] = data, data[: len(data) // 8 * 8].cast("q")
            while len(self._maps) > self.max_open:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return mapped

    def _mapped(self, number: int) -> memoryview:
        tries = 1 if self._cache is None else _MAX_REMOVED
        while True:
            path = self.fetch(number)
            tries -= 1
            try:
                return np.memmap(path, dtype=np.uint8, mode="r", shape=(self._bytes[number],)).data
            except (OSError, ValueError) as error:
                if isinstance(error, FileNotFoundError) and tries:
                    continue  # another process needed its room in the cache before it was opened here
                reason = f"it cannot be read ({error})"
                raise ShardUnusable(f"The shard {path}: {reason}.", self.names[number], reason) from error


def concatenated(pixels: Sequence[memoryview]) -> np.ndarray:
    """uint8 [bytes of all], writable: one copy."""
    return np.frombuffer(bytearray().join(pixels), np.uint8)


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def _remembered(folder: Path) -> dict[str, Any]:
    path = folder / ".verified.json"
    if not path.is_file():
        return {}
    try:
        return read_json(path, "record of verified shards")
    except UserError:
        return {}


def open_shards(
    where: str | Path, what: str = "the data", *, commands: Sequence[str] = (), cache: Cache | None = None
) -> ShardSet:
    """The shards at `where`, whose index is read and checked; call `verify` before trusting the images.

    Args:
        where: the folder that `tools/shard_dataset.py` wrote, or its address (https://, s3://, hf://datasets/...);
            followed by `/NAME.tar` or `/shard-{00000..00009}.tar`, only those of its shards.
        what: names the data in errors, for instance the recipe key that gives `where`.
        commands: what to type to make these shards, shown where they are missing.
        cache: where remote shards are kept; the default one where None.

    Raises:
        UserError: no such folder, address or index, or a damaged one.
    """
    folder, only = expand(str(where))
    if is_remote(folder):
        data = fetch_bytes(f"{folder}/{INDEX}", _MAX_INDEX_BYTES)
        index = parse_json(data, f"index of {what}", f"{folder}/{INDEX}")
        return ShardSet(folder, index, what, only=only, cache=cache or Cache())
    path = Path(folder) / INDEX
    if not path.is_file():
        way_out = (
            "Prepare them with:\n  " + "\n  ".join(commands) if commands else "Make them with tools/shard_dataset.py."
        )
        raise UserError(f"There are no shards of {what} at {folder} (no {INDEX}). {way_out}")
    return ShardSet(Path(folder), read_json(path, f"index of {what}"), what, only=only)
