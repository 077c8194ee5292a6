"""The data of a run: its sources, their mix, and this rank's batches. docs/data.md explains formats and choices."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nrat_scale.core.errors import UserError, warn
from nrat_scale.core.seeds import derive
from nrat_scale.data.augment import crop_and_flip, cutmix, to_float
from nrat_scale.data.batches import Batch, PlannedBatches, to_nchw
from nrat_scale.data.plan import SamplePlan, SourceOrder, mix_counts
from nrat_scale.data.prefetch import prefetched
from nrat_scale.data.resident import ResidentImages, image_bytes, load_images
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.data.source import SkipLog, TrainingSource, noisy_labels
from nrat_scale.data.spec import GENERATED, REAL, DataSpec
from nrat_scale.data.split import choose_held_out, read_excluded
from nrat_scale.data.webdataset_stream import webdataset_batches
from nrat_scale.datasets import DATASETS
from nrat_scale.remote.cache import Cache

REMOTE_WINDOW = 8  # shards


@dataclass(frozen=True)
class LabelledImages:
    """A held-out set in memory: images uint8 [n, C, H, W], labels int64 [n], clean labels or None if unknown."""

    images: Tensor
    labels: Tensor
    clean_labels: Tensor | None


class TrainingData:
    """The sources of one recipe, split and labelled. Make it with `open_training_data`."""

    def __init__(self, spec: DataSpec, sources: dict[str, TrainingSource], seed: int, skips: SkipLog) -> None:
        self.spec = spec
        self.sources = list(sources.values())
        self.skips = skips
        self._seed = seed
        self._by_kind = sources
        self.resident: ResidentImages | None = None  # until `place_images`
        counts = (spec.batch_size,) if len(sources) == 1 else mix_counts(spec.batch_size, spec.generated.fraction)
        orders = []
        for count, source in zip(counts, self.sources, strict=True):
            if not len(source):
                left_out = len(source.untrained)
                raise UserError(f"No {source.kind} image is left for training after {left_out} were held out.")
            orders.append(SourceOrder(count, tuple(source.starts.tolist()), _window(spec, source.shards)))
        self.plan = SamplePlan(tuple(orders), derive(seed, "plan"))
        self.epoch_samples = spec.epoch_samples or len(self.sources[0])
        self.steps_per_epoch = -(-self.epoch_samples // spec.batch_size)

    @property
    def shards(self) -> ShardSet:
        """The shards of the first source, which name the classes and the image shape."""
        return self.sources[0].shards

    @property
    def real(self) -> TrainingSource | None:
        """The real source, if the recipe has one."""
        return self._by_kind.get(REAL)

    def validation(self) -> LabelledImages:
        """The held-out images with the labels that `data.validation.labels` names."""
        source = self._by_kind[self.spec.validation.source]
        images = to_nchw(source.shards.images(source.held_out))
        clean = torch.from_numpy(source.clean_labels(source.held_out)) if source.clean is not None else None
        if self.spec.validation.labels == "given":
            return LabelledImages(images, torch.from_numpy(source.given_labels(source.held_out)), clean)
        if clean is None:
            raise UserError(f"The {source.kind} data have no clean labels. Set data.validation.labels: given.")
        return LabelledImages(images, clean, clean)

    def place_images(self, device: torch.device) -> None:
        """Keep all images on `device` if `data.resident` asks for it. Call it once, before `batches`.

        Raises `UserError` if the images must fit and do not, `ShardUnusable` if a shard is bad and may not be skipped.
        """
        spec, needed = self.spec, image_bytes(self.sources)
        # Other devices gain nothing over memory maps.
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        wanted = spec.resident == "always"
        if wanted and free is not None and needed > free:
            raise UserError(
                f"data.resident is 'always', but the images take {needed / 1e9:.2f} GB and {device} has "
                f"{free / 1e9:.2f} GB free. Set data.resident: auto."
            )
        if spec.resident == "auto" and spec.loader == "indexed" and free is not None:
            wanted = 2 * needed <= free and not any(source.shards.is_remote for source in self.sources)
        if wanted:
            self.resident = load_images(self.sources, device)

    def batches(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """This rank's parts of the global batches `start` .. `stop` - 1, in order, prepared ahead in a thread.

        Raises:
            UserError: the batch is not divisible by the number of processes.
            ShardUnusable: while iterating, a shard cannot be used and may not be skipped.
        """
        spec = self.spec
        assert self.resident is not None or spec.resident != "always", "place_images comes first"
        if spec.batch_size % world_size:
            raise UserError(f"data.batch_size {spec.batch_size} is not divisible by {world_size} processes. Change it.")
        if spec.loader == "webdataset":
            counts = self.plan.counts
            if any(count % world_size for count in counts):
                raise UserError(
                    f"data.loader webdataset needs counts that are divisible by {world_size} processes, but a batch has "
                    f"{' + '.join(map(str, counts))} images. Use data.loader: indexed, or another batch size."
                )
            return prefetched(webdataset_batches(self.sources, self.plan, rank, world_size, start, stop))
        cutmix_seed = self._seed if spec.augment.cutmix else None
        planned = PlannedBatches(self.plan, self.sources, rank, world_size, cutmix_seed, self.resident)
        return prefetched(planned(start, stop))

    def augmented(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """(x float32 [b, C, H, W] in [0, 1], y) on `device`: y is int64 [b], or float32 [b, K] if CutMix mixes labels."""
        spec, size, seed = self.spec.augment, self.spec.batch_size, self._seed

        def cropped(images: Tensor, places: Tensor) -> Tensor:
            return crop_and_flip(images.to(device, non_blocking=True), places, spec, size, seed, batch.step)

        x, y = cropped(batch.images, batch.places), batch.labels.to(device, non_blocking=True)
        if batch.partners is None:
            return to_float(x), y
        partners = cropped(batch.partners.images, batch.partners.places)
        x, own = cutmix(x, partners, batch.places, spec, size, seed, batch.step)
        other = batch.partners.labels.to(device, non_blocking=True)
        one_hot = [F.one_hot(labels, self.shards.num_classes).float() for labels in (y, other)]
        return to_float(x), own[:, None] * one_hot[0] + (1 - own[:, None]) * one_hot[1]

    def describe(self) -> dict[str, Any]:
        """The description that a run stores: by source, its fingerprint and the samples that are not trained on."""
        return {
            source.kind: {
                "fingerprint": source.shards.fingerprint,
                "num_images": len(source.shards),
                "num_held_out": len(source.held_out),
                "held_out_sha256": source.ids_sha256(source.held_out),
                "num_excluded": len(source.excluded),
                "excluded_sha256": source.ids_sha256(source.excluded),
                **({"given_labels_sha256": source.given_sha256} if _has_generated_noise(source) else {}),
            }
            for source in self.sources
        }


def _has_generated_noise(source: TrainingSource) -> bool:
    """Whether the labels of generated images are others than those in the shards that the fingerprint names."""
    return source.kind == GENERATED and source.given is not None


def _window(spec: DataSpec, shards: ShardSet) -> int | None:
    """The window of a source, in shards; two windows of a remote source must fit into the cache."""
    if not shards.is_remote:
        return spec.window
    window = spec.window or REMOTE_WINDOW
    needed = sum(sorted(shards.shard_bytes, reverse=True)[: 2 * window]) / 1e9
    if needed > spec.remote.cache_gb:
        raise UserError(
            f"data.remote.cache_gb is {spec.remote.cache_gb}, but two windows of {window} shards of {shards.folder} need "
            f"{needed:.3f} GB. Raise it, or lower data.window."
        )
    shards.max_open = 3 * window + 1  # an open map keeps the evicted file's bytes on disk, so they count
    return window


def open_training_data(spec: DataSpec, seed: int, *, verify: bool = True) -> TrainingData:
    """Open, verify, split and label the sources of `spec`.

    Raises `UserError` for missing or damaged shards, sources that do not fit together, and an impossible split.
    """
    if spec.real.shards is None and spec.real.noise.kind != "none":
        warn("data.real.noise has no effect, because data.real.shards is not set.")
    prepare = [source.prepare or "" for source in (spec.real, spec.generated)]
    commands = [line.strip() for text in prepare for line in text.splitlines() if line.strip()]
    cache = Cache(spec.remote.cache, spec.remote.cache_gb)
    opened = {
        kind: open_shards(source.shards, f"data.{kind}.shards", commands=commands, cache=cache)
        for kind, source in ((REAL, spec.real), (GENERATED, spec.generated))
        if source.shards is not None
    }
    if len({(shards.image_shape, shards.num_classes) for shards in opened.values()}) > 1:
        found = (f"{s.folder} has image shape {s.image_shape} and {s.num_classes} classes" for s in opened.values())
        raise UserError(f"Real and generated data do not fit together: {', '.join(found)}.")
    skips = SkipLog(spec.max_bad_shards if spec.on_bad_shard == "skip" else 0)
    for shards in opened.values() if verify else ():
        if skips.limit:
            shards.check()  # a bad shard is skipped when one of its samples is needed
        else:
            shards.verify()
    sources = {kind: _source(kind, shards, spec, skips) for kind, shards in opened.items()}
    return TrainingData(spec, sources, seed, skips)


def _source(kind: str, shards: ShardSet, spec: DataSpec, skips: SkipLog) -> TrainingSource:
    held_out = excluded = np.zeros(0, np.int64)
    if spec.validation.source == kind:
        held_out = choose_held_out(shards, spec.validation)
    if (path := getattr(spec, kind).exclude) is not None:
        excluded = read_excluded(path, shards, f"data.{kind}.exclude")
    noise = spec.noise_of(kind)
    # Without injected noise nobody knows which labels of generated images are wrong.
    given, clean = noisy_labels(shards, noise) if kind == REAL or noise.kind != "none" else (None, None)
    return TrainingSource(kind, shards, held_out, excluded, given, clean, skips)


def normalisation(shards: ShardSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) by channel, for the normalisation inside the model; 0.5 and 0.5 if the data set is unknown."""
    known, channels = DATASETS.get(shards.dataset), shards.image_shape[2]
    if known is not None and len(known.mean) == channels:
        return known.mean, known.std
    return (0.5,) * channels, (0.5,) * channels
