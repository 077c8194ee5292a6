"""Which images a model still classifies rightly under an attack, and accuracy with its interval.

Training's validation and the final evaluation both call `block_outcome`, on fixed blocks of consecutive images. Random
starts are drawn by image id, AutoAttack by block, so results do not depend on which process takes which block. Accuracy is a
mean over images, never of batch means.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nrat_scale.attacks import ThreatSpec, apply_noise, in_space, pgd, start_noise
from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.core.seeds import torch_generator
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.autoattack import COMPONENTS, STANDARD, autoattack
from nrat_scale.losses import LOSSES

_ATTACK = re.compile(r"(natural|fgsm|aa|aa-apgd|aa:([a-z+-]+)|(pgd|cw)([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,3}))?)")
KNOWN = (
    "natural, fgsm, pgdN and cwN (N steps, such as pgd20; pgd20x5 with 5 restarts), aa, aa-apgd, "
    "aa:PART+PART (parts of AutoAttack)"
)


class Interrupted(Exception):
    """An evaluation was given up because somebody asked for it."""


# ---- attacks by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """An evaluation attack.

    Attributes:
        name: as it was written.
        kind: `natural`, `fgsm`, `pgd` (cross-entropy), `cw` (margin) or `aa`.
        steps: gradient steps of fgsm, pgd and cw.
        restarts: independent random starts; an image counts as right if it survives all of them.
        components: the parts of AutoAttack, in their order.
    """

    name: str
    kind: str
    steps: int = 0
    restarts: int = 1
    components: tuple[str, ...] = ()


def parse_attack(name: str) -> Attack:
    """The attack called `name`.

    Raises:
        UserError: there is none.
    """
    match = _ATTACK.fullmatch(name)
    if match is None:
        raise UserError(f"Unknown attack '{name}'. Known: {KNOWN}.")
    if match[3]:
        return Attack(name, match[3], int(match[4]), int(match[5] or 1))
    if match[2]:
        components = tuple(match[2].split("+"))
        for component in components:
            if component not in COMPONENTS:
                raise UserError(
                    f"AutoAttack has no part '{component}' (in '{name}'). {did_you_mean(component, COMPONENTS)}"
                )
        return Attack(name, "aa", components=components)
    if name in ("aa", "aa-apgd"):
        return Attack(name, "aa", components=STANDARD if name == "aa" else STANDARD[:2])
    return Attack(name, name, steps=1 if name == "fgsm" else 0)


# ---- per-image outcomes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What is evaluated: images uint8 [n, C, H, W], labels int64 [n], ids int64 [n] that seed each image's noise."""

    pixels: Tensor
    labels: Tensor
    ids: np.ndarray

    def __post_init__(self) -> None:
        # Bytes cannot be outside [0, 1] once they are divided by 255.
        assert self.pixels.dtype == torch.uint8, f"images are evaluated as uint8, not {self.pixels.dtype}"

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: np.ndarray) -> "Images":
        """The images in `rows` [m]."""
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return Images(self.pixels[index], self.labels[index], self.ids[rows])

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """The rows [m] of each block of `size` consecutive images; the last one holds what is left."""
        return (np.arange(start, min(start + size, len(self))) for start in range(0, len(self), size))


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The CW loss of each image [B]: max over k != y of z_k, minus z_y; above 0 the image is misclassified."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


_INNERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pgd": LOSSES["ce"], "fgsm": LOSSES["ce"], "cw": margin}


