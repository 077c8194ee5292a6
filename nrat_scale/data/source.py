"""One source of training images: its shards, the samples that are not trained on, and the labels that training sees.

Label noise is drawn over the whole source in source order, before anything is held out; the validation split is a
function of (index, `ValidationSpec`) alone. So runs with other noise, other seeds or on other machines share one split.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.shards import ShardSet, ShardUnusable
from nrat_scale.datasets import DATASETS
from nrat_scale.labels import NoiseSpec, corrupt, load_human_labels

T = TypeVar("T")
UNKNOWN_LABEL = -1


class SkipLog:
    """The shards that a run skips, shared by its processes through a file of the run.

    Args:
        limit: how many shards may be skipped in all; 0 stops at the first.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.entries: list[dict[str, Any]] = []
        self._run: RunFolder | None = None

    def attach(self, run: RunFolder) -> None:
        """Keep the log in `run` from now on, together with the entries that are already there."""
        self._run = run
        if self.entries:
            self._write([])
        else:
            self.entries = run.read_skipped_shards()

    def of(self, kind: str) -> set[str]:
        """The names of the skipped shards of one source."""
        return {entry["shard"] for entry in self.entries if entry["source"] == kind}

    def add(self, kind: str, error: ShardUnusable, num_images: int) -> None:
        """Record a skipped shard. Raises `error` if none may be skipped, `UserError` beyond the limit."""
        if self.limit == 0:
            raise error
        self._write([{"source": kind, "shard": error.name, "num_images": num_images, "reason": error.reason}])

    def _write(self, new: list[dict[str, Any]]) -> None:
        run = self._run
        with FileLock(f"{run.skipped_shards}.lock") if run is not None else nullcontext():
            stored = run.read_skipped_shards() if run is not None else []
            known = {(entry["source"], entry["shard"]): entry for entry in [*stored, *self.entries, *new]}
            self.entries = list(known.values())
            if len(self.entries) > self.limit:
                names = ", ".join(f"{e['shard']} ({e['reason']})" for e in self.entries[-self.limit - 1 :])
                raise UserError(
                    f"{len(self.entries)} shards cannot be used, more than data.max_bad_shards {self.limit}: {names}. "
                    "Restore them, or raise data.max_bad_shards."
                )
            if run is not None:
                write_json(run.skipped_shards, {"skipped": self.entries})


