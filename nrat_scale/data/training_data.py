"""The data of a run: its sources, their mix, and this rank's batches. docs/data.md explains formats and choices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nrat_scale.core.errors import UserError, quoted, warn
from nrat_scale.core.seeds import derive
from nrat_scale.data.audit_action import act
from nrat_scale.data.augment import crop_and_flip, cutmix, cutmix_areas, to_float
from nrat_scale.data.batches import Batch, PlannedBatches, to_nchw
from nrat_scale.data.plan import SamplePlan, SourceOrder, mix_counts
from nrat_scale.data.prefetch import prefetched
from nrat_scale.data.resident import ResidentImages, image_bytes, load_images
from nrat_scale.data.shards import ShardSet, check_validation_fits, open_shards
from nrat_scale.data.source import UNKNOWN_LABEL, SkipLog, TrainingSource, noisy_labels
from nrat_scale.data.spec import GENERATED, REAL, VALIDATION, DataSpec
from nrat_scale.data.split import choose_held_out, read_excluded
from nrat_scale.data.webdataset_stream import webdataset_batches
from nrat_scale.datasets import DATASETS
from nrat_scale.labels import NoiseSpec
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

    def __init__(
        self,
        spec: DataSpec,
        sources: dict[str, TrainingSource],
        seed: int,
        skips: SkipLog,
        apart: TrainingSource | None = None,
    ) -> None:
        self.spec = spec  # with the label noise that the shards decide (`DataSpec.settled`)
        self.sources = list(sources.values())
        self.skips = skips
        self._apart = apart  # the images of data.validation.shards, of which none is trained on
        self._seed = seed
        self._by_kind = sources
        self.resident: ResidentImages | None = None  # until `place_images`
        counts = (spec.batch_size,) if len(sources) == 1 else mix_counts(spec.batch_size, spec.generated.fraction)
        orders = []
        for count, source in zip(counts, self.sources, strict=True):
            if not len(source):
                left_out = len(source.untrained)
                raise UserError(
                    f"No {source.kind} image is left for training after {left_out} were held out, excluded or dropped."
                )
            orders.append(SourceOrder(count, tuple(source.starts.tolist()), _window(spec, source.shards)))
        self.plan = SamplePlan(tuple(orders), derive(seed, "plan"))
        self.epoch_samples = spec.epoch_samples or len(self.sources[0])
        self.steps_per_epoch = -(-self.epoch_samples // spec.batch_size)

    @property
    def shards(self) -> ShardSet:
        """The shards of the first source, which name the classes and the image shape."""
        return self.sources[0].shards

    @property
    def num_images(self) -> int:
        """The images of all sources, those that are not trained on included: what `Batch.image_numbers` are below."""
        return sum(len(source.shards) for source in self.sources)

    @property
    def real(self) -> TrainingSource | None:
        """The real source, if the recipe has one."""
        return self._by_kind.get(REAL)

    @property
    def validation_shards(self) -> ShardSet:
        """The shards with the images that select the checkpoint."""
        return self._validation_source.shards

    @property
    def _validation_source(self) -> TrainingSource:
        return self._by_kind[self.spec.validation.source] if self._apart is None else self._apart

    @property
    def known_before(self) -> bool:
        """Whether the labels from before any injection of noise are known to be clean, in all sources that have them."""
        return all(
            self.spec.noise_of(source.kind).known_before(source.shards.dataset)
            for source in self.sources
            if source.clean is not None
        )

    def validation(self) -> LabelledImages:
        """The images that select the checkpoint, with the labels that `data.validation.labels` names."""
        source = self._validation_source
        images = to_nchw(source.shards.images(source.held_out))
        clean = torch.from_numpy(source.clean_labels(source.held_out)) if source.clean is not None else None
        if self.spec.validation.labels == "given":
            return LabelledImages(images, torch.from_numpy(source.given_labels(source.held_out)), clean)
        if clean is None:
            raise UserError(
                f"data.validation.labels is 'clean', but no clean labels of the {source.kind} images are known. Set it to "
                "given, or name images with clean labels by data.validation.shards."
            )
        return LabelledImages(images, clean, clean)

    def check_batch_size(self) -> None:
        """Raise `UserError` if a batch has more images of a source than there are: it would repeat images."""
        for count, source in zip(self.plan.counts, self.sources, strict=True):
            left, left_out = len(source), len(source.untrained)
            if count > left:
                without = f" besides the {left_out} that are held out, excluded or dropped" if left_out else ""
                raise UserError(
                    f"With data.batch_size {self.spec.batch_size} every batch has {count} {source.kind} images, but "
                    f"{source.shards.folder} has only {left} to train on{without}. "
                    f"Set data.batch_size={_largest_batch(self.spec, self.sources)} or less."
                )

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
        if batch.weights is not None:
            own = self._mixed_weights(batch, own)[1]
        return to_float(x), own[:, None] * one_hot[0] + (1 - own[:, None]) * one_hot[1]

    def loss_weights(self, batch: Batch, device: torch.device) -> Tensor | None:
        """float32 [b] on `device`: the weight of each image's loss; None if all are 1.

        An image that CutMix has mixed has its parts' weights in proportion to their areas, and `augmented` mixes the labels
        in proportion to area and weight, so that cross-entropy is the sum of the parts' weighted losses.
        """
        if batch.weights is None:
            return None
        if batch.partners is None:
            return batch.weights.to(device, non_blocking=True)
        spec, shape = self.spec.augment, self.shards.image_shape
        own = cutmix_areas(batch.places, spec, self.spec.batch_size, self._seed, batch.step, (shape[0], shape[1]))
        return self._mixed_weights(batch, own.to(device, non_blocking=True))[0]

    def _mixed_weights(self, batch: Batch, own: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [b], share of an image's own label [b]); `own` is the share of its area."""
        assert batch.weights is not None and batch.partners is not None and batch.partners.weights is not None
        first = own * batch.weights.to(own.device)
        total = first + (1 - own) * batch.partners.weights.to(own.device)
        return total, torch.where(total > 0, first / total, own)

    def describe(self) -> dict[str, Any]:
        """The description that a run stores: by source, its fingerprint and the samples that are not trained on."""
        return {
            source.kind: {
                "fingerprint": source.shards.fingerprint,
                "num_images": len(source.shards),
                "num_ids": source.shards.num_ids,
                "shards_sha256": source.shards.shards_sha256,
                "files_sha256": source.shards.files_sha256,
                "num_held_out": len(source.held_out),
                "held_out_sha256": source.ids_sha256(source.held_out),
                "num_excluded": len(source.excluded),
                "excluded_sha256": source.ids_sha256(source.excluded),
                **({"given_labels_sha256": source.given_sha256} if _has_generated_noise(source) else {}),
                **({} if source.action is None else {"audit": source.action.describe(source.shards)}),
            }
            for source in (*self.sources, *([] if self._apart is None else [self._apart]))
        }


