"""The evaluation attacks: the table `ATTACKS` defines the names, titles and code of each.

To add an attack, add an entry: a pattern of its names and a function from (attack, block) to adversarial images.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec, apply_noise, in_space, pgd, start_noise
from nrat_scale.core.errors import UserError, did_you_mean, quoted
from nrat_scale.core.seeds import torch_generator
from nrat_scale.evaluate.autoattack import COMPONENTS, STANDARD, AutoAttackLog, autoattack, undefined_components
from nrat_scale.losses import LOSSES

TRANSFER = "transfer-"  # prefix in results: the adversarial images were made on another model


@dataclass(frozen=True)
class Attack:
    """An evaluation attack, parsed from its name."""

    name: str  # as given, such as pgd20x5
    kind: str  # its key in ATTACKS
    title: str  # its name in tables and text, such as "PGD-20, 5 starts"
    steps: int = 0  # gradient steps, 0 if the attack takes none
    restarts: int = 1  # independent random starts; an image counts as correct if it survives all of them
    components: tuple[str, ...] = ()  # of AutoAttack, in order


@dataclass(frozen=True)
class Block:
    """An evaluation block: the images that one call of an attack sees."""

    model: nn.Module  # the attacked model, in evaluation mode; maps [0, 1] images to logits [B, K]
    x: Tensor  # images, float32 [B, C, H, W] in [0, 1]
    y: Tensor  # labels, int64 [B]
    ids: np.ndarray  # int64 [B]; each seeds the noise of its image
    threat: ThreatSpec  # of which the attack uses eps, step, norm and space
    seed: int = 0
    restart: int = 0  # number of the random start
    log: AutoAttackLog | None = None  # receives what AutoAttack reports


@dataclass(frozen=True)
class AttackKind:
    """An entry of `ATTACKS`."""

    usage: str  # the names it takes, for --help
    pattern: str  # regular expression that matches a whole name
    parse: Callable[[re.Match[str]], dict[str, Any]]  # -> title and other fields of `Attack`; may raise `UserError`
    perturb: Callable[[Attack, Block], Tensor] | None  # -> x_adv, shaped like block.x; None: natural images
    whole_blocks: bool = False  # the outcome depends on the whole block: no image may be dropped from it
    # Raise it by hand with every change of the attack's code that can change an outcome: earlier results no longer count.
    version: int = 1


def parse_attack(name: str) -> Attack:
    """The attack called `name`; raises `UserError` for an unknown name."""
    for kind, entry in ATTACKS.items():
        if match := re.fullmatch(entry.pattern, name):
            return Attack(name, kind, **entry.parse(match))
    written = re.sub(r"[ _-]", "", name.lower())
    meant = _OTHER_NAMES.get(written, written)
    hint = f"Did you mean {meant}? " if any(re.fullmatch(entry.pattern, meant) for entry in ATTACKS.values()) else ""
    raise UserError(f"Unknown attack {quoted(name)}. {hint}Known: {attack_usage()}.")


_OTHER_NAMES = {"autoattack": "aa", "clean": "natural", "standard": "natural", "pgd": "pgd20", "cw": "cw20"}


def for_classes(attack: Attack, classes: int) -> tuple[Attack, list[str]]:
    """The attack without the parts of AutoAttack that are not defined for a number of classes, and why they are not.

    It is named by its parts: `aa` on three classes is `aa:apgd-ce+fab-t+square`, which no table calls AutoAttack.

    Raises:
        UserError: no part is defined.
    """
    left_out = undefined_components(attack.components, classes)
    if not left_out:
        return attack, []
    defined = [name for name in attack.components if name not in left_out]
    return parse_attack(f"aa:{'+'.join(defined)}"), list(left_out.values())


def needs_gradient(attack: Attack) -> bool:
    """Whether the attack follows gradients of the attacked model; natural images and Square do not."""
    return ATTACKS[attack.kind].perturb is not None and set(attack.components) != {"square"}


def attack_usage() -> str:
    """The names that `parse_attack` takes, for messages and --help."""
    return ", ".join(entry.usage for entry in ATTACKS.values())


def attack_title(name: str) -> str:
    """`pgd20` as PGD-20, `aa` as AutoAttack, `worst` as worst case; an unknown name as it is."""
    if name == "worst":
        return "worst case"
    if name.startswith(TRANSFER):
        return f"{attack_title(name.removeprefix(TRANSFER))}, transferred"
    with suppress(UserError):
        return parse_attack(name).title
    return name


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """CW loss [B] (Carlini and Wagner 2017): max over k != y of z_k, minus z_y; above 0 the image is misclassified."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def gradient_threat(attack: Attack, threat: ThreatSpec) -> ThreatSpec:
    """The PGD settings of fgsm (one step of eps from the image itself), pgdN and cwN (from a uniform start)."""
    init, step = ("zero", threat.eps) if attack.kind == "fgsm" else ("uniform", threat.step)
    return replace(threat, num_steps=attack.steps, step=step, init=init, bn="eval")