@dataclass
class TrainingSource:
    """One source of training images.

    Samples are numbered 0 .. len(self) - 1 in the order of their positions, without the held-out and excluded ones.

    Attributes:
        kind: `real` or `generated`.
        shards: of the images.
        held_out: sorted positions [m] of the validation split.
        excluded: sorted positions [k] that the recipe excludes.
        given, clean: labels by position [N]; None if the given labels are the stored ones, the clean ones unknown.
        log: records skipped shards.
    """

    kind: str
    shards: ShardSet
    held_out: np.ndarray
    excluded: np.ndarray
    given: np.ndarray | None = None
    clean: np.ndarray | None = None
    log: SkipLog = field(default_factory=SkipLog)

    def __post_init__(self) -> None:
        self.untrained = np.union1d(self.held_out, self.excluded)
        bounds = self.shards.shard_starts
        self.starts = bounds - np.searchsorted(self.untrained, bounds)  # sample number of each shard's first sample

    def __len__(self) -> int:
        return len(self.shards) - len(self.untrained)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """The positions [m] of the samples numbered [m]."""
        return samples + np.searchsorted(self._gaps, samples, side="right")

    @cached_property
    def _gaps(self) -> np.ndarray:
        # Sample k comes after all untrained positions u_j with u_j - j <= k.
        return self.untrained - np.arange(len(self.untrained))

    def given_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m], as training sees them."""
        return self.shards.labels(positions) if self.given is None else self.given[positions]

    def clean_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]; `UNKNOWN_LABEL` if unknown."""
        return np.full(len(positions), UNKNOWN_LABEL) if self.clean is None else self.clean[positions]

    def ids_sha256(self, positions: np.ndarray) -> str:
        """Identifies a set of samples: sha256 of their source ids, ascending, as little-endian int64."""
        return hashlib.sha256(np.sort(self.shards.source_ids(positions)).astype("<i8").tobytes()).hexdigest()

    # ---- reading, around shards that cannot be used ----

    def read(
        self, samples: np.ndarray, take: Callable[[np.ndarray], T], near: Callable[[], np.ndarray] | None = None
    ) -> tuple[np.ndarray, T]:
        """(positions [m], `take` of these positions) of the samples numbered [m].

        If the recipe allows it, a sample in an unusable shard is replaced by another one: a function of its position and
        of the skipped shards. The substitute comes from the shards that `near` returns (those of the same window), or
        from any shard if `near` is None or all of those are skipped.

        Args:
            take: a method of the shards that reads, such as `shards.labels`.

        Raises:
            ShardUnusable: a shard is unusable and no (further) one may be skipped.
        """
        positions = self.positions(samples)
        if self.log.entries:
            positions = self._substituted(positions, near)
        try:
            return positions, take(positions)
        except ShardUnusable:
            positions = self._substituted(positions, near)
            return positions, take(positions)

    def _substituted(self, positions: np.ndarray, near: Callable[[], np.ndarray] | None) -> np.ndarray:
        """`positions`, with substitutes for those in unusable shards; opens the shards that are needed."""
        shard = self.shards.shards_of(positions)
        skipped = self._open(np.unique(shard))
        lost = np.isin(shard, list(skipped))
        if not lost.any():
            return positions
        positions = positions.copy()
        candidates = near() if near is not None else np.arange(len(self.shards.names))
        positions[lost] = self._substitutes(positions[lost], candidates)
        return positions

    def _open(self, numbers: np.ndarray) -> set[int]:
        """Open these shards, or record them as skipped; returns the numbers of all skipped shards."""
        for number in numbers.tolist():
            if self.shards.names[number] in self.log.of(self.kind):
                continue
            try:
                self.shards.open(number)
            except ShardUnusable as error:
                self.log.add(self.kind, error, int(self.starts[number + 1] - self.starts[number]))
        skipped = self.log.of(self.kind)
        return {number for number, name in enumerate(self.shards.names) if name in skipped} if skipped else set()

    def _substitutes(self, positions: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        sizes = np.diff(self.starts)
        everywhere = np.arange(len(sizes))
        while True:
            skipped = self._open(np.zeros(0, np.int64))
            usable = np.asarray([n for n in candidates.tolist() if n not in skipped and sizes[n]], np.int64)
            if not len(usable) and len(candidates) == len(everywhere):
                raise UserError(f"No usable shard of the {self.kind} data is left.")
            if not len(usable):
                candidates = everywhere
                continue
            ends = np.cumsum(sizes[usable])
            pick = (hash64(derive(0, "substitute"), positions) % np.uint64(ends[-1])).astype(np.int64)
            at = np.searchsorted(ends, pick, side="right")
            samples = self.starts[usable[at]] + pick - (ends[at] - sizes[usable[at]])
            if len(self._open(np.unique(usable[at]))) == len(skipped):
                return self.positions(samples)


def noisy_labels(shards: ShardSet, noise: NoiseSpec) -> tuple[np.ndarray, np.ndarray]:
    """(given, clean) labels int64 [N] by position; the noise is drawn in source order over the whole set.

    Raises:
        UserError: the noise does not fit these labels.
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
    given = corrupt(
        clean,
        noise.kind,
        noise.rate,
        noise.seed,
        shards.num_classes,
        class_map=class_map,
        images=shards.images(order) if noise.kind == "instance_dependent" else None,
        human_labels=load_human_labels(noise.human_labels, noise.human_set) if noise.human_labels else None,
    )
    by_position = np.empty((2, len(shards)), np.int64)
    by_position[:, order] = given, clean
    return by_position[0], by_position[1]


def check_compatible(sources: Sequence[ShardSet]) -> None:
    """Raise `UserError` if shards cannot be mixed: another image shape or number of classes."""
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