def _has_generated_noise(source: TrainingSource) -> bool:
    """Whether the labels of generated images are others than those in the shards that the fingerprint names."""
    return source.kind == GENERATED and source.given is not None


def _largest_batch(spec: DataSpec, sources: Sequence[TrainingSource]) -> int:
    """The largest batch that has no image twice."""
    sizes = [len(source) for source in sources]
    if len(sizes) == 1:
        return sizes[0]

    def fits(size: int) -> bool:
        return all(count <= n for count, n in zip(mix_counts(size, spec.generated.fraction), sizes, strict=True))

    return next((size for size in range(spec.batch_size, 0, -1) if fits(size)), 1)


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
    if spec.real.shards is None and spec.real.noise.injects:
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
    spec = spec.settled({kind: shards.dataset for kind, shards in opened.items()})
    sources = {kind: _source(kind, shards, spec, skips) for kind, shards in opened.items()}
    apart = _validation_source(spec, opened, cache, verify=verify) if spec.validation.shards is not None else None
    return TrainingData(spec, sources, seed, skips, apart)


def _validation_source(
    spec: DataSpec, training: Mapping[str, ShardSet], cache: Cache, *, verify: bool
) -> TrainingSource:
    """The images of `data.validation.shards`; their labels are known to be clean if the recipe or the data set says so."""
    assert spec.validation.shards is not None
    shards = open_shards(spec.validation.shards, "data.validation.shards", cache=cache)
    for kind, others in training.items():
        check_validation_fits(shards, others, kind)
    if verify:
        shards.verify()  # none may be skipped: the selection would depend on which are usable
    chosen, nothing = choose_held_out(shards, spec.validation), np.zeros(0, np.int64)
    clean = None
    if spec.validation.labels == "clean" or shards.dataset in DATASETS:
        clean = np.full(len(shards), UNKNOWN_LABEL)
        clean[chosen] = shards.labels(chosen)
    return TrainingSource(VALIDATION, shards, chosen, nothing, None, clean, SkipLog(0))


def _source(kind: str, shards: ShardSet, spec: DataSpec, skips: SkipLog) -> TrainingSource:
    held_out = excluded = np.zeros(0, np.int64)
    if spec.validation.source == kind and spec.validation.shards is None:
        held_out = choose_held_out(shards, spec.validation)
    if (path := getattr(spec, kind).exclude) is not None:
        excluded = read_excluded(path, shards, f"data.{kind}.exclude")
    noise = spec.noise_of(kind)
    # Without injected noise nobody knows which labels are wrong, unless the stored ones are known to be right.
    known = noise.injects or noise.known_before(shards.dataset)
    given, clean = noisy_labels(shards, noise) if known else (None, None)
    if given is not None:
        _warn_of_filled_classes(shards, given, noise)
    action = act(kind, spec.audit_of(kind), shards, given, np.union1d(held_out, excluded))
    return TrainingSource(kind, shards, held_out, excluded, given, clean, skips, action)


def _warn_of_filled_classes(shards: ShardSet, given: np.ndarray, noise: NoiseSpec) -> None:
    """Warn if label noise assigns a class of which the shards have no image: all its labels are wrong then."""
    counts = np.bincount(given, minlength=shards.num_classes)
    filled = np.flatnonzero((np.asarray(shards.class_counts) == 0) & (counts > 0))
    if len(filled):
        first = int(filled[0])
        others = f" and {len(filled) - 1} more" if len(filled) > 1 else ""
        warn(
            f"{shards.folder} has no image of class {first} ({quoted(shards.class_names[first])}){others}, but {noise.KEY} "
            f"({noise.kind}) gives {int(counts[filled].sum())} images that label. Prepare the shards without empty classes."
        )


def normalisation(shards: ShardSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) by channel, for the normalisation inside the model; 0.5 and 0.5 if the data set is unknown."""
    known, channels = DATASETS.get(shards.dataset), shards.image_shape[2]
    if known is not None and len(known.mean) == channels:
        return known.mean, known.std
    return (0.5,) * channels, (0.5,) * channels
