"""Shards -> batches: which samples form global batch t, and how they reach the device.

    plan     step t -> which source and which sample stands at each of the B positions of global batch t
    gather   this rank's positions -> uint8 images [b, C, H, W] and labels [b], out of memory-mapped shards
    augment  on the device: crop and flip, then float images in [0, 1]

The plan is a pure function of (index, seed, step). World size, workers and restarts do not occur in it, so the same
images arrive in the same steps whatever runs the training; augmentation is drawn for the global batch from (seed, step)
and sliced, so it does not depend on them either.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from nrat_scale import labels as label_noise
from nrat_scale.datasets import DATASETS
from nrat_scale.errors import UserError, did_you_mean
from nrat_scale.labels import NoiseSpec
from nrat_scale.seeds import KeyedPermutation, derive
from nrat_scale.shards import ShardSet, open_shards

REAL, GENERATED = "real", "generated"
TAKES = ("stratified", "random")
UNKNOWN_LABEL = -1


@dataclass(frozen=True)
class RealSpec:
    """Real, labelled training images.

    Attributes:
        shards: folder of shards; None trains on generated images alone.
        noise: label noise put on them, drawn over the whole set before the validation split.
        prepare: the commands that make the shards, one a line, shown where they are missing.
    """

    shards: str | None = None
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    prepare: str | None = None


@dataclass(frozen=True)
class GeneratedSpec:
    """Generated images with the labels they were generated for.

    Attributes:
        shards: folder of shards; None trains on real images alone.
        fraction: part of every batch, in (0, 1]: floor(batch_size * fraction) images, the rest is real.
        prepare: as for `RealSpec`.
    """

    shards: str | None = None
    fraction: float = 0.7
    prepare: str | None = None


@dataclass(frozen=True)
class ValidationSpec:
    """Training images held out to select the best checkpoint.

    Attributes:
        source: `real` or `generated`.
        size: number of images.
        take: `stratified` (each class in proportion, by the labels stored in the shards) or `random`.
        labels: `given` (as training sees them, with the noise) or `clean`.
        seed: of the choice; apart from the run's seed, so that runs with several seeds share one split.
    """

    source: str = REAL
    size: int = 1024
    take: str = "stratified"
    labels: str = "given"
    seed: int = 0


@dataclass(frozen=True)
class AugmentSpec:
    """Random augmentation of training images.

    Attributes:
        crop: pixels of zero padding before a random crop back to the image size; 0 for none.
        flip: mirror left to right with probability one half (not for digits).
    """

    crop: int = 4
    flip: bool = True


@dataclass(frozen=True)
class DataSpec:
    """What is trained on.

    Attributes:
        batch_size: images of the global batch, over all processes and accumulation steps.
        epoch_samples: images that make an epoch (rounded up to whole batches); by default the number of real training
            images, or of generated ones where there are no real ones.
        workers: loader processes; 0 gathers in the training process.
    """

    batch_size: int = 128
    epoch_samples: int | None = None
    real: RealSpec = field(default_factory=RealSpec)
    generated: GeneratedSpec = field(default_factory=GeneratedSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    workers: int = 0

    def __post_init__(self) -> None:
        for name, value, low in (
            ("batch_size", self.batch_size, 1),
            ("epoch_samples", self.epoch_samples or 1, 1),
            ("validation.size", self.validation.size, 1),
            ("augment.crop", self.augment.crop, 0),
            ("workers", self.workers, 0),
        ):
            if value < low:
                raise UserError(f"data.{name} is {value}; it must be at least {low}.")
        for name, choice, known in (
            ("source", self.validation.source, (REAL, GENERATED)),
            ("take", self.validation.take, TAKES),
            ("labels", self.validation.labels, ("given", "clean")),
        ):
            if choice not in known:
                raise UserError(f"data.validation.{name} is '{choice}'. {did_you_mean(choice, known)}")
        if not 0.0 < self.generated.fraction <= 1.0:
            raise UserError(f"data.generated.fraction is {self.generated.fraction}; it must be in (0, 1].")
        if self.real.shards is None and self.generated.shards is None:
            raise UserError("Nothing to train on: give data.real.shards, data.generated.shards, or both.")
        if getattr(self, self.validation.source).shards is None:
            raise UserError(
                f"data.validation.source is '{self.validation.source}', but data.{self.validation.source}.shards is not set."
            )


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplePlan:
    """Which samples form global batch t.

    Of every batch the same number comes from each source. A source is permuted anew for each pass over it, each of its
    samples appears exactly once in a pass, and a batch may end one pass and begin the next; sources of different
    length cycle independently. Where the sources stand within the batch is permuted too, so that no rank sees one kind
    only. Memory does not grow with the data.

    Attributes:
        sizes: training samples of each source.
        counts: images that each source gives to every batch.
        seed: of all permutations.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source [B] int64, sample [B] int64 in [0, sizes[source])) of global batch `step`, counted from 0."""
        parts = [self._samples(source, step) for source in range(len(self.sizes))]
        sources = np.repeat(np.arange(len(self.sizes)), self.counts)
        order = KeyedPermutation(len(sources), self.seed, "positions", step)(np.arange(len(sources)))
        return sources[order], np.concatenate(parts)[order]

    def _samples(self, source: int, step: int) -> np.ndarray:
        size, count = self.sizes[source], self.counts[source]
        running = np.arange(step * count, (step + 1) * count)
        samples = np.empty(count, np.int64)
        for number in np.unique(running // size):
            here = running // size == number
            samples[here] = _pass_permutation(size, self.seed, source, int(number))(running[here] % size)
        return samples


@lru_cache(maxsize=8)
def _pass_permutation(size: int, seed: int, source: int, number: int) -> KeyedPermutation:
    return KeyedPermutation(size, seed, "pass", source, number)


def mix_counts(batch_size: int, fraction: float) -> tuple[int, int]:
    """(real, generated) images of every batch: generated = floor(batch_size * fraction), as in DM_AT (512 -> 154 + 358)."""
    generated = int(batch_size * fraction + 1e-9)  # 100 * 0.29 is 28.999...
    return batch_size - generated, generated


# ---- sources --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """One source of training samples: its shards without the held-out ones.

    Attributes:
        kind: `real` or `generated`.
        shards: where the images are.
        held_out: sorted positions [m] that training never sees.
        given, clean: labels by position [N], where they differ from the stored ones or are known; None for a source
            that is read straight from the shards and whose true labels nobody knows.
    """

    kind: str
    shards: ShardSet
    held_out: np.ndarray
    given: np.ndarray | None = None
    clean: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.shards) - len(self.held_out)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """The positions [m] of training samples numbered [m] in [0, len(self))."""
        # Sample k stands after all held-out positions h_j with h_j - j <= k.
        return samples + np.searchsorted(self.held_out - np.arange(len(self.held_out)), samples, side="right")

    def given_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m], as training sees them."""
        return self.shards.labels(positions) if self.given is None else self.given[positions]

    def clean_labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m]; `UNKNOWN_LABEL` where nobody knows."""
        return np.full(len(positions), UNKNOWN_LABEL) if self.clean is None else self.clean[positions]


@dataclass(frozen=True)
class Batch:
    """This rank's part of global batch `step`; `first` is its place in the global batch.

    Attributes:
        images: uint8 [b, C, H, W].
        labels: int64 [b], as given.
        clean_labels: int64 [b], `UNKNOWN_LABEL` where unknown.
        generated: bool [b].
        ids: int64 [b], source ids.
    """

    step: int
    first: int
    images: Tensor
    labels: Tensor
    clean_labels: Tensor
    generated: Tensor
    ids: Tensor


@dataclass(frozen=True)
class LabelledImages:
    """A held-out set in memory: images uint8 [n, C, H, W], labels int64 [n], clean labels where they are known."""

    images: Tensor
    labels: Tensor
    clean_labels: Tensor | None


class TrainingData:
    """The sources of one recipe, split and labelled. Make it with `open_training_data`."""

    def __init__(self, spec: DataSpec, pools: dict[str, Pool], seed: int) -> None:
        self.spec = spec
        self.pools = [pools[kind] for kind in (REAL, GENERATED) if kind in pools]
        self._by_kind = pools
        both = len(self.pools) == 2
        counts: tuple[int, ...] = (spec.batch_size,)
        if both:
            counts = mix_counts(spec.batch_size, spec.generated.fraction)
        if both and min(counts) == 0:
            raise UserError(
                f"With data.batch_size {spec.batch_size} and data.generated.fraction {spec.generated.fraction} every batch "
                f"would hold {counts[0]} real and {counts[1]} generated images. Change one of them, or leave out a source."
            )
        for pool in self.pools:
            if len(pool) < 1:
                raise UserError(f"No {pool.kind} image is left for training after {len(pool.held_out)} were held out.")
        self.plan = SamplePlan(tuple(len(pool) for pool in self.pools), counts, derive(seed, "plan"))
        self.epoch_samples = spec.epoch_samples or len(self.pools[0])
        self.steps_per_epoch = -(-self.epoch_samples // spec.batch_size)

    @property
    def shards(self) -> ShardSet:
        """The first source's shards: they name the classes and the image shape."""
        return self.pools[0].shards

    @property
    def real(self) -> Pool | None:
        """The real source, if the recipe has one."""
        return self._by_kind.get(REAL)

    def validation(self) -> LabelledImages:
        """The held-out images with the labels that `data.validation.labels` names."""
        pool = self._by_kind[self.spec.validation.source]
        given = torch.from_numpy(pool.given_labels(pool.held_out))
        clean = torch.from_numpy(pool.clean_labels(pool.held_out)) if pool.clean is not None else None
        if self.spec.validation.labels == "clean":
            if clean is None:
                raise UserError(
                    f"data.validation.labels is 'clean', but nobody knows the clean labels of the {pool.kind} data."
                )
            given = clean
        return LabelledImages(to_nchw(pool.shards.images(pool.held_out)), given, clean)

    def batches(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """This rank's parts of the global batches `start` .. `stop` - 1, in order.

        Raises:
            UserError: the batch does not divide by the number of processes.
        """
        if self.spec.batch_size % world_size:
            raise UserError(
                f"data.batch_size {self.spec.batch_size} does not divide by {world_size} processes. "
                f"Use a batch size that is a multiple of {world_size}, or another number of processes."
            )
        pipeline = webdataset.DataPipeline(
            _PlanStage(self.plan, start, stop), _GatherStage(self.pools, rank, world_size)
        )
        if self.spec.workers == 0:
            return iter(pipeline)
        loader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=min(self.spec.workers, max(1, stop - start)),
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
        )
        return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class _PlanStage:
    """Yields (step, sources, samples); loader worker w of W takes every W-th step, which the loader puts in order."""

    plan: SamplePlan
    start: int
    stop: int

    def __call__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in range(self.start + first, self.stop, stride):
            yield (step, *self.plan.batch(step))


