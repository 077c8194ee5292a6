"""Refuse evaluations that would be meaningless, and flag doubtful ones with a sentence.

The checks follow Carlini et al. 2019 (arXiv:1902.06705) and Croce et al. 2022 (arXiv:2202.13711).
"""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.attacks import RELEASED_CODE_WARNING, ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import frozen
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.attacks import Attack, attack_title, parse_attack
from nrat_scale.evaluate.backward_smoothing import smoothed_attack
from nrat_scale.evaluate.gaps import attack_gaps
from nrat_scale.evaluate.gradient_checks import check_gradients
from nrat_scale.evaluate.measures import Images
from nrat_scale.evaluate.output_scale import check_output_scale
from nrat_scale.evaluate.probe import PROBED_IMAGES, Probe, exact_float32
from nrat_scale.evaluate.results import Outcome

_SAME_LOGITS = 1e-3  # relative difference that kernels may cause for another batch size
_CONVERGED = 0.03  # a larger drop in accuracy by more steps or restarts means that fewer had not converged


@dataclass(frozen=True)
class ModelCheck:
    """The flags of a model, and the numbers behind them, which results.json records."""

    flags: list[str]
    numbers: dict[str, float]


def check_model(model: nn.Module, images: Images, threat: ThreatSpec, what: str) -> list[str]:
    """The flags of `inspect_model`."""
    return inspect_model(model, images, threat, what).flags


def inspect_model(model: nn.Module, images: Images, threat: ThreatSpec, what: str) -> ModelCheck:
    """Refuse a model that cannot be measured; look for masked gradients in one that can.

    Args:
        images: a few of the evaluated ones.
        what: names the model in errors.

    Raises:
        UserError: a module is in training mode, logits are not finite or not [B, K], gradients are not finite, or the logits
            of an image change between calls or with the other images of the batch.
    """
    for name, module in model.named_modules():
        if module.training:
            raise UserError(f"{what} is in training mode ({name or 'the model itself'}). Call model.eval() first.")
    device = next(model.parameters()).device
    x, y = to_float(images.pixels.to(device)), images.labels.to(device)
    with torch.no_grad():
        logits, again = model(x), model(x)
        alone = torch.cat([model(x[:1]), model(x[1:])]) if len(x) > 1 else logits
    if logits.ndim != 2 or len(logits) != len(x):
        raise UserError(f"{what} gives {list(logits.shape)} for {len(x)} images; expected logits [{len(x)}, classes].")
    if not bool(logits.isfinite().all()):
        raise UserError(f"{what} gives logits that are not finite: its accuracy would be meaningless.")
    if _differ(logits, again):
        reason = "Attacks on the expectation of a randomised model (AutoAttack's 'rand') are not available."
        raise UserError(f"{what} gives different logits for the same images. {reason}")
    if _differ(logits, alone):
        way_out = "If its BatchNorm uses batch statistics, evaluate it with running statistics."
        raise UserError(f"The logits of {what} depend on the other images of the batch. {way_out}")
    flags = [] if threat.space == "pixel" else [RELEASED_CODE_WARNING]
    check = look_for_masking(model, x[:PROBED_IMAGES], y[:PROBED_IMAGES], threat, what)
    return replace(check, flags=flags + check.flags)


def look_for_masking(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatSpec, what: str) -> ModelCheck:
    """Flags for an output whose scale hides gradients, for gradients that mislead, and for flat activations.

    Args:
        x: images [B, C, H, W] in [0, 1], on the device of the model.
        y: labels [B].

    Raises:
        UserError: gradients are not finite.
    """
    with exact_float32(), frozen(model):
        with torch.no_grad():
            logits = model(x).float()
        if logits.shape[1] < 2:
            return ModelCheck([], {})
        probe = Probe(model, x, y, logits, threat)
        numbers, scale = check_output_scale(probe, what)
        more, gradients = check_gradients(probe)
        smooth, flat = smoothed_attack(probe)
    # An output whose scale hides gradients fails the checks of the gradients, and one sentence tells more than two.
    return ModelCheck([*(scale or gradients), *flat], {"images": len(x), **numbers, **more, **smooth})


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > _SAME_LOGITS * (1 + one.abs().max()))


def contradictions(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Flags for outcomes of one model that cannot all be valid.

    Args:
        outcomes: by attack; without attacks that skipped images which others had broken.
    """
    attacks, flags = {}, []
    for name in outcomes:
        with suppress(UserError):  # skip attacks that only another version has
            attacks[name] = parse_attack(name)
    for strong, weak in itertools.permutations(attacks, 2):
        n, left, other = _common(outcomes[strong], outcomes[weak])
        natural = _common(outcomes["natural"], outcomes[weak])[1] if "natural" in outcomes else 1.0
        if n and (why := _contradiction(attacks[strong], attacks[weak], left, other, natural)):
            seen = f"{100 * left:.1f} % under {attack_title(strong)} and {100 * other:.1f} % under {attack_title(weak)}"
            flags.append(f"On the same {n} images accuracy is {seen}: {why}")
    return flags + attack_gaps(outcomes)


def _contradiction(strong: Attack, weak: Attack, left: float, other: float, natural: float) -> str | None:
    """How the accuracies `left` under `strong`, `other` under `weak` and `natural` contradict each other; None if not."""
    if strong.kind == "aa" and weak.kind in ("pgd", "cw", "fgsm") and left > other:
        return "the stronger attack broke fewer images, so it failed; AutoAttack's number is too high."
    if strong.kind == "pgd" and weak.kind == "fgsm" and left > 0 and other <= left and other < natural:
        return "one step breaks as many images as an iterated attack: a sign of masked gradients."
    more_steps = strong.steps >= weak.steps and strong.restarts >= weak.restarts
    if strong.kind == weak.kind and strong.kind in ("pgd", "cw") and more_steps and other - left > _CONVERGED:
        return "the shorter attack had not converged, and the longer one may not have either. Add steps and restarts."
    return None


def _common(one: Outcome, other: Outcome) -> tuple[int, float, float]:
    """(n, accuracy of `one`, accuracy of `other`) on the images that both contain."""
    _, rows, other_rows = np.intersect1d(one[0], other[0], assume_unique=True, return_indices=True)
    n = len(rows)
    return (n, float(one[1][rows].mean()), float(other[1][other_rows].mean())) if n else (0, 0.0, 0.0)
