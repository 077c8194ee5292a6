"""What an evaluation measures, and checks that model and data allow it."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.shards import ShardSet
from nrat_scale.data.spec import VALIDATION
from nrat_scale.evaluate.attacks import ATTACKS, TRANSFER, Attack, gradient_threat
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

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UserError("The evaluation names no attack. Give at least one, such as natural.")
        for name in ("images", "aa_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")

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

    def settings(self, attack: Attack, n: int, dropped: list[str]) -> dict[str, Any]:
        """How the attack is run, as its entry in results.json records it."""
        kind = ATTACKS[attack.kind]
        settings: dict[str, Any] = {"n": n, "seed": self.seed, "batch_size": self.batch_size}
        settings |= {"eps": self.threat.eps, "norm": self.threat.norm}
        if attack.steps:
            settings |= {"step": gradient_threat(attack, self.threat).step, "steps": attack.steps}
        if kind.perturb is not None and not kind.whole_blocks:
            settings["restarts"] = attack.restarts
        if attack.components:
            settings["components"] = list(attack.components)
        if self.source is not None and kind.perturb is not None:
            settings["source"] = {"label": self.source.label, "sha256": self.source.identity["sha256"]}
        if dropped:
            settings["without_images_broken_by"] = dropped
        return settings


def request_threat(
    what: str, trained: ThreatSpec | None, norm: str | None, eps: float | None, step: float | None
) -> ThreatSpec:
    """The threat to evaluate: given values first, then those of training; the step defaults to eps / 4.

    Args:
        what: names the target in the error.
        trained: the threat that the target was trained for, if known.
    """
    if trained is not None and norm in (None, trained.norm):  # a trained radius does not transfer to another norm
        return replace(trained, eps=trained.eps if eps is None else eps, step=trained.step if step is None else step)
    norm = norm or "linf"
    if eps is None:
        raise UserError(f"{what} names no {norm} radius that it was trained for. Give --eps, such as --eps 8/255.")
    return ThreatSpec(eps, eps / 4 if step is None else step, num_steps=1, norm=norm)


def check_fits(model: nn.Module, shards: ShardSet, what: str) -> None:
    """Refuse data whose channels or classes are not those of the model."""
    channels, classes = getattr(model, "in_chans", None), getattr(model, "num_classes", None)
    if channels not in (None, shards.image_shape[2]) or classes not in (None, shards.num_classes):
        data = f"{shards.folder} has {shards.image_shape[2]} channels and {shards.num_classes} classes"
        raise UserError(f"{what} takes {channels} channels and {classes} classes, but {data}. Give its own data set.")


def check_unseen(run: RunFolder, shards: ShardSet) -> None:
    """Refuse images that the run was trained on or its checkpoint was selected on."""
    if run.data.is_file():
        for kind, entry in read_json(run.data, "record of the training data").items():
            if entry.get("fingerprint") == shards.fingerprint:
                where = (
                    f"{shards.folder} is the {kind} training data of {run.path}, which includes its validation images"
                )
                if kind == VALIDATION:
                    where = f"{shards.folder} has the validation images that selected the checkpoint of {run.path}"
                raise UserError(f"{where}. Give the test split with --data.")
