"""One source of training images: its shards, what is held out of them, and the labels that training sees.

Noise is drawn over the whole source in source order, before anything is held out; the validation split is a function
of (index, `ValidationSpec`) alone. So runs with other noise, other seeds or on other machines share one split.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from nrat_scale import labels as labels_module
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_json
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.shards import ShardSet, ShardUnusable
from nrat_scale.datasets import DATASETS
from nrat_scale.labels import NoiseSpec

T = TypeVar("T")
UNKNOWN_LABEL = -1
SKIPPED = "skipped_shards.json"  # in the run directory


# ---- shards that cannot be used -------------------------------------------------------------------------------------


class SkipLog:
    """The shards that a run does without, shared by its processes through a file of the run.

    Args:
        limit: how many shards may be skipped in all; 0 stops at the first.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.entries: list[dict[str, Any]] = []
        self._path: Path | None = None

    def attach(self, path: Path) -> None:
        """Keep the log in `path` from now on, together with what stands there already."""
        self._path = path
        if self.entries:
            self._write([])
        elif path.is_file():
            self.entries = _entries(path)

    def of(self, kind: str) -> set[str]:
        """The names of the skipped shards of one source."""
        return {entry["shard"] for entry in self.entries if entry["source"] == kind}

    def add(self, kind: str, error: ShardUnusable, num_images: int) -> None:
        """Note that a shard is skipped; raises `error` where nothing may be skipped, `UserError` beyond the limit."""
        if self.limit == 0:
            raise error
        self._write([{"source": kind, "shard": error.name, "num_images": num_images, "reason": error.reason}])

    def _write(self, new: list[dict[str, Any]]) -> None:
        lock = FileLock(f"{self._path}.lock") if self._path is not None else nullcontext()
        with lock:
            there = _entries(self._path) if self._path is not None and self._path.is_file() else []
            known = {(entry["source"], entry["shard"]): entry for entry in [*there, *self.entries, *new]}
            self.entries = list(known.values())
            if len(self.entries) > self.limit:
                names = ", ".join(f"{e['shard']} ({e['reason']})" for e in self.entries[-self.limit - 1 :])
                raise UserError(
                    f"{len(self.entries)} shards cannot be used, more than data.max_bad_shards {self.limit}: {names}. "
                    "Bring them back, or raise data.max_bad_shards."
                )
            if self._path is not None:
                write_json(self._path, {"skipped": self.entries})


def _entries(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["skipped"])


# ---- a source -------------------------------------------------------------------------------------------------------


