"""`nrat_scale.attack`: the attacks of the evaluation on tensors of one's own."""

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.attacks import NORMS, ThreatSpec, short_reach
from nrat_scale.core.errors import UserError, check_choice, did_you_mean, warn
from nrat_scale.core.modes import attack_mode
from nrat_scale.evaluate.attacks import ATTACKS, Attack, Block, attack_usage, parse_attack

_STEPPED = ("pgd", "cw")  # kinds whose number of steps is part of the name


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float | None = None,
    steps: int = 20,
    norm: str = "linf",
    attack: str = "pgd",
    seed: int = 0,
) -> Tensor:
    """Adversarial images for `x`, by the code of `nrat_scale.evaluate`.

    Args:
        model: maps [0, 1] images [B, C, H, W] to logits [B, K], with its normalisation inside; on the device of `x`. It is
            attacked in evaluation mode; modes and gradients are afterwards as before.
        x: images in [0, 1], float32 or float64 [B, C, H, W].
        y: labels, int64 [B].
        eps: radius as a fraction of the pixel range, such as 8 / 255; for l2 the norm of the whole perturbation.
        step: step length in the same unit; default: eps / 4, and eps / steps for fewer than four steps.
        steps: gradient steps of `pgd` and `cw`.
        norm: `linf` or `l2`.
        attack: `pgd` (on cross-entropy), `cw` (on the margin), `fgsm`, `aa` (AutoAttack), or any name of
            `evaluate --attacks`, such as `pgd20x5`.
        seed: of the random starts.

    Returns:
        x_adv, shaped like `x`, within eps of it and in [0, 1]. Images that the model misclassifies are attacked too, except by
        AutoAttack. With restarts, each image is the first that the model misclassifies, else the last.

    Raises:
        UserError: an unknown attack or norm, images out of range, or labels that do not fit.
        FloatingPointError: a loss or gradient is not finite.
    """
    check_choice("norm", norm, NORMS)
    parsed = _parse(attack, steps)
    _check_images(x, y)
    usual = eps / 4 if parsed.steps >= 4 or not parsed.steps else eps / parsed.steps
    threat = ThreatSpec(eps, usual if step is None else step, parsed.steps, norm=norm)
    if parsed.kind in _STEPPED and (problem := short_reach(threat, parsed.steps)) is not None:
        warn(f"{parsed.title} is too weak for its radius: {problem}. Give a longer step or more steps.")
    perturb = ATTACKS[parsed.kind].perturb
    assert perturb is not None
    ids, found = np.arange(len(x)), x.detach().clone()
    open_rows = torch.arange(len(x), device=x.device)
    with attack_mode(model, "eval"):
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        if int(y.max()) >= classes or int(y.min()) < 0:
            raise UserError(f"y has labels {int(y.min())} to {int(y.max())}, but the model gives {classes} classes.")
        for restart in range(parsed.restarts):
            rows = open_rows.cpu().numpy()
            block = Block(model, x[open_rows].detach(), y[open_rows], ids[rows], threat, seed, restart)
            found[open_rows] = perturb(parsed, block)
            with torch.no_grad():
                open_rows = open_rows[model(found[open_rows]).argmax(1).eq(y[open_rows])]
            if not len(open_rows):
                break
    return found


def _parse(name: str, steps: int) -> Attack:
    if name in _STEPPED:
        if not 1 <= steps < 10**6:
            raise UserError(f"steps is {steps}; it must be at least 1.")
        return parse_attack(f"{name}{steps}")
    try:
        parsed = parse_attack(name)
    except UserError as error:
        near = did_you_mean(name, ("pgd", "cw", "fgsm", "aa"))
        raise UserError(f"There is no attack '{name}'. {near} Others: {attack_usage()}.") from error
    if ATTACKS[parsed.kind].perturb is None:
        raise UserError(f"'{name}' makes no adversarial images. Choose pgd, cw, fgsm or aa.")
    return parsed


def _check_images(x: Tensor, y: Tensor) -> None:
    """Refuse what would give silently wrong numbers: bytes, images that are normalised already, labels of another shape."""
    if x.ndim != 4 or not len(x) or not x.is_floating_point():
        raise UserError(f"x is {x.dtype} {list(x.shape)}; expected float images [B, C, H, W] in [0, 1].")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        hint = "Divide by 255" if low >= 0 else "Give images without normalisation, which belongs into the model"
        raise UserError(f"x has values from {low:.3g} to {high:.3g}; expected [0, 1]. {hint}.")
    if list(y.shape) != [len(x)] or y.is_floating_point() or y.dtype == torch.bool:
        raise UserError(f"y is {y.dtype} {list(y.shape)}; expected one class number per image, int64 [{len(x)}].")
    if y.device != x.device:
        raise UserError(f"y is on {y.device} and x on {x.device}; put both on the device of the model.")
