"""The specs of a recipe's `data` section."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.plan import mix_counts
from nrat_scale.labels import GeneratedNoiseSpec, NoiseSpec
from nrat_scale.remote.address import is_remote
from nrat_scale.remote.cache import DEFAULT_CACHE_GB

REAL, GENERATED = "real", "generated"
DROP, RELABEL, WEIGHT = "drop", "relabel", "weight"  # what training does about labels that an audit doubts
VALIDATION = "validation"  # in data.json, the entry of `data.validation.shards`


def batch_shares(batch_size: int, fraction: float, kinds: Collection[str]) -> dict[str, float]:
    """The share of each source of `kinds` in the images of every batch: 154/512 and 358/512 for 512 images and 0.7.

    A noise rate is one of a source's labels; times this share it is the effective rate, that of a batch's labels.
    """
    counts = mix_counts(batch_size, fraction) if len(kinds) == 2 else (batch_size, batch_size)
    return {kind: count / batch_size for kind, count in zip((REAL, GENERATED), counts, strict=True) if kind in kinds}


def _check_not_empty(kind: str, shards: str | None, exclude: str | None) -> None:
    check_value(f"data.{kind}.shards", shards, shards != "", "a folder, an address or null")
    check_value(f"data.{kind}.exclude", exclude, exclude != "", "an .npy file or null")


@dataclass(frozen=True)
class AuditSpec:
    """What training does about labels that an audit doubts, after label noise is injected; `data.audit_action` acts."""

    KEY = "data.real.audit"  # the section of the recipe, for messages; not a field

    # Folder that `python -m nrat_scale.audit` wrote, of these shards and this noise; None: no action.
    scores: str | None = None
    # `drop`: samples of doubted labels are not trained on; `relabel`: they get the suggested label; `weight`: their loss is
    # multiplied by the probability that the label is right, and all weights of the source by one number, so that their mean is 1.
    action: str = DROP
    below: float = 0.5  # doubted are labels that are right with an estimated probability below this, in (0, 1]

    def __post_init__(self) -> None:
        check_value(f"{self.KEY}.scores", self.scores, self.scores != "", "the folder of an audit or null")
        check_choice(f"{self.KEY}.action", self.action, (DROP, RELABEL, WEIGHT))
        check_value(f"{self.KEY}.below", self.below, 0.0 < self.below <= 1.0, "in (0, 1]")
        if self.scores is None and (self.action, self.below) != (DROP, 0.5):
            raise UserError(f"{self.KEY} has an action but no scores. Set {self.KEY}.scores to the folder of an audit.")


@dataclass(frozen=True)
class GeneratedAuditSpec(AuditSpec):
    """The same for the generated images."""

    KEY = "data.generated.audit"


def _check_has_shards(kind: str, shards: str | None, audit: AuditSpec) -> None:
    if shards is None and audit.scores is not None:
        raise UserError(f"{audit.KEY}.scores is set, but data.{kind}.shards is not. Set it, or remove {audit.KEY}.")


@dataclass(frozen=True)
class RealSpec:
    """Real, labelled training images."""

    shards: str | None = None  # folder or address of shards; None trains on generated images alone
    noise: NoiseSpec = field(default_factory=NoiseSpec)  # drawn over the whole set before the validation split
    exclude: str | None = None  # .npy of source ids (integers [m]) never trained on, such as a test split in the shards
    prepare: str | None = None  # the commands that make the shards, one a line, shown if the shards are missing
    audit: AuditSpec = field(default_factory=AuditSpec)  # what is done about doubted labels

    def __post_init__(self) -> None:
        _check_not_empty(REAL, self.shards, self.exclude)
        _check_has_shards(REAL, self.shards, self.audit)


@dataclass(frozen=True)
class GeneratedSpec:
    """Generated images with the labels they were generated for."""

    shards: str | None = None  # folder or address of shards; None trains on real images alone
    fraction: float = 0.7  # generated part of every batch, in (0, 1]: floor(batch_size * fraction) images
    exclude: str | None = None  # as `data.real.exclude`
    prepare: str | None = None  # as `data.real.prepare`
    noise: GeneratedNoiseSpec = field(
        default_factory=GeneratedNoiseSpec
    )  # as `data.real.noise`; publications inject none
    audit: GeneratedAuditSpec = field(default_factory=GeneratedAuditSpec)  # as `data.real.audit`

    def __post_init__(self) -> None:
        _check_not_empty(GENERATED, self.shards, self.exclude)
        _check_has_shards(GENERATED, self.shards, self.audit)
        check_value("data.generated.fraction", self.fraction, 0.0 < self.fraction <= 1.0, "in (0, 1]")
        if self.noise.injects and self.shards is None:
            noise = f"data.generated.noise.kind is '{self.noise.kind}'"
            raise UserError(f"{noise}, but data.generated.shards is not set. Set it, or remove data.generated.noise.")


@dataclass(frozen=True)
class ValidationSpec:
    """The images that select the best checkpoint: held out of the training images, or of other shards."""

    source: str = REAL  # `real` or `generated`; has no effect with `shards`
    # Folder or address of other shards with the images, of which none is trained on; None holds training images out.
    shards: str | None = None
    size: int = 1024  # images; of `shards` at most this many
    take: str = "stratified"  # each class in proportion, by the stored labels; or `first`, in the order of the source
    # As training sees them, with the noise; or `clean`, those before it. Labels of `shards` never get noise: there `clean`
    # says that they are right, as `data.real.noise.kind: none` does of training labels.
    labels: str = "given"
    seed: int = 0  # of the choice; not the run's seed, so that runs with several seeds share one split

    def __post_init__(self) -> None:
        check_value("data.validation.shards", self.shards, self.shards != "", "a folder, an address or null")
        check_value("data.validation.size", self.size, self.size >= 1, "at least 1")
        check_choice("data.validation.source", self.source, (REAL, GENERATED))
        check_choice("data.validation.take", self.take, ("stratified", "first"))
        check_choice("data.validation.labels", self.labels, ("given", "clean"))


@dataclass(frozen=True)
class RemoteSpec:
    """The cache of shards behind an address, shared by the processes of a node."""

    cache: str | None = None  # folder; by default $NRAT_SCALE_CACHE or ~/.cache/nrat_scale
    cache_gb: float = DEFAULT_CACHE_GB  # size limit in 10^9 bytes; two windows of every remote source must fit

    def __post_init__(self) -> None:
        check_value("data.remote.cache_gb", self.cache_gb, self.cache_gb > 0, "greater than 0")


@dataclass(frozen=True)
class DataSpec:
    """The training data."""

    batch_size: int = 128  # images of the global batch, over all processes and accumulation steps
    epoch_samples: int | None = None  # rounded up to whole batches; by default the real (else the generated) images
    real: RealSpec = field(default_factory=RealSpec)
    generated: GeneratedSpec = field(default_factory=GeneratedSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    remote: RemoteSpec = field(default_factory=RemoteSpec)
    window: int | None = None  # shards shuffled together; by default the whole source, or 8 shards if it is remote
    loader: str = "indexed"  # by the sample plan, equal for any number of ranks; or `webdataset`, by that library
    # Keep all images in the memory of the device: `always`, `never`, or with `auto` on a GPU if all are local and take at most
    # half of its free memory. It changes no batch.
    resident: str = "auto"
    on_bad_shard: str = "stop"  # or `skip`: train without a shard that is missing or damaged for good
    max_bad_shards: int = 1  # that may be skipped

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source in the images of every batch."""
        kinds = [kind for kind in (REAL, GENERATED) if getattr(self, kind).shards is not None]
        return batch_shares(self.batch_size, self.generated.fraction, kinds)

    def settled(self, datasets: Mapping[str, str]) -> "DataSpec":
        """With label noise `none` or `unknown` instead of `auto`; `datasets` has the name in the shards of each source."""
        real = replace(self.real, noise=self.real.noise.settled(datasets.get(REAL)))
        generated = replace(self.generated, noise=self.generated.noise.settled(datasets.get(GENERATED)))
        return replace(self, real=real, generated=generated)

    def noise_of(self, kind: str) -> NoiseSpec:
        """The label noise of the source `real` or `generated`."""
        return self.real.noise if kind == REAL else self.generated.noise

    def audit_of(self, kind: str) -> AuditSpec:
        """What is done about doubted labels of the source `real` or `generated`."""
        return self.real.audit if kind == REAL else self.generated.audit

    def __post_init__(self) -> None:
        for name in ("batch_size", "epoch_samples", "window", "max_bad_shards"):
            value = getattr(self, name)
            check_value(f"data.{name}", value, value is None or value >= 1, "at least 1")
        check_choice("data.loader", self.loader, ("indexed", "webdataset"))
        check_choice("data.resident", self.resident, ("auto", "always", "never"))
        check_choice("data.on_bad_shard", self.on_bad_shard, ("stop", "skip"))
        given = {kind: shards for kind in (REAL, GENERATED) if (shards := getattr(self, kind).shards) is not None}
        if not given:
            raise UserError("Nothing to train on: give data.real.shards, data.generated.shards, or both.")
        source = self.validation.source
        if source not in given and self.validation.shards is None:
            raise UserError(f"data.validation.source is '{source}', but data.{source}.shards is not set.")
        if self.loader == "webdataset" and self.augment.cutmix:
            raise UserError("data.loader webdataset does not support data.augment.cutmix. Use data.loader: indexed.")
        if self.loader == "webdataset" and self.resident == "always":
            raise UserError("data.loader webdataset does not support data.resident always. Use data.loader: indexed.")
        for kind, shards in given.items():
            if self.resident == "always" and is_remote(shards):
                raise UserError(
                    f"data.resident is 'always', but data.{kind}.shards is the address {shards}: only local shards can be "
                    "kept on the device. Copy them to a folder, or set data.resident: auto."
                )
        counts = mix_counts(self.batch_size, self.generated.fraction)
        if len(given) == 2 and min(counts) == 0:
            raise UserError(
                f"With data.batch_size {self.batch_size} and data.generated.fraction {self.generated.fraction} every batch "
                f"would hold {counts[0]} real and {counts[1]} generated images. Change one, or train on one source."
            )
