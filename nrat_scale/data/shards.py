"""Shards of one index, local or behind an address: opened, verified, and read at random positions.

A sample is copied out of a memory map at the offset that the index states; no tar is parsed and nothing is unpickled.
Shards behind an address (https://, s3://, hf://) are read through a cache of verified files. `nrat_scale.data.index`
describes the format.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import parse_json, read_json, sha256_of, write_json
from nrat_scale.data.index import INDEX, REMAKE, ShardIndex
from nrat_scale.remote.address import expand, is_remote
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.transfer import fetch_bytes

assert sys.byteorder == "little", "shards hold little-endian integers, which are read without conversion"

_MAX_INDEX_BYTES = 1 << 30
_CHUNK_IMAGES = 4096  # copied at a time
_MAX_EVICTIONS = 10  # retries after a shard was evicted from a too small cache before it was opened
_MAX_OPEN = 4096  # memory maps of local shards; Linux allows 65,530
_RESTORE = "Restore it, or make the shards again with tools/shard_dataset.py."
_VERIFIED = ".verified.json"  # shard and sha256 -> size, time, inode of the file that was hashed


class ShardUnusable(UserError):
    """A shard is missing or damaged for good. `name` is its name in the index, `reason` what is wrong."""

    def __init__(self, message: str, name: str, reason: str) -> None:
        super().__init__(message)
        self.name, self.reason = name, reason


class ShardSet(ShardIndex):
    """The shards of one index, open for random access. Make it with `open_shards`.

    Attributes:
        folder: a path, or an address without a slash at its end.
        unusable: shards found missing or damaged, by number; they are not read.
        max_open: number of memory maps that are kept.
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
        super().__init__(index, f"{folder}/{INDEX}", what, only)
        self.folder = folder
        self.unusable: dict[int, ShardUnusable] = {}
        self.max_open = _MAX_OPEN
        self._cache = cache
        self._maps: OrderedDict[int, tuple[memoryview, memoryview]] = OrderedDict()

    @property
    def is_remote(self) -> bool:
        """Whether the shards are behind an address."""
        return self._cache is not None

    # ---- verification ----

    def verify(self, *, full: bool = False) -> None:
        """Check presence, size and hash of every local shard; remote shards are verified when they arrive.

        Each file is hashed once and the result remembered; `full` hashes every file again.

        Raises:
            ShardUnusable: names the missing or damaged shard.
        """
        for error in self.check(full=full).values():
            raise error

    def check(self, *, full: bool = False) -> dict[int, ShardUnusable]:
        """Like `verify`, but find every unusable shard and keep them in `unusable`."""
        if self._cache is not None:
            return {}
        record = Path(self.folder) / _VERIFIED
        remembered = {} if full else _read_record(record)
        verified: dict[str, list[int]] = {}
        self.unusable = {}
        for number, name in enumerate(self.names):
            key = f"{name}:{self._sha256[number]}"
            try:
                verified[key] = self._verified(number, remembered.get(key))
            except ShardUnusable as error:
                self.unusable[number] = error
        if {**remembered, **verified} != remembered and os.access(self.folder, os.W_OK):
            with suppress(UserError):  # without the record everything is hashed again
                write_json(record, {**remembered, **verified})
        return self.unusable

    def _verified(self, number: int, remembered: list[int] | None) -> list[int]:
        """Size, time and inode of a local shard, hashed unless they are the `remembered` ones."""
        path, size = Path(self.folder) / self.names[number], self._bytes[number]
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            wrong = f"it has {stat.st_size} bytes instead of {size}" if stat.st_size != size else ""
            if not wrong and remembered != stamp and sha256_of(path) != self._sha256[number]:
                wrong = "its sha256 is not the one in the index"
        except OSError as error:
            reason = str(error.strerror)
            raise self._unusable(
                number, reason, f"{path} of {self._what} cannot be opened ({reason}). {_RESTORE}"
            ) from error
        if wrong:
            raise self._unusable(number, wrong, f"{path} of {self._what} is damaged: {wrong}. {_RESTORE}")
        return stamp

    def _unusable(self, number: int, reason: str, sentence: str) -> ShardUnusable:
        return ShardUnusable(f"The shard {sentence}", self.names[number], reason)

    # ---- samples ----

    def rows(self, positions: np.ndarray) -> tuple[list[memoryview], np.ndarray]:
        """(pixels of each sample as views of the memory maps, H * W * C bytes each; labels int64 [m]) at `positions` [m].

        For batches: the caller copies the pixels once, into the batch.
        """
        block, offset = self._located(positions)
        shard = self._blocks.shard[block].tolist()
        data, integers = {}, {}
        for number in dict.fromkeys(shard):
            data[number], integers[number] = self._map(number)
        start = self._blocks.image_offset[block] + offset * self._image_bytes
        stop = start + self._image_bytes
        at_label = self._blocks.label_offset[block] // 8 + offset
        pixels = [data[n][i:j] for n, i, j in zip(shard, start.tolist(), stop.tolist(), strict=True)]
        labels = [integers[n][i] for n, i in zip(shard, at_label.tolist(), strict=True)]
        return pixels, self._checked_labels(np.asarray(labels, np.int64), positions)

    def images(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [m, H, W, C] of the samples at `positions` [m]."""
        out = np.empty((len(positions), self._image_bytes), np.uint8)
        for first in range(0, len(positions), _CHUNK_IMAGES):
            chunk = positions[first : first + _CHUNK_IMAGES]
            out[first : first + _CHUNK_IMAGES] = concatenated(self.rows(chunk)[0]).reshape(len(chunk), -1)
        return out.reshape(len(out), *self.image_shape)

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m] of the samples at `positions` [m], as stored (before any label noise)."""
        return self._checked_labels(self._integers(positions, self._blocks.label_offset), positions)

    def _checked_labels(self, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`labels`, each of which is a class: a shard can agree with its index and still have been made wrongly."""
        if len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
            at = int(np.flatnonzero((labels < 0) | (labels >= self.num_classes))[0])
            number = int(self.shards_of(np.asarray(positions)[[at]])[0])
            reason = f"it holds the label {labels[at]}, but there are {self.num_classes} classes"
            raise self._unusable(number, reason, f"{self.names[number]} of {self._what} is wrong: {reason}. {REMAKE}")
        return labels

    def _integers(self, positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """int64 [m] out of the members whose data begin at `offsets`, by block."""
        block, offset = self._located(positions)
        at, shard = offsets[block] // 8 + offset, self._blocks.shard[block]
        out = np.empty(len(at), np.int64)
        for number in np.unique(shard).tolist():
            here = shard == number
            out[here] = np.asarray(self._map(number)[1])[at[here]]
        return out

    # ---- source ids ----

    def source_ids(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]: the source ids of the samples at `positions` [m]."""
        positions = np.asarray(positions, np.int64)
        block, offset = self._located(positions)
        origin = self._blocks.origin[block] + offset
        ids = np.empty(len(positions), np.int64)
        for first, segment in zip(self._segment_starts, self.segments, strict=True):
            here = np.flatnonzero((origin >= first) & (origin < first + segment.num_images))
            if not len(here):
                continue
            if segment.seed is None:
                ids[here] = segment.first_id + self._integers(positions[here], self._blocks.id_offset)
            else:
                ids[here] = segment.first_id + segment.permutation(origin[here] - first)
        return ids

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [m]: the positions of the samples with the source ids [m]; -1 for an id without a sample in this set."""
        ids = np.asarray(ids, np.int64)
        positions = np.full(len(ids), -1)
        for first, segment in zip(self._segment_starts, self.segments, strict=True):
            here = np.flatnonzero((ids >= segment.first_id) & (ids < segment.first_id + segment.num_ids))
            if not len(here):
                continue
            if segment.seed is None:
                stored, order = self._stored_ids
                at = np.minimum(np.searchsorted(stored, ids[here]), len(stored) - 1)
                positions[here] = np.where(stored[at] == ids[here], order[at], -1)
                continue
            origin = first + segment.permutation.inverse(ids[here] - segment.first_id)
            block = np.searchsorted(self._blocks.origin, origin, side="right") - 1
            offset = origin - self._blocks.origin[block]
            kept = (block >= 0) & (offset < self._blocks.num_images[block])
            positions[here] = np.where(kept, self._first[block] + offset, -1)
        return positions

    @cached_property
    def _stored_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """(source ids, ascending; positions) of the samples whose blocks store ids."""
        blocks = np.flatnonzero(self._blocks.id_offset >= 0)
        positions = np.concatenate([self._first[b] + np.arange(self._blocks.num_images[b]) for b in blocks])
        ids = self.source_ids(positions)
        order = np.argsort(ids, kind="stable")
        return ids[order], positions[order]

    def first_in_source_order(self, count: int) -> np.ndarray:
        """int64 [count]: the positions of the samples with the smallest source ids."""
        positions = self.positions_of(np.arange(count))
        return self.in_source_order()[:count] if (positions < 0).any() else positions

    def in_source_order(self) -> np.ndarray:
        """int64 [N]: all positions, in the order of their source ids."""
        segment = self.segments[0]
        if len(self.segments) == 1 and segment.seed is not None and self.num_images == segment.num_images:
            return segment.permutation.inverse(np.arange(self.num_images))
        return np.argsort(self.source_ids(np.arange(self.num_images)), kind="stable")

    # ---- files ----

    def fetch(self, number: int, *, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The local, verified file of shard `number`; a remote one is fetched into the cache first.

        Raises:
            ShardUnusable: the shard is missing or damaged for good.
        """
        if number in self.unusable:
            raise self.unusable[number]
        name = self.names[number]
        if self._cache is None:
            return Path(self.folder) / name
        try:
            return self._cache.fetch(
                f"{self.folder}/{name}", self._bytes[number], self._sha256[number], stopped=stopped
            )
        except UserError as error:
            unusable = self._unusable(number, str(error), f"{name} of {self._what} cannot be used: {error}")
            self.unusable[number] = unusable
            raise unusable from error

    def open(self, number: int) -> None:
        """Map shard `number` into memory, unless it is mapped.

        Raises:
            ShardUnusable: the shard is missing or damaged for good.
        """
        self._map(number)

    def _map(self, number: int) -> tuple[memoryview, memoryview]:
        """The memory map of shard `number`, as bytes and as int64."""
        views = self._maps.get(number)
        if views is None:
            data = self._new_map(number)
            views = self._maps[number] = data, data[: len(data) // 8 * 8].cast("q")
            while len(self._maps) > self.max_open:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return views

    def _new_map(self, number: int) -> memoryview:
        evictions = 0
        while True:
            path = self.fetch(number)
            try:
                return np.memmap(path, dtype=np.uint8, mode="r", shape=(self._bytes[number],)).data
            except (OSError, ValueError) as error:
                evictions += 1
                if isinstance(error, FileNotFoundError) and self.is_remote and evictions < _MAX_EVICTIONS:
                    continue  # another process evicted it from the cache before it was opened here
                reason = f"it cannot be read ({error})"
                raise self._unusable(number, reason, f"{path}: {reason}.") from error


def concatenated(pixels: Sequence[memoryview]) -> np.ndarray:
    """uint8 [total bytes], writable: one copy."""
    return np.frombuffer(bytearray().join(pixels), np.uint8)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "record of verified shards")
    except UserError:
        return {}


def open_shards(
    where: str | Path, what: str = "the data", *, commands: Sequence[str] = (), cache: Cache | None = None
) -> ShardSet:
    """The shards at `where`, with a checked index; call `verify` before trusting the images.

    Args:
        where: a folder written by `tools/shard_dataset.py`, or its address (https://, s3://, hf://datasets/...); with
            `/NAME.tar` or `/shard-{00000..00009}.tar` at the end, only those of its shards.
        what: names the data in errors, for instance the recipe key that gives `where`.
        commands: make these shards; shown if they are missing.
        cache: of remote shards; None is the default one.

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
