"""What an evaluation is asked for: attacks, threat, images, seeds."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrat_scale.attacks import ThreatSpec, parse_fraction
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.data.batches import to_nchw
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.measures import Attack, Images
from nrat_scale.evaluate.targets import Target

TRANSFER = "transfer-"


# ---- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What to run on each subject.

    Attributes:
        attacks: in this order.
        threat: eps, step, norm and space.
        images, aa_images: a fixed seeded choice of so many images, for AutoAttack another number; None means all.
        batch_size: of the blocks.
        seed: of random starts, AutoAttack and the choice of images.
        source: whose adversarial images are used instead of the subject's own (transfer).
        drop_broken: do not attack again what an earlier attack of the list broke; AutoAttack excepted, which needs whole
            blocks.
    """

    attacks: tuple[Attack, ...]
    threat: ThreatSpec
    images: int | None = None
    aa_images: int | None = None
    batch_size: int = 256
    seed: int = 0
    source: Target | None = None
    drop_broken: bool = False

    def key(self, attack: Attack) -> str:
        """What results call it."""
        return attack.name if self.source is None or attack.kind == "natural" else TRANSFER + attack.name

    def count(self, attack: Attack, available: int) -> int:
        """How many of the images it is run on."""
        limits = [available, self.images, self.aa_images if attack.kind == "aa" else None]
        return min(limit for limit in limits if limit is not None)

    def settings(self, attack: Attack, n: int, dropped: list[str]) -> dict[str, Any]:
        """What the entry of results.json says of how it was measured."""
        settings: dict[str, Any] = {"n": n, "seed": self.seed, "batch_size": self.batch_size}
        settings |= {"eps": self.threat.eps, "norm": self.threat.norm}
        if attack.kind in ("pgd", "cw", "fgsm"):
            step = self.threat.eps if attack.kind == "fgsm" else self.threat.step
            settings |= {"step": step, "steps": attack.steps, "restarts": attack.restarts}
        if attack.components:
            settings["components"] = list(attack.components)
        if self.source is not None and attack.kind != "natural":
            settings["source"] = {"label": self.source.label, "sha256": self.source.identity["sha256"]}
        if dropped:
            settings["without_images_broken_by"] = dropped
        return settings


def read_images(shards: ShardSet, count: int | None = None, seed: int = 0) -> Images:
    """All images of `shards`, or a fixed seeded choice of `count` of them, in source order."""
    positions = shards.in_source_order()
    if count is not None and count < len(shards):
        positions = positions[np.sort(KeyedPermutation(len(shards), seed, "evaluate")(np.arange(count)))]
    images, labels = to_nchw(shards.images(positions)), torch.from_numpy(shards.labels(positions))
    return Images(images, labels, shards.source_ids(positions))


def requested_threat(arguments: argparse.Namespace, trained: ThreatSpec | None) -> ThreatSpec:
    norm = arguments.norm or (trained.norm if trained is not None else "linf")
    if trained is not None and norm != trained.norm:
        trained = None  # a radius means nothing in another norm
    if arguments.eps is None and trained is None:
        raise UserError(
            f"{arguments.what} does not say what {norm} radius it was trained for: give --eps, such as --eps 8/255."
        )
    eps = trained.eps if arguments.eps is None and trained is not None else _number("eps", arguments.eps)
    if arguments.step is not None:
        step = _number("step", arguments.step)
    else:
        step = trained.step if trained is not None else eps / 4
    space = trained.space if trained is not None else "pixel"
    return ThreatSpec(eps, step, num_steps=1, space=space, norm=norm)


def _number(name: str, text: str) -> float:
    try:
        return parse_fraction(text)
    except ValueError as error:
        raise UserError(f"--{name} {error}") from None


def parse_numbers(name: str, text: str | None) -> list[float] | None:
    return None if text is None else [_number(name, part) for part in text.split(",")]


def check_fits(model: nn.Module, shards: ShardSet, what: str) -> None:
    channels, classes = getattr(model, "in_chans", None), getattr(model, "num_classes", None)
    if channels not in (None, shards.image_shape[2]) or classes not in (None, shards.num_classes):
        raise UserError(
            f"{what} takes {channels} channels and knows {classes} classes, but {shards.folder} has "
            f"{shards.image_shape[2]} channels and {shards.num_classes} classes. Evaluate it on its own data set."
        )


def check_unseen(run: Path, shards: ShardSet) -> None:
    """Test images that were trained or selected on would make the numbers worthless."""
    path = run / "data.json"
    if path.is_file():
        for kind, entry in read_json(path, "record of the training data").items():
            if entry.get("fingerprint") == shards.fingerprint:
                raise UserError(
                    f"{shards.folder} is the {kind} training data of {run}, and validation images are held out from it. "
                    "Give the test split with --data."
                )
