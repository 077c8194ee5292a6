"""Open, verify and randomly read the shards of one index, local or remote.

A sample is copied out of a memory map at the offset that the index states; no tar is parsed and nothing is unpickled.
Shards behind an address (https://, s3://, hf://) are read through a cache of verified files. `nrat_scale.data.index`
describes the format.
"""

import itertools
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import parse_json, read_json, sha256_of, write_json
from nrat_scale.data.index import INDEX, REMAKE, ShardIndex
from nrat_scale.remote.address import expand, is_remote
from nrat_scale.remote.cache import Cache, file_stamp
from nrat_scale.remote.transfer import fetch_bytes

assert sys.byteorder == "little", "shards hold little-endian integers, which are read without conversion"

_MAX_INDEX_BYTES = 1 << 30
_CHUNK_IMAGES = 4096  # copied at a time
_MAX_ATTEMPTS = 10  # to open a shard that other processes evict from a too small cache
_MAX_OPEN = 4096  # memory maps of local shards; Linux allows 65,530
_RESTORE = "Restore it, or make the shards again with python -m nrat_scale.prepare."
_VERIFIED = ".verified.json"  # shard and sha256 -> stamp of the file that was hashed


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
        only: Sequence[str] | None = None,
        cache: Cache | None = None,
    ) -> None:
        super().__init__(index, f"{folder}/{INDEX}", what, only)
        self.folder = folder
        self.unusable: dict[int, ShardUnusable] = {}
        self.max_open = _MAX_OPEN
        self._cache = cache
        self._maps: OrderedDict[int, tuple[memoryview, memoryview]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without memory maps: a worker process that unpickles it maps the files again."""
        return {**self.__dict__, "_maps": OrderedDict()}

    @property
    def is_remote(self) -> bool:
        """Whether the shards are behind an address."""
        return self._cache is not None

    def verify(self, *, full: bool = False) -> None:
        """Check size and hash of every local shard; raises `ShardUnusable` for the first missing or damaged one.

        Each file is hashed once and the result remembered; `full` hashes every file again. Remote shards are verified
        when they arrive.
        """
        for error in self.check(full=full).values():
            raise error

    def check(self, *, full: bool = False) -> dict[int, ShardUnusable]:
        """Like `verify`, but find all unusable shards, and keep and return them in `unusable`."""
        if self._cache is not None:
            return {}
        record = Path(self.folder) / _VERIFIED
        remembered: dict[str, Any] = {}
        if not full:
            with suppress(UserError):
                remembered = read_json(record, "record of verified shards")
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
        """The stamp of a local shard, which is hashed unless the stamp is the `remembered` one."""
        path, size = Path(self.folder) / self.names[number], self.shard_bytes[number]
        try:
            stamp = file_stamp(path)
            if stamp[0] != size:
                raise self._unusable(number, f"it has {stamp[0]} bytes instead of {size}")
            if remembered != stamp and sha256_of(path) != self._sha256[number]:
                raise self._unusable(number, "its sha256 is not the one in the index")
        except OSError as error:
            raise self._unusable(number, f"it cannot be opened ({error.strerror})") from error
        return stamp

    def _unusable(self, number: int, reason: str, way_out: str = _RESTORE) -> ShardUnusable:
        name = self.names[number]
        message = f"The shard {self.folder}/{name} of {self._what} cannot be used: {reason}. {way_out}"
        return ShardUnusable(message, name, reason)

    def rows(self, positions: np.ndarray) -> tuple[list[memoryview], np.ndarray]:
        """(pixels of each sample as views of the memory maps, H * W * C bytes each; labels int64 [m]) at `positions` [m].

        For batches: the caller copies the pixels once, into the batch.
        """
        block, offset = self._located(positions)
        shard = self._blocks.shard[block].tolist()
        data, integers = {}, {}
        for number in dict.fromkeys(shard):
            data[number], integers[number] = self.open(number)
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
        """`labels`, if each is a class: a shard can match its index and still hold impossible labels."""
        if len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
            at = int(np.flatnonzero((labels < 0) | (labels >= self.num_classes))[0])
            reason = f"it holds the label {labels[at]}, but there are {self.num_classes} classes"
            raise self._unusable(int(self.shards_of(positions[at])), reason, REMAKE)
        return labels

    def _integers(self, positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """int64 [m] out of the members whose data begin at `offsets`, by block."""
        block, offset = self._located(positions)
        at, shard = offsets[block] // 8 + offset, self._blocks.shard[block]
        out = np.empty(len(at), np.int64)
        for number in np.unique(shard).tolist():
            here = shard == number
            out[here] = np.asarray(self.open(number)[1])[at[here]]
        return out

    def source_ids(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]: the source ids of the samples at `positions` [m]."""
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
        positions = np.flatnonzero(np.repeat(self._blocks.id_offset >= 0, self._blocks.num_images))
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

    def fetch(self, number: int, *, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The local, verified file of shard `number`, fetched into the cache if it is remote; or `ShardUnusable`."""
        if number in self.unusable:
            raise self.unusable[number]
        name, num_bytes, sha256 = self.names[number], self.shard_bytes[number], self._sha256[number]
        if self._cache is None:
            return Path(self.folder) / name
        try:
            return self._cache.fetch(f"{self.folder}/{name}", num_bytes, sha256, stopped=stopped)
        except UserError as error:
            self.unusable[number] = self._unusable(number, str(error).removesuffix("."))
            raise self.unusable[number] from error

    def open(self, number: int) -> tuple[memoryview, memoryview]:
        """The memory map of shard `number`, as bytes and as int64; raises `ShardUnusable` if it is missing or damaged."""
        views = self._maps.get(number)
        if views is None:
            data = self._new_map(number)
            views = self._maps[number] = data, data[: len(data) // 8 * 8].cast("q")
            while len(self._maps) > self.max_open:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return views

    def _new_map(self, number: int, attempts: int = _MAX_ATTEMPTS) -> memoryview:
        path = self.fetch(number)
        try:
            return np.memmap(path, dtype=np.uint8, mode="r", shape=(self.shard_bytes[number],)).data
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and self.is_remote and attempts > 1:
                return self._new_map(number, attempts - 1)  # another process evicted it before it was opened here
            raise self._unusable(number, f"it cannot be read ({error})") from error


def check_validation_fits(validation: ShardSet, training: ShardSet, kind: str) -> None:
    """Raise `UserError` unless `validation` has the images and classes of the `kind` training images, and other shards."""
    this, that = f"data.validation.shards ({validation.folder})", f"data.{kind}.shards ({training.folder})"
    if validation.image_shape != training.image_shape:
        shapes = f"{list(validation.image_shape)}, but {that} has {list(training.image_shape)}"
        raise UserError(f"{this} has images of shape {shapes}. Prepare both with the same size.")
    if validation.class_names != training.class_names:
        pairs = itertools.zip_longest(validation.class_names, training.class_names)
        number, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        names = f"class {number} is {_class(here)} in {this} and {_class(there)} in {that}"
        raise UserError(f"The classes differ: {names}. Prepare both with the same --classes.")
    if shared := sorted(set(validation._sha256) & set(training._sha256)):
        name = validation.names[validation._sha256.index(shared[0])]
        raise UserError(
            f"{this} and {that} share {len(shared)} of {len(validation.names)} shards, such as {name}: images that are trained "
            "on cannot validate. Give other images, or remove data.validation.shards to hold some out."
        )


def _class(name: str | None) -> str:
    return "missing" if name is None else quoted(name)


def concatenated(pixels: Sequence[memoryview]) -> np.ndarray:
    """uint8 [total bytes], writable: one copy."""
    return np.frombuffer(bytearray().join(pixels), np.uint8)


_IMAGES = ("png", "jpg", "jpeg", "webp", "PNG", "JPG", "JPEG")  # of a folder that has not been converted


def open_shards(
    where: str | Path, what: str = "the data", *, commands: Sequence[str] = (), cache: Cache | None = None
) -> ShardSet:
    """The shards at `where`, with a checked index; call `verify` before trusting the images.

    Args:
        where: a folder written by `python -m nrat_scale.prepare`, or its address (https://, s3://, hf://datasets/...); with
            `/NAME.tar` or `/shard-{00000..00009}.tar` at the end, only those of its shards.
        what: names the data in errors, for instance the recipe key that gives `where`.
        commands: make these shards; shown if they are missing.
        cache: of remote shards; None is the default one.

    Raises `UserError` if there is no such folder, address or index, or a damaged one.
    """
    folder, only = expand(str(where))
    if is_remote(url := f"{folder}/{INDEX}"):
        index = parse_json(fetch_bytes(url, _MAX_INDEX_BYTES), f"index of {what}", url)
        return ShardSet(folder, index, what, only, cache or Cache())
    path = Path(folder) / INDEX
    if not path.is_file():
        if parts := sorted(str(found.parent) for found in Path(folder).glob(f"*/{INDEX}")):
            raise UserError(f"{folder} is not shards of {what}, but has folders of them. Name one: {', '.join(parts)}.")
        images = any(next(Path(folder).glob(f"*/*.{ending}"), None) for ending in _IMAGES) and not commands
        by_hand = (
            f" python -m nrat_scale.prepare folder {folder} --out DIR" if images else " python -m nrat_scale.prepare"
        )
        way_out = "\n  ".join(["", *commands]) or by_hand
        raise UserError(f"There are no shards of {what} at {folder} (no {INDEX}). Prepare them with:{way_out}")
    return ShardSet(Path(folder), read_json(path, f"index of {what}"), what, only)