def correct_under(
    attack: str,
    model: nn.Module,
    images: Images,
    threat: ThreatSpec,
    *,
    seed: int = 0,
    batch_size: int = 256,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Which images the model still classifies rightly under `attack`: bool [n]; `block_outcome`, block by block.

    Args:
        attack: see `parse_attack`.
        model, threat, seed: see `block_outcome`.
        batch_size: of the blocks, which the result of AutoAttack depends on.
        stopped: asked before each block; once it is true the rest is given up.

    Raises:
        Interrupted: `stopped` said so.
        UserError: an unknown attack.
        FloatingPointError: logits or gradients are not finite.
    """
    parsed, outcome = parse_attack(attack), np.zeros(len(images), bool)
    for rows in images.blocks(batch_size):
        if stopped():
            raise Interrupted
        outcome[rows] = block_outcome(parsed, model, images.take(rows), threat, seed=seed)
    return outcome


def block_outcome(
    attack: Attack,
    model: nn.Module,
    images: Images,
    threat: ThreatSpec,
    *,
    seed: int = 0,
    source: nn.Module | None = None,
    broken: np.ndarray | None = None,
    warn: Callable[[str], None] = lambda message: None,
    bar: "tqdm[Any] | None" = None,
) -> np.ndarray:
    """Which images of one block the model still classifies rightly under `attack`: bool [n].

    A misclassified image is broken already and not attacked. AutoAttack skips such images by itself; it gets whole blocks,
    so that calling it directly on the same block gives the same images.

    Args:
        attack: which.
        model: in evaluation mode, on the device to use; maps [0, 1] images to logits.
        images: the block.
        threat: eps, step length, norm and space.
        seed: of the random starts.
        source: the model that the adversarial images are made on instead (a transfer attack).
        broken: bool [n], images not worth attacking (an earlier attack broke them); they count as wrong.
        warn: is told what AutoAttack's own checks complain of.
        bar: shows which part of AutoAttack is running.

    Raises:
        FloatingPointError: logits or gradients are not finite.
    """
    assert not model.training, "a model is evaluated in evaluation mode"
    assert source is None or not source.training
    device = next(model.parameters()).device
    x, y = to_float(images.pixels.to(device)), images.labels.to(device)
    outcome: np.ndarray = _argmax(model, x).eq(y).cpu().numpy()
    if broken is not None:
        outcome &= ~broken
    if attack.kind == "natural" or not outcome.any():
        return outcome
    attacker = model if source is None else source
    if attack.kind == "aa":
        running = (lambda name: None) if bar is None else bar.set_postfix_str
        x_adv = autoattack(
            attacker, x, y, threat, seed, components=attack.components, running=running, warn=warn
        )  # fmt: skip
        return outcome & _argmax(model, x_adv).eq(y).cpu().numpy()
    for restart in range(attack.restarts):
        rows = torch.from_numpy(np.flatnonzero(outcome)).to(device)
        if not len(rows):
            break
        ids = images.ids[rows.cpu().numpy()]
        x_adv = _perturbed(attack, attacker, x[rows], y[rows], ids, threat, seed, restart)
        outcome[rows.cpu().numpy()] = _argmax(model, x_adv).eq(y[rows]).cpu().numpy()
    return outcome


def _perturbed(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, threat: ThreatSpec, seed: int, restart: int
) -> Tensor:
    """What fgsm, pgd or cw make of these images from their start number `restart`."""
    init, step = ("zero", threat.eps) if attack.kind == "fgsm" else ("uniform", threat.step)
    spec = replace(threat, num_steps=attack.steps, step=step, init=init, bn="eval")
    start = _start(model, x, ids, spec, seed, restart)
    return pgd(model, x, lambda logits: _INNERS[attack.kind](logits, y), spec, start=start)


def _start(model: nn.Module, x: Tensor, ids: np.ndarray, threat: ThreatSpec, seed: int, restart: int) -> Tensor:
    """The random start of each image, drawn by its id (on the CPU, so that it is the same on every device)."""
    cpu = torch.zeros(())
    again = (restart,) if restart else ()
    noise = torch.stack(
        [
            start_noise(x.shape[1:], threat.init, cpu, torch_generator("cpu", seed, "evaluate", int(i), *again))
            for i in ids
        ]
    )
    _, encode, _ = in_space(model, threat.space)
    return apply_noise(encode(x), noise.to(x), threat)


@torch.no_grad()
def _argmax(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    if not bool(logits.isfinite().all()):
        # argmax of NaN is class 0: it would pass for a prediction.
        raise FloatingPointError("The model's logits are not finite, so its accuracy means nothing.")
    return logits.argmax(1)
