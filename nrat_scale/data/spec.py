"""The specs of a recipe's data section, which validate themselves."""

from dataclasses import dataclass, field

from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.labels import NoiseSpec
from nrat_scale.remote.cache import DEFAULT_CACHE_GB

REAL, GENERATED = "real", "generated"
TAKES = ("stratified", "first")


@dataclass(frozen=True)
class RealSpec:
    """Real, labelled training images.

    Attributes:
        shards: folder or address of shards; None trains on generated images alone.
        noise: label noise put on them, drawn over the whole set before the validation split.
        exclude: an .npy file of source ids (integers [m]) that are never trained on, such as a test split of the same
            shards.
        prepare: the commands that make the shards, one a line, shown where they are missing.
    """

    shards: str | None = None
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    exclude: str | None = None
    prepare: str | None = None


@dataclass(frozen=True)
class GeneratedSpec:
    """Generated images with the labels they were generated for.

    Attributes:
        shards: folder or address of shards; None trains on real images alone.
        fraction: part of every batch, in (0, 1]: floor(batch_size * fraction) images, the rest is real.
        exclude, prepare: as for `RealSpec`.
    """

    shards: str | None = None
    fraction: float = 0.7
    exclude: str | None = None
    prepare: str | None = None


@dataclass(frozen=True)
class ValidationSpec:
    """Training images held out to select the best checkpoint.

    Attributes:
        source: `real` or `generated`.
        size: number of images.
        take: `stratified` (each class in proportion, by the labels stored in the shards) or `first` (in the order of the
            source).
        labels: `given` (as training sees them, with the noise) or `clean`.
        seed: of the choice; apart from the run's seed, so that runs with several seeds share one split.
    """

    source: str = REAL
    size: int = 1024
    take: str = "stratified"
    labels: str = "given"
    seed: int = 0


RESIDENT = ("auto", "always", "never")

LOADERS = ("indexed", "webdataset")
ON_BAD_SHARD = ("stop", "skip")


@dataclass(frozen=True)
class RemoteSpec:
    """Where shards behind an address are kept.

    Attributes:
        cache: folder for verified shards, shared by the processes of a node; by default $NRAT_SCALE_CACHE or
            ~/.cache/nrat_scale.
        cache_gb: its size limit in 10^9 bytes; two windows of every remote source must fit.
    """

    cache: str | None = None
    cache_gb: float = DEFAULT_CACHE_GB


@dataclass(frozen=True)
class DataSpec:
    """What is trained on.

    Attributes:
        batch_size: images of the global batch, over all processes and accumulation steps.
        epoch_samples: images that make an epoch (rounded up to whole batches); by default the number of real training
            images, or of generated ones where there are no real ones.
        real, generated, validation, augment, remote: see the specs.
        window: shards that are shuffled together; by default the whole source where it is local and 8 shards where it is
            remote.
        loader: `indexed` (the plan: exact, resumable, the same for any number of processes) or `webdataset` (the
            standard pipeline of that library).
        workers: loader processes; 0 gathers in a thread of the training process, which is faster.
        resident: `always` keeps the images of all sources in the memory of the device, so that only row numbers travel;
            `auto` does it on a GPU where local images take at most half of its free memory; `never`. It changes no batch.
        on_bad_shard: `stop`, or `skip`: train without a shard that stays missing or damaged.
        max_bad_shards: how many may be skipped.
    """

    batch_size: int = 128
    epoch_samples: int | None = None
    real: RealSpec = field(default_factory=RealSpec)
    generated: GeneratedSpec = field(default_factory=GeneratedSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    remote: RemoteSpec = field(default_factory=RemoteSpec)
    window: int | None = None
    loader: str = "indexed"
    workers: int = 0
    resident: str = "auto"
    on_bad_shard: str = "stop"
    max_bad_shards: int = 1

    def __post_init__(self) -> None:
        for name, value, low in (
            ("batch_size", self.batch_size, 1),
            ("epoch_samples", self.epoch_samples or 1, 1),
            ("validation.size", self.validation.size, 1),
            ("window", self.window or 1, 1),
            ("workers", self.workers, 0),
            ("max_bad_shards", self.max_bad_shards, 1),
        ):
            if value < low:
                raise UserError(f"data.{name} is {value}; it must be at least {low}.")
        for name, choice, known in (
            ("validation.source", self.validation.source, (REAL, GENERATED)),
            ("validation.take", self.validation.take, TAKES),
            ("validation.labels", self.validation.labels, ("given", "clean")),
            ("loader", self.loader, LOADERS),
            ("resident", self.resident, RESIDENT),
            ("on_bad_shard", self.on_bad_shard, ON_BAD_SHARD),
        ):
            if choice not in known:
                raise UserError(f"data.{name} is '{choice}'. {did_you_mean(choice, known)}")
        if not 0.0 < self.generated.fraction <= 1.0:
            raise UserError(f"data.generated.fraction is {self.generated.fraction}; it must be in (0, 1].")
        if not self.remote.cache_gb > 0:
            raise UserError(f"data.remote.cache_gb is {self.remote.cache_gb}; it must be greater than 0.")
        if self.real.shards is None and self.generated.shards is None:
            raise UserError("Nothing to train on: give data.real.shards, data.generated.shards, or both.")
        if getattr(self, self.validation.source).shards is None:
            raise UserError(
                f"data.validation.source is '{self.validation.source}', but data.{self.validation.source}.shards is not set."
            )
        if self.loader == "webdataset" and (self.workers or self.augment.cutmix):
            raise UserError("data.loader webdataset takes neither data.workers nor data.augment.cutmix: use indexed.")
        if self.resident == "always" and (self.loader == "webdataset" or self.workers):
            other = "data.loader webdataset" if self.loader == "webdataset" else f"data.workers {self.workers}"
            raise UserError(
                f"data.resident is 'always', which {other} does not take. "
                "Use the indexed loader with data.workers 0, or set data.resident: auto."
            )