def _gradient_attack(loss: Callable[[Tensor, Tensor], Tensor], attack: Attack, block: Block) -> Tensor:
    threat = gradient_threat(attack, block.threat)
    restart = (block.restart,) if block.restart else ()
    # By image id and on the CPU: an image has the same start in any block and on any device.
    generators = (torch_generator("cpu", block.seed, "evaluate", int(i), *restart) for i in block.ids)
    shape, like = block.x.shape[1:], torch.zeros(())
    noise = torch.stack([start_noise(shape, threat.init, like, generator) for generator in generators])
    _, encode, _ = in_space(block.model, threat.space)
    start = apply_noise(encode(block.x), noise.to(block.x), threat)
    return pgd(block.model, block.x, lambda logits: loss(logits, block.y), threat, start=start)


_STEPS = "([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,3}))?"


def _parse_steps(match: re.Match[str]) -> dict[str, Any]:
    restarts = int(match[3] or 1)
    title = f"{match[1].upper()}-{match[2]}" + (f", {restarts} starts" if restarts > 1 else "")
    return {"title": title, "steps": int(match[2]), "restarts": restarts}


def _parse_components(match: re.Match[str]) -> dict[str, Any]:
    if match[0] == "aa":
        return {"title": "AutoAttack", "components": STANDARD}
    if match[0] == "aa-apgd":
        return {"title": "APGD", "components": STANDARD[:2]}
    components = tuple(match[1].split("+"))
    for name in components:
        if name not in COMPONENTS:
            raise UserError(f"AutoAttack has no component '{name}' (in '{match[0]}'). {did_you_mean(name, COMPONENTS)}")
    return {"title": match[0], "components": components}


def _autoattack(attack: Attack, block: Block) -> Tensor:
    return autoattack(block.model, block.x, block.y, block.threat, block.seed, attack.components, block.log)


_pgd, _cw = partial(_gradient_attack, LOSSES["ce"]), partial(_gradient_attack, margin)

ATTACKS: dict[str, AttackKind] = {
    "natural": AttackKind("natural", "natural", lambda match: {"title": "natural"}, None),
    "fgsm": AttackKind("fgsm", "fgsm", lambda match: {"title": "FGSM", "steps": 1}, _pgd),
    "pgd": AttackKind("pgdN or pgdNxR (N steps, R restarts)", f"(pgd){_STEPS}", _parse_steps, _pgd),
    "cw": AttackKind("cwN or cwNxR (the same on the CW margin)", f"(cw){_STEPS}", _parse_steps, _cw),
    "aa": AttackKind(
        "aa (AutoAttack), aa-apgd, aa:PART+PART", "aa|aa-apgd|aa:([a-z+-]+)", _parse_components, _autoattack, True
    ),
}