@dataclass
class TrainingSource:
    """One source of training samples: its shards without what is held out and excluded.

    Attributes:
        kind: `real` or `generated`.
        shards: where the images are.
        held_out: sorted positions [m] of validation.
        excluded: sorted positions [k] that the recipe excludes.
        given, clean: labels by position [N], where they differ from the stored ones or are known; None for a source
            that is read straight from the shards and whose true labels nobody knows.
        log: where skipped shards are noted.
    """

    kind: str
    shards: ShardSet
    held_out: np.ndarray
    excluded: np.ndarray
    given: np.ndarray | None = None
    clean: np.ndarray | None = None
    log: SkipLog = field(default_factory=SkipLog)

    def __post_init__(self) -> None:
        self.left_out = np.union1d(self.held_out, self.excluded)
        bounds = self.shards.shard_starts
        self.starts = bounds - np.searchsorted(self.left_out, bounds)

    def __len__(self) -> int:
        return len(self.shards) - len(self.left_out)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """The positions [m] of training samples numbered [m] in [0, len(self))."""
        return samples + np.searchsorted(self._gaps, samples, side="right")

    @cached_property
    def _gaps(self) -> np.ndarray:
        # Sample k stands after all left-out positions h_j with h_j - j <= k.
        return self.left_out - np.arange(len(self.left_out))

    def given_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m], as training sees them."""
        return self.shards.labels(positions) if self.given is None else self.given[positions]

    def clean_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]; `UNKNOWN_LABEL` where nobody knows."""
        return np.full(len(positions), UNKNOWN_LABEL) if self.clean is None else self.clean[positions]

    def ids_sha256(self, positions: np.ndarray) -> str:
        """Names a set of samples: sha256 of their source ids, ascending, as little-endian int64."""
        return hashlib.sha256(np.sort(self.shards.source_ids(positions)).astype("<i8").tobytes()).hexdigest()

    def read(
        self, samples: np.ndarray, near: Callable[[], np.ndarray] | None = None
    ) -> tuple[np.ndarray, list[memoryview], np.ndarray]:
        """(positions [m], pixels of each, given labels int64 [m]) of training samples numbered [m].

        A sample in a shard that cannot be used is replaced by another one, where the recipe allows to skip shards. The
        other one is a function of the position and of the shards that are skipped; it comes from the shards that `near`
        names (those of the same window), or from all where `near` is None or has none left.

        Raises:
            ShardUnusable: a shard cannot be used and the recipe allows no (further) skipping.
        """
        positions, (pixels, labels) = self._taken(samples, near, self.shards.rows)
        return positions, pixels, labels if self.given is None else self.given[positions]

    def locate(
        self, samples: np.ndarray, near: Callable[[], np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(positions [m], given labels int64 [m]): as `read`, for one who has the pixels already."""
        # The labels are read even where others are given: it shows the same shards to be unusable that `read` would find.
        positions, labels = self._taken(samples, near, self.shards.labels)
        return positions, labels if self.given is None else self.given[positions]

    def _taken(
        self, samples: np.ndarray, near: Callable[[], np.ndarray] | None, take: Callable[[np.ndarray], T]
    ) -> tuple[np.ndarray, T]:
        """(positions [m], what `take` finds there), in shards that can be used."""
        positions = self.positions(samples)
        if self.log.entries:
            positions = self._usable(positions, near)
        try:
            return positions, take(positions)
        except ShardUnusable:
            positions = self._usable(positions, near)
            return positions, take(positions)

    def _usable(self, positions: np.ndarray, near: Callable[[], np.ndarray] | None) -> np.ndarray:
        """`positions`, those in shards that cannot be used replaced; opens the shards that are needed."""
        shard = self.shards.shards_of(positions)
        skipped = self._open(np.unique(shard))
        if not skipped:
            return positions
        lost = np.isin(shard, list(skipped))
        positions = positions.copy()
        if lost.any():
            candidates = near() if near is not None else np.arange(len(self.shards.names))
            positions[lost] = self._substitutes(positions[lost], candidates)
        return positions

    def _open(self, numbers: np.ndarray) -> set[int]:
        """Open these shards; the numbers of all shards that are skipped by now."""
        for number in numbers.tolist():
            if self.shards.names[number] in self.log.of(self.kind):
                continue
            try:
                self.shards.open(number)
            except ShardUnusable as error:
                self.skip(number, error)
        skipped = self.log.of(self.kind)
        return {number for number, name in enumerate(self.shards.names) if name in skipped} if skipped else set()

    def skip(self, number: int, error: ShardUnusable) -> None:
        """Do without a shard; raises where that is not allowed."""
        self.log.add(self.kind, error, int(self.starts[number + 1] - self.starts[number]))

    def _substitutes(self, positions: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        sizes = np.diff(self.starts)
        everywhere = np.arange(len(sizes))
        while True:
            skipped = self._open(np.zeros(0, np.int64))
            good = np.asarray([n for n in candidates.tolist() if n not in skipped and sizes[n]], np.int64)
            if not len(good) and len(candidates) == len(everywhere):
                raise UserError(f"No usable shard of the {self.kind} data is left.")
            if not len(good):
                candidates = everywhere
                continue
            ends = np.cumsum(sizes[good])
            pick = (hash64(derive(0, "substitute"), positions) % np.uint64(ends[-1])).astype(np.int64)
            at = np.searchsorted(ends, pick, side="right")
            samples = self.starts[good[at]] + pick - (ends[at] - sizes[good[at]])
            if len(self._open(np.unique(good[at]))) == len(skipped):
                return self.positions(samples)


# ---- labels ---------------------------------------------------------------------------------------------------------


def noisy_labels(shards: ShardSet, noise: NoiseSpec) -> tuple[np.ndarray, np.ndarray]:
    """(given, clean) labels int64 [N] by position; the noise is drawn in source order over the whole set.

    Raises:
        UserError: the noise cannot be put on these labels.
    """
    class_map = noise.class_map
    if class_map is None and noise.kind.startswith("asymmetric"):
        known = DATASETS.get(shards.dataset)
        class_map = known.asymmetric_map if known else None
        if not class_map:
            raise UserError(
                f"No asymmetric noise map is published for '{shards.dataset}'. "
                "Give data.real.noise.class_map, for instance {0: 6, 6: 0}."
            )
    order = shards.in_source_order()
    clean = shards.labels(order)
    given = labels_module.corrupt(
        clean,
        noise.kind,
        noise.rate,
        noise.seed,
        shards.num_classes,
        class_map=class_map,
        images=shards.images(order) if noise.kind == "instance_dependent" else None,
        human_labels=labels_module.load_human_labels(noise.human_labels, noise.human_set)
        if noise.human_labels
        else None,
    )
    by_position = np.empty((2, len(shards)), np.int64)
    by_position[:, order] = given, clean
    return by_position[0], by_position[1]


def check_compatible(sources: Sequence[ShardSet]) -> None:
    """Raise `UserError` where shards cannot be mixed: another image shape or number of classes."""
    for other in sources[1:]:
        first = sources[0]
        for what, a, b in (
            ("image shape", first.image_shape, other.image_shape),
            ("number of classes", first.num_classes, other.num_classes),
        ):
            if a != b:
                raise UserError(
                    f"Real and generated data do not fit together: {what} is {a} in {first.folder} and {b} in {other.folder}."
                )
