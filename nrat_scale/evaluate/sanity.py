"""Reasons not to believe a robust accuracy, after Carlini et al. 2019 (arXiv:1902.06705) and Croce et al. 2022
(arXiv:2202.13711): what makes an evaluation meaningless is refused, what makes it doubtful is a flag in plain words.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import frozen
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.measures import Attack, Images, parse_attack

# A pixel's gradient that small is less than what rounding leaves of probabilities in float32.
_VANISHED = 1e-10
_VANISHED_SHARE = 0.1
# Kernels may round differently for another batch; anything more is another answer.
_SAME_LOGITS = 1e-3
# Robust accuracy that more steps or restarts may take away before fewer were too few, as a fraction.
_CONVERGED = 0.03
_SPACE = (
    "threat.space is 'released_code': eps and the clamp to [0, 1] act in normalised units, which is another threat model "
    "than everybody else's. These numbers cannot be compared with RobustBench."
)


def check_model(model: nn.Module, images: Images, threat: ThreatSpec, what: str) -> list[str]:
    """Refuse a model that cannot be measured; the flags of one that can.

    Args:
        model: on its device.
        images: a few of those that are evaluated.
        what: names the model in errors.

    Raises:
        UserError: a module in training mode, logits that are not finite or not [B, K], gradients that are not finite, an
            answer that changes when the same image is shown again or beside other images.
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
        raise UserError(f"{what} gives logits that are not finite, so its accuracy means nothing.")
    if _differ(logits, again):
        raise UserError(
            f"{what} answers differently when it is shown the same images again. A random model needs attacks on the "
            "expectation (AutoAttack's version 'rand'), which is not what is measured here."
        )
    if _differ(logits, alone):
        raise UserError(
            f"What {what} says of an image depends on the images beside it (BatchNorm with batch statistics?). "
            "Evaluate it with running statistics."
        )
    flags = [] if threat.space == "pixel" else [_SPACE]
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-5).all()):
        flags.append(
            "The model gives probabilities instead of logits: their gradients vanish where it is sure, and attacks on logits "
            "are weakened. Take the softmax out."
        )
    return flags + _vanishing(model, x, y, logits, what)


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > _SAME_LOGITS * (1 + a.abs().max()))


def _vanishing(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, what: str) -> list[str]:
    right = logits.argmax(1) == y
    if not bool(right.any()):
        return []
    with frozen(model), torch.enable_grad():
        x = x[right].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y[right], reduction="sum"), x)
    if not bool(gradient.isfinite().all()):
        raise UserError(f"{what} gives gradients that are not finite: no attack can follow them.")
    share = float((gradient.abs().flatten(1).amax(1) < _VANISHED).float().mean())
    if share <= _VANISHED_SHARE:
        return []
    return [
        f"The gradient of the cross-entropy vanishes on {100 * share:.0f} % of {len(x)} images that are classified rightly: "
        "attacks that follow it (FGSM, PGD) find less than there is. Trust the margin (CW) and Square more."
    ]


# ---- what attacks say of each other ---------------------------------------------------------------------------------


def contradictions(outcomes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Flags for outcomes that cannot all be the truth about one model.

    Args:
        outcomes: by the attack's name, ids int64 [n] and whether the image survived, bool [n]; each attack on its own (no
            transfer, none that skipped what others broke).
    """
    attacks = {name: parse_attack(name) for name in outcomes}
    flags = []
    for strong, weak in ((a, b) for a in attacks for b in attacks if a != b):
        n, left, other = _common(outcomes[strong], outcomes[weak])
        if not n or attacks[strong].kind == "natural":
            continue
        natural = _common(outcomes["natural"], outcomes[weak])[1] if "natural" in outcomes else 1.0
        if why := _reason(attacks[strong], attacks[weak], left, other, natural):
            seen = f"{_named(strong)} leaves {_percent(left)} right, {_named(weak)} {_percent(other)}"
            flags.append(f"On the same {n} images {seen}: {why}")
    return flags


def _reason(strong: Attack, weak: Attack, left: float, other: float, natural: float) -> str | None:
    """Why it is suspicious that of `natural` right images `strong` leaves `left` and `weak` `other`; None where it is not."""
    if strong.kind == "aa" and weak.kind in ("pgd", "cw", "fgsm") and left > other:
        return "a stronger attack that breaks fewer images did not work; AutoAttack's number is too high."
    if strong.kind == "pgd" and weak.kind == "fgsm" and left > 0 and other <= left and other < natural:
        return "one step breaks as many as an iterated attack, which is what masked gradients look like."
    if strong.kind == weak.kind and strong.kind in ("pgd", "cw") and other - left > _CONVERGED:
        more_steps = strong.steps >= weak.steps and strong.restarts >= weak.restarts
        if more_steps:
            return (
                "more steps or restarts still find much, so the shorter attack had not converged; trust neither alone."
            )
    return None


def _common(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[int, float, float]:
    """(n, accuracy under a, accuracy under b) on the images that both were run on."""
    _, in_a, in_b = np.intersect1d(a[0], b[0], assume_unique=True, return_indices=True)
    n = len(in_a)
    return (n, float(a[1][in_a].mean()), float(b[1][in_b].mean())) if n else (0, 0.0, 0.0)


def _named(attack: str) -> str:
    return {"aa": "AutoAttack", "aa-apgd": "APGD"}.get(attack, attack)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
