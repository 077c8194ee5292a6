"""The index of shards: validates the content of index.json and maps samples to blocks of shards, without I/O.

    DIR/shard-00000.tar   members 00000000.images.npy (uint8 [n, H, W, C]), 00000000.labels.npy (int64 [n]), 00000001...
    DIR/index.json        written last: readers trust only this file

*Positions* 0 .. N - 1 number the samples in the order of the shards. *Source ids* number them in the order of the
converted files. Published files are sorted by class, so shards are permuted when they are written; a *segment* of the
index names its permutation, from which positions and source ids follow. A *block* is the images of one tar record: the
index states its offsets in bytes, so that no reader parses a tar. docs/data.md lists every field.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.core.seeds import KeyedPermutation

FORMAT, VERSION = "nrat_scale.shards", 2
INDEX = "index.json"
PERMUTATION = "shards"  # name of the permutation's random stream, as in `seeds.derive`
TAR_BLOCK = 512  # bytes
REMAKE = "Make the shards again with python -m nrat_scale.prepare."
V = TypeVar("V")
_SHARD_NAME = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)*[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class Segment:
    """Consecutive positions that were converted together; source ids `first_id` .. `first_id + num_ids - 1`."""

    num_images: int
    first_id: int
    num_ids: int  # equal to `num_images` if the order is a permutation
    seed: int | None  # of the permutation; None if each block stores its ids

    @cached_property
    def permutation(self) -> KeyedPermutation:
        """Position within the segment -> source id minus `first_id`."""
        assert self.seed is not None
        return KeyedPermutation(self.num_images, self.seed, PERMUTATION)


class Blocks(NamedTuple, Generic[V]):
    """Columns of the table of blocks, int64 [B], or the integers of one row."""

    shard: V
    image_offset: V  # bytes in the shard, as the other offsets
    label_offset: V
    num_images: V
    id_offset: V  # -1 if the block stores no ids
    origin: V  # position of the first image in the unrestricted index
    segment: V


class ShardIndex:
    """A validated index, optionally restricted to some of its shards.

    Args:
        index: the content of index.json.
        where: its path or address, for errors.
        what: names the data in errors.
        only: names of the shards to keep; None keeps all.

    Attributes:
        dataset, class_names, class_counts, image_shape ((H, W, C)), num_images, source_files: as in the index.
        names, shard_bytes, shard_class_counts (int64 [S, K]): of the shards, as in the index.
        segments: of the unrestricted index.
        shard_starts: int64 [S + 1]; shard s holds the positions shard_starts[s] .. shard_starts[s + 1] - 1.

    Raises:
        UserError: another format or version, a missing field, or values that contradict each other.
    """

    def __init__(self, index: dict[str, Any], where: str, what: str, only: Sequence[str] | None = None) -> None:
        self._where, self._what = where, what
        try:
            self._read(index)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"a field is missing or malformed: {first_line(error)}") from error
        self._keep(only)

    def _damaged(self, why: str) -> UserError:
        return UserError(f"The index {self._where} of {self._what} is damaged: {why}. {REMAKE}")

    def _read(self, index: dict[str, Any]) -> None:
        if index.get("format") != FORMAT:
            raise UserError(f"{self._where} is not an index of shards (its format is {quoted(index.get('format'))}).")
        version = index.get("version")
        if version != VERSION:
            newer = isinstance(version, int) and version > VERSION
            raise UserError(
                f"{self._where} has version {version!r:.80}; this program reads version {VERSION}. "
                f"{'Update nrat_scale.' if newer else REMAKE}"
            )
        self.dataset = str(index["dataset"])
        self.class_names = tuple(str(name) for name in index["class_names"])
        self.num_classes = len(self.class_names)
        height, width, channels = (int(n) for n in index["image_shape"])
        self.image_shape = (height, width, channels)
        if min(self.image_shape) < 1:
            raise self._damaged(f"its image shape is {list(self.image_shape)}")
        self._image_bytes = math.prod(self.image_shape)
        self.source_files = list(index["source"])
        self.segments = []
        for part in index["parts"]:
            num_images, first_id, num_ids = (int(part[key]) for key in ("num_images", "first_id", "num_ids"))
            seed = None if part["seed"] is None else int(part["seed"])
            self.segments.append(Segment(num_images, first_id, num_ids, seed))
        sizes = np.asarray([segment.num_images for segment in self.segments], np.int64)
        self._segment_starts = np.cumsum(sizes) - sizes
        self._read_shards(list(index["shards"]))
        if self._contradicts(int(index["num_images"]), list(index["class_counts"])):
            raise self._damaged("its counts and offsets contradict each other")

    def _read_shards(self, entries: list[dict[str, Any]]) -> None:
        self.names = [str(entry["name"]) for entry in entries]
        for name in self.names:
            if not _SHARD_NAME.fullmatch(name):  # must not lead out of the folder
                raise self._damaged(f"{quoted(name)} is not the name of a shard")
        self.shard_bytes = [int(entry["bytes"]) for entry in entries]
        self._sha256 = [str(entry["sha256"]) for entry in entries]
        self.shard_class_counts = np.asarray([entry["class_counts"] for entry in entries], np.int64)
        # A block that stores no ids has three numbers, another has four.
        rows = [[*block, -1] if len(block) == 3 else block for entry in entries for block in entry["blocks"]]
        columns = np.ascontiguousarray(np.asarray(rows, np.int64).reshape(-1, 4).T)
        shard = np.repeat(np.arange(len(entries)), [len(entry["blocks"]) for entry in entries])
        image_offset, label_offset, num_images, id_offset = columns
        origin = np.cumsum(num_images) - num_images
        segment = np.searchsorted(self._segment_starts, origin, side="right") - 1
        self._blocks = Blocks(shard, image_offset, label_offset, num_images, id_offset, origin, segment)

    def _contradicts(self, num_images: int, class_counts: list[int]) -> bool:
        blocks, segments = self._blocks, self.segments
        stores_ids = blocks.id_offset != -1
        shard_bytes = np.asarray(self.shard_bytes, np.int64)

        def fits(offsets: np.ndarray, row_bytes: int) -> np.ndarray:
            # Division, unlike multiplication, cannot overflow with numbers of a damaged index.
            room = (shard_bytes[blocks.shard] - offsets) // row_bytes
            return np.asarray((offsets >= 0) & (blocks.num_images <= room))

        # Padding (less than a tar block), a tar header (one) and an npy header (less than one) separate images and
        # labels: another distance means that `image_shape` or an offset is wrong.
        gap = blocks.label_offset - (blocks.image_offset + blocks.num_images * self._image_bytes)
        return bool(
            not self.names
            or not segments
            or len(set(self.names)) != len(self.names)
            or num_images < 1
            or (blocks.num_images < 1).any()
            or int(blocks.num_images.sum()) != num_images
            or sum(segment.num_images for segment in segments) != num_images
            or any(min(segment.num_images, segment.num_ids) < 1 or segment.first_id < 0 for segment in segments)
            or any(segment.seed is not None and segment.num_ids != segment.num_images for segment in segments)
            or not fits(blocks.image_offset, self._image_bytes).all()
            or not fits(blocks.label_offset, 8).all()
            or not fits(blocks.id_offset, 8)[stores_ids].all()
            or (blocks.label_offset % 8).any()
            or (blocks.id_offset[stores_ids] % 8).any()
            or not ((gap > TAR_BLOCK) & (gap < 3 * TAR_BLOCK)).all()
            or (stores_ids != [segments[i].seed is None for i in blocks.segment]).any()
            or self.shard_class_counts.shape != (len(self.names), self.num_classes)
            or (self.shard_class_counts < 0).any()
            or (self.shard_class_counts.sum(axis=1) != self._images_per_shard()).any()
            or self.shard_class_counts.sum(axis=0).tolist() != class_counts
        )

    def _keep(self, only: Sequence[str] | None) -> None:
        """Drop all shards but `only` and number the positions of the rest."""
        if only is not None:
            unknown = sorted(set(only) - set(self.names))
            if unknown:
                raise UserError(f"{self._where} lists no shard {unknown[0]}; it has {len(self.names)} others.")
            kept = [number for number, name in enumerate(self.names) if name in set(only)]
            blocks = Blocks(*(column[np.isin(self._blocks.shard, kept)] for column in self._blocks))
            self._blocks = blocks._replace(shard=np.searchsorted(kept, blocks.shard))
            self.names = [self.names[number] for number in kept]
            self.shard_bytes = [self.shard_bytes[number] for number in kept]
            self._sha256 = [self._sha256[number] for number in kept]
            self.shard_class_counts = self.shard_class_counts[kept]
        self.num_images = int(self._blocks.num_images.sum())
        self.class_counts = tuple(self.shard_class_counts.sum(axis=0).tolist())
        self._first = np.cumsum(self._blocks.num_images) - self._blocks.num_images  # position of a block's first image
        self.shard_starts = np.concatenate([[0], np.cumsum(self._images_per_shard())])

    def _images_per_shard(self) -> np.ndarray:
        return np.bincount(self._blocks.shard, self._blocks.num_images, len(self.names)).astype(np.int64)

    def __len__(self) -> int:
        return self.num_images

    @property
    def fingerprint(self) -> str:
        """sha256 over the sha256 of the shards: identifies the data in whatever folder."""
        return hashlib.sha256("\n".join(self._sha256).encode()).hexdigest()

    @property
    def shards_sha256(self) -> list[str]:
        """Of each shard, the sha256 that the index states."""
        return list(self._sha256)

    @property
    def files_sha256(self) -> list[str]:
        """The sha256 of the files that the shards were made from, of those that have one."""
        known = (file.get("sha256") for file in self.source_files if isinstance(file, dict))
        return [value for value in known if isinstance(value, str)]

    @property
    def num_ids(self) -> int:
        """The source ids are in 0 .. num_ids - 1."""
        return max(segment.first_id + segment.num_ids for segment in self.segments)

    def blocks_of(self, number: int) -> list[Blocks[int]]:
        """The blocks of shard `number`, in their order."""
        here = self._blocks.shard == number
        return [Blocks(*row) for row in zip(*(column[here].tolist() for column in self._blocks), strict=True)]

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]: the shards of the samples at `positions` [m]."""
        return np.searchsorted(self.shard_starts, positions, side="right") - 1

    def _located(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, place in it), int64 [m] each."""
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.num_images), "no such sample"
        block = np.searchsorted(self._first, positions, side="right") - 1
        return block, positions - self._first[block]
