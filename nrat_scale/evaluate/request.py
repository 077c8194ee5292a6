"""What an evaluation measures, and checks that model and data allow it."""

import hashlib
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch import nn

from nrat_scale.attacks import NORMS, ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.core.float32 import float32_mode
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.shards import ShardSet
from nrat_scale.data.spec import VALIDATION
from nrat_scale.evaluate.attacks import ATTACKS, TRANSFER, Attack, gradient_threat
from nrat_scale.evaluate.curves import CURVE_IMAGES, Curve, Point, curve_points
from nrat_scale.evaluate.key import EvaluationKey
from nrat_scale.evaluate.measures import Images
from nrat_scale.evaluate.overlap import SEEN, training_overlap
from nrat_scale.evaluate.results import package_versions
from nrat_scale.evaluate.targets import Target


@dataclass(frozen=True)
class Request:
    """What to measure on each target.

    Raises:
        UserError: no attack, or a size below 1.
    """

    attacks: tuple[Attack, ...]
    threat: ThreatSpec
    images: int | None = None  # size of a fixed seeded choice of images; None: all images
    aa_images: int | None = None  # the same for AutoAttack alone
    batch_size: int = 256  # images per evaluation block
    seed: int = 0  # of random starts, AutoAttack and the choice of images
    source: Target | None = None  # transfer attack: make the adversarial images on this model
    drop_broken: bool = False  # do not attack images that an earlier attack broke (not for AutoAttack)
    graphs: bool = False  # attack through a `GraphedModel`
    curves: tuple[Curve, ...] = ()

    def __post_init__(self) -> None:
        if not self.attacks and not self.curves:
            raise UserError("The evaluation names no attack. Give at least one, such as natural.")
        if self.curves and self.source is not None:
            raise UserError("--curve and --transfer-from do not go together: a curve attacks the model itself.")
        assert self.points or not self.curves  # raises for a radius out of range
        for name in ("images", "aa_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")

    @property
    def points(self) -> list[Point]:
        """The points of all curves; one that two curves share comes once."""
        points = [point for curve in self.curves for point in curve_points(curve, self.threat)]
        return list({point.name: point for point in points}.values())

    def of_point(self, point: Point) -> "Request":
        """What one point of a curve measures: the same choice of images for all of them."""
        images = CURVE_IMAGES if self.images is None else self.images
        return replace(self, attacks=(point.attack,), threat=point.threat, images=images, curves=(), drop_broken=False)

    def key(self, attack: Attack) -> str:
        """The name of the attack's entry in results.json."""
        transfers = self.source is not None and ATTACKS[attack.kind].perturb is not None
        return TRANSFER + attack.name if transfers else attack.name

    def drops_broken(self, attack: Attack) -> bool:
        """Whether the attack skips images that an earlier one broke."""
        kind = ATTACKS[attack.kind]
        return self.drop_broken and kind.perturb is not None and not kind.whole_blocks

    def count(self, attack: Attack, available: int) -> int:
        """The number of images to run the attack on."""
        limits = [available, self.images, self.aa_images if attack.kind == "aa" else None]
        return min(limit for limit in limits if limit is not None)

    def evaluation_key(
        self, attack: Attack, target: Target, shards: ShardSet, images: Images, dropped: list[str], skipped: np.ndarray
    ) -> EvaluationKey:
        """The key of the attack's outcome on `images`.

        Args:
            dropped: earlier attacks; the images that they broke are not attacked.
            skipped: bool [n], these images.
        """
        kind, steps = ATTACKS[attack.kind], attack.steps or None
        device = next(target.model.parameters()).device
        source = None
        if self.source is not None and kind.perturb is not None:
            source = {"label": self.source.label, "sha256": self.source.identity["sha256"], **asdict(self.source.key)}
        return EvaluationKey(
            **asdict(target.key),
            num_classes=shards.num_classes,
            data_sha256=shards.fingerprint,
            attack=attack.name,
            attack_version=kind.version,
            components=list(attack.components) or None,
            norm=self.threat.norm,
            eps=self.threat.eps,
            space=self.threat.space,
            step=None if steps is None else gradient_threat(attack, self.threat).step,
            steps=steps,
            restarts=None if kind.perturb is None or kind.whole_blocks else attack.restarts,
            source=source,
            without_images_broken_by=dropped or None,
            skipped_sha256=hashlib.sha256(images.ids[skipped].astype("<i8").tobytes()).hexdigest() if dropped else None,
            n=len(images),
            seed=self.seed,
            batch_size=self.batch_size,
            device=device.type,
            float32=float32_mode(device),
            graphs=self.graphs or None,
            versions=package_versions(),
        )


def request_threat(
    what: str,
    trained: ThreatSpec | None,
    norm: str | None,
    eps: float | None,
    step: float | None,
    space: str | None = None,
) -> ThreatSpec:
    """The threat to evaluate: given values first, then those of training; the step defaults to eps / 4.

    Args:
        what: names the target in the error.
        trained: the threat that the target was trained for, if known.

    Raises:
        UserError: no radius is known, or the step is no step within the ball: 0, or longer than its diameter.
    """
    if space is not None:
        return replace(request_threat(what, trained, norm, eps, step), space=space)
    if step is not None and not step > 0:
        raise UserError(f"--step is {step:g}; PGD and CW would stay at their start. Give a length above 0, or omit it.")
    if trained is not None and norm in (None, trained.norm):  # a trained radius does not transfer to another norm
        if eps not in (None, trained.eps) and step is None:  # nor does the step to another radius
            return _within(replace(trained, eps=eps, step=eps / 4))
        return _within(
            replace(trained, eps=trained.eps if eps is None else eps, step=trained.step if step is None else step)
        )
    norm = norm or "linf"
    if eps is None:
        raise UserError(
            f"{what} names no {NORMS[norm]} radius that it was trained for. Give --eps, such as --eps 8/255."
        )
    return _within(ThreatSpec(eps, eps / 4 if step is None else step, num_steps=1, norm=norm))


def _within(threat: ThreatSpec) -> ThreatSpec:
    """`threat`; raises `UserError` if each step would cross its whole ball, which makes PGD and CW weak."""
    if threat.step > 2 * threat.eps > 0:
        longer = f"The step {threat.step:g} is longer than the diameter of the ball, whose radius is {threat.eps:g}"
        raise UserError(f"{longer}: PGD and CW would be weak. Give a smaller --step, such as {threat.eps / 4:g}.")
    return threat


def check_fits(model: nn.Module, shards: ShardSet, what: str) -> None:
    """Refuse data whose channels or classes are not those of the model."""
    channels, classes = getattr(model, "in_chans", None), getattr(model, "num_classes", None)
    if channels not in (None, shards.image_shape[2]) or classes not in (None, shards.num_classes):
        data = f"{shards.folder} has {shards.image_shape[2]} channels and {shards.num_classes} classes"
        raise UserError(f"{what} takes {channels} channels and {classes} classes, but {data}. Give its own data set.")


def check_unseen(run: RunFolder, shards: ShardSet) -> None:
    """Refuse images that the run was trained on or its checkpoint was selected on."""
    found = training_overlap(run.path, shards)
    if found.verdict != SEEN:
        return
    where = f"{shards.folder} is {found.source} training data: {run.path} {found.reason}, validation images included"
    if found.source == VALIDATION:
        where = f"{shards.folder} has the validation images that selected the checkpoint of {run.path}"
    raise UserError(f"{where}. Give the test split with --data.")