@dataclass(frozen=True)
class _GatherStage:
    """Turns the planned samples of this rank's slice into a `Batch`."""

    pools: list[Pool]
    rank: int
    world_size: int

    def __call__(self, plans: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        for step, sources, samples in plans:
            size = len(sources) // self.world_size
            mine = slice(self.rank * size, (self.rank + 1) * size)
            yield self._gather(step, mine.start, sources[mine], samples[mine])

    def _gather(self, step: int, first: int, sources: np.ndarray, samples: np.ndarray) -> Batch:
        shape = self.pools[0].shards.image_shape
        images = np.empty((len(sources), *shape), np.uint8)
        given, clean, ids = (np.empty(len(sources), np.int64) for _ in range(3))
        generated = np.zeros(len(sources), bool)
        for number, pool in enumerate(self.pools):
            here = np.flatnonzero(sources == number)
            positions = pool.positions(samples[here])
            images[here] = pool.shards.images(positions)
            given[here], clean[here] = pool.given_labels(positions), pool.clean_labels(positions)
            ids[here] = pool.shards.source_ids(positions)
            generated[here] = pool.kind == GENERATED
        return Batch(step, first, to_nchw(images), *(torch.from_numpy(a) for a in (given, clean, generated, ids)))


def to_nchw(images: np.ndarray) -> Tensor:
    """uint8 [n, H, W, C] -> uint8 tensor [n, C, H, W], contiguous."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


# ---- opening --------------------------------------------------------------------------------------------------------


def open_training_data(spec: DataSpec, seed: int, *, verify: bool = True) -> TrainingData:
    """Open, verify, split and label the sources of `spec`.

    Raises:
        UserError: shards missing or damaged, sources that do not fit together, a split that cannot be made.
    """
    prepare = [source.prepare or "" for source in (spec.real, spec.generated)]
    commands = [line.strip() for text in prepare for line in text.splitlines() if line.strip()]
    opened = {
        kind: open_shards(source.shards, f"data.{kind}.shards", commands=commands)
        for kind, source in ((REAL, spec.real), (GENERATED, spec.generated))
        if source.shards is not None
    }
    _check_compatible(opened)
    for shards in opened.values():
        if verify:
            shards.verify()
    pools = {}
    for kind, shards in opened.items():
        held_out = np.zeros(0, np.int64)
        if spec.validation.source == kind:
            held_out = choose_held_out(shards, spec.validation)
        given = clean = None
        if kind == REAL:
            given, clean = _noisy_labels(shards, spec.real.noise)
        pools[kind] = Pool(kind, shards, held_out, given, clean)
    return TrainingData(spec, pools, seed)


def _check_compatible(opened: dict[str, ShardSet]) -> None:
    if len(opened) < 2:
        return
    real, generated = opened[REAL], opened[GENERATED]
    for what, a, b in (
        ("image shape", real.image_shape, generated.image_shape),
        ("number of classes", real.num_classes, generated.num_classes),
    ):
        if a != b:
            raise UserError(
                f"Real and generated data do not fit together: {what} is {a} in {real.folder} and {b} in {generated.folder}."
            )


def choose_held_out(shards: ShardSet, spec: ValidationSpec) -> np.ndarray:
    """The sorted positions int64 [size] that validation holds out: a function of (index, spec), not of label noise.

    `stratified` takes classes in proportion to their number in `shards` (largest remainders first), by the stored
    labels; samples are met in a keyed random order and no more of them are read than needed.

    Raises:
        UserError: there are not enough images.
    """
    if spec.size >= len(shards):
        raise UserError(
            f"data.validation.size is {spec.size}, but {shards.folder} has only {len(shards)} images; some must be left to train on."
        )
    order = KeyedPermutation(len(shards), spec.seed, "validation")
    if spec.take == "random":
        return np.sort(order(np.arange(spec.size)))
    quota = _proportional(np.asarray(shards.class_counts), spec.size)
    chosen: list[np.ndarray] = []
    for start in range(0, len(shards), 4096):
        positions = order(np.arange(start, min(start + 4096, len(shards))))
        labels = shards.labels(positions)
        for label in np.flatnonzero(quota):
            members = positions[labels == label][: quota[label]]
            quota[label] -= len(members)
            chosen.append(members)
        if not quota.any():
            break
    assert not quota.any(), "the class counts of the index are wrong"
    return np.sort(np.concatenate(chosen))


def _proportional(counts: np.ndarray, size: int) -> np.ndarray:
    exact = counts * size / counts.sum()
    quota = exact.astype(np.int64)
    order = np.argsort(-(exact - quota), kind="stable")
    quota[order[: size - quota.sum()]] += 1
    return np.asarray(quota)


def _noisy_labels(shards: ShardSet, noise: NoiseSpec) -> tuple[np.ndarray, np.ndarray]:
    """(given, clean) labels int64 [N] by position; the noise is drawn in source order over the whole set."""
    if noise.kind == "none" and noise.rate:
        raise UserError(
            f"data.real.noise.rate is {noise.rate} but data.real.noise.kind is 'none'. Name a kind, such as symmetric."
        )
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
    given = label_noise.corrupt(
        clean,
        noise.kind,
        noise.rate,
        noise.seed,
        shards.num_classes,
        class_map=class_map,
        images=shards.images(order) if noise.kind == "instance_dependent" else None,
        human_labels=label_noise.load_human_labels(noise.human_labels, noise.human_set) if noise.human_labels else None,
    )
    by_position = np.empty((2, len(shards)), np.int64)
    by_position[:, order] = given, clean
    return by_position[0], by_position[1]


def normalisation(shards: ShardSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the data set, for inside the model; (0.5, 0.5) for every channel where it is not a known one."""
    known = DATASETS.get(shards.dataset)
    if known is not None and len(known.mean) == shards.image_shape[2]:
        return known.mean, known.std
    return (0.5,) * shards.image_shape[2], (0.5,) * shards.image_shape[2]


# ---- augmentation ---------------------------------------------------------------------------------------------------


def augment(batch: Batch, spec: AugmentSpec, global_size: int, seed: int, device: torch.device) -> Tensor:
    """Random crop and flip of `batch.images` on `device`: float32 [b, C, H, W] in [0, 1].

    The random numbers are drawn for the `global_size` images of the global batch from (seed, step), and sliced.
    """
    images = batch.images.to(device, non_blocking=True)
    generator = torch.Generator().manual_seed(derive(seed, "augment", batch.step))
    offsets = torch.randint(0, 2 * spec.crop + 1, (global_size, 2), generator=generator)
    mirrored = torch.rand(global_size, generator=generator) < 0.5
    mine = slice(batch.first, batch.first + len(images))
    if spec.crop:
        images = _crop(images, offsets[mine].to(device), spec.crop)
    if spec.flip:
        images = torch.where(mirrored[mine].to(device)[:, None, None, None], images.flip(3), images)
    return to_float(images)


def _crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Each image, padded with zeros, cut out anew at its offset [b, 2] (row, column)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    number = torch.arange(len(images), device=images.device)
    return padded.permute(0, 2, 3, 1)[number[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [0, 1]: the one place where 255 is divided by."""
    return images.float().div(255).contiguous()
