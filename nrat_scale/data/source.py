"""One source of training images: its shards, the samples that are not trained on, and the labels that training sees.

Label noise is drawn over the whole source in source order, before anything is held out; the validation split is a
function of (index, `ValidationSpec`) alone. So runs with other noise, other seeds or on other machines share one split.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from nrat_scale.core.errors import UserError, printable
from nrat_scale.core.files import write_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.audit_action import AuditAction
from nrat_scale.data.shards import ShardSet, ShardUnusable
from nrat_scale.data.spec import WEIGHT
from nrat_scale.datasets import DATASETS
from nrat_scale.label_files import load_human_labels, load_scores
from nrat_scale.labels import NoiseSpec, corrupt, labels_sha256

T = TypeVar("T")
UNKNOWN_LABEL = -1


class SkipLog:
    """The at most `limit` shards that a run skips, shared by its processes through a file of the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: list[dict[str, Any]] = []
        self._run: RunFolder | None = None

    def attach(self, run: RunFolder) -> None:
        """Keep the log in `run` from now on, and add the entries that `run` already has."""
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

    Samples are numbered 0 .. len(self) - 1 in the order of their positions, without the held-out, excluded and dropped ones.
    """

    kind: str  # `real` or `generated`
    shards: ShardSet
    held_out: np.ndarray  # sorted positions [m] of the validation split
    excluded: np.ndarray  # sorted positions [k] that the recipe excludes
    given: np.ndarray | None  # labels by position [N]; None: the stored ones
    clean: np.ndarray | None  # labels by position [N]; None: unknown
    log: SkipLog
    action: AuditAction | None = None  # on labels that an audit doubts; `given` are those before it

    def __post_init__(self) -> None:
        self.untrained = np.union1d(self.held_out, self.excluded)
        if self.action is not None:
            self.untrained = np.union1d(self.untrained, self.action.dropped)
        # Sample k comes after all untrained positions u_j with u_j - j <= k.
        self._gaps = self.untrained - np.arange(len(self.untrained))
        bounds = self.shards.shard_starts
        self.starts = bounds - np.searchsorted(self.untrained, bounds)  # sample number of each shard's first sample

    def __len__(self) -> int:
        return len(self.shards) - len(self.untrained)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """The positions [m] of the samples numbered [m]."""
        return samples + np.searchsorted(self._gaps, samples, side="right")

    def given_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m], as training sees them."""
        return self.acted_labels(
            positions, self.shards.labels(positions) if self.given is None else self.given[positions]
        )

    def acted_labels(self, positions: np.ndarray, given: np.ndarray) -> np.ndarray:
        """int64 [m]: `given`, the labels at `positions`, after what is done about those that an audit doubts."""
        return given if self.action is None else self.action.labels(positions, given)

    @property
    def is_weighted(self) -> bool:
        """Whether the losses of its samples have different weights."""
        return self.action is not None and self.action.spec.action == WEIGHT

    def weights(self, positions: np.ndarray) -> np.ndarray:
        """float32 [m]: the weight of each sample's loss, 1 unless the audit says otherwise."""
        weights = None if self.action is None else self.action.weights(positions)
        return np.ones(len(positions), np.float32) if weights is None else weights

    def clean_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]; `UNKNOWN_LABEL` if unknown."""
        return np.full(len(positions), UNKNOWN_LABEL) if self.clean is None else self.clean[positions]

    @property
    def given_sha256(self) -> str:
        """Identifies the noisy labels; for a source whose labels are known to be noisy or clean."""
        assert self.given is not None
        return labels_sha256(self.given[self.shards.in_source_order()])

    def ids_sha256(self, positions: np.ndarray) -> str:
        """Identifies a set of samples: sha256 of their source ids, ascending, as little-endian int64."""
        return hashlib.sha256(np.sort(self.shards.source_ids(positions)).astype("<i8").tobytes()).hexdigest()

    def read(
        self, samples: np.ndarray, take: Callable[[np.ndarray], T], near: Callable[[], np.ndarray] | None
    ) -> tuple[np.ndarray, T]:
        """(positions [m], `take` of these positions) of the samples numbered [m].

        If the recipe allows it, a sample in an unusable shard is replaced by another one; the substitute depends only on
        the position and the skipped shards. It comes from the shards that `near` returns (those of the same window), or
        from any shard if `near` is None or all of those are skipped. `take` reads shards, as `shards.labels` does.

        Raises `ShardUnusable` if a shard is unusable and none may be skipped, `UserError` beyond the limit.
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
        skipped = self._open(shard)
        lost = np.isin(shard, skipped)
        if not lost.any():
            return positions
        sizes = np.diff(self.starts)
        candidates = near() if near is not None else np.arange(len(sizes))
        draws = hash64(derive(0, "substitute"), positions[lost])
        while True:
            usable = candidates[~np.isin(candidates, skipped) & (sizes[candidates] > 0)]
            if not len(usable):
                if len(candidates) == len(sizes):
                    raise UserError(f"No usable shard of the {self.kind} data is left.")
                candidates = np.arange(len(sizes))
                continue
            ends = np.cumsum(sizes[usable])
            pick = (draws % np.uint64(ends[-1])).astype(np.int64)
            at = np.searchsorted(ends, pick, side="right")
            known, skipped = skipped, self._open(usable[at])
            if skipped == known:
                break
        positions = positions.copy()
        positions[lost] = self.positions(self.starts[usable[at]] + pick - (ends[at] - sizes[usable[at]]))
        return positions

    def _open(self, shards: np.ndarray) -> list[int]:
        """Open these shards, or record them as skipped; returns the numbers of all skipped shards."""
        for number in np.unique(shards).tolist():
            if self.shards.names[number] in self.log.of(self.kind):
                continue
            try:
                self.shards.open(number)
            except ShardUnusable as error:
                self.log.add(self.kind, error, int(self.starts[number + 1] - self.starts[number]))
        skipped = self.log.of(self.kind)
        return [number for number, name in enumerate(self.shards.names) if name in skipped] if skipped else []


def noisy_labels(shards: ShardSet, noise: NoiseSpec) -> tuple[np.ndarray, np.ndarray]:
    """(given, clean) labels int64 [N] by position; the noise is drawn in source order over the whole set.

    Every label is read, so remote shards are all fetched once before training.

    Raises `UserError` if the noise does not fit these labels.
    """
    key, class_map = noise.KEY, noise.class_map
    if class_map is None and noise.kind.startswith("asymmetric") and noise.kind != "asymmetric_blocks":
        known = DATASETS.get(shards.dataset)
        class_map = known.asymmetric_map if known else None
        if not class_map:
            raise UserError(
                f"No asymmetric noise map is published for '{printable(shards.dataset)}'. "
                f"Give {key}.class_map, for instance {{0: 6, 6: 0}}."
            )
    order = shards.in_source_order()
    clean = shards.labels(order)
    images = shards.images(order) if noise.kind == "instance_dependent" else None
    human = load_human_labels(noise.human_labels, noise.human_set, key) if noise.human_labels else None
    sizes = noise.kind, noise.rate, noise.seed, shards.num_classes
    scores = load_scores(noise.scores, key) if noise.scores else None
    extra = {"images": images, "human_labels": human, "matrix": noise.matrix, "scores": scores, "key": key}
    given = corrupt(clean, *sizes, class_map=class_map, **extra)
    by_position = np.empty((2, len(shards)), np.int64)
    by_position[:, order] = given, clean
    return by_position[0], by_position[1]
