"""The PGD loop of training, validation and evaluation. `threat` has the perturbation set and its notation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import attack_mode, frozen
from nrat_scale.threat import (
    AUTOATTACK_NORMS,
    INITS,
    NORMS,
    RELEASED_CODE_WARNING,
    SPACES,
    PhaseSpec,
    ThreatSpec,
    attack_text,
    evaluation_threat,
    fraction_text,
    parse_fraction,
    short_reach,
    threat_text,
)

__all__ = [
    "AUTOATTACK_NORMS",
    "INITS",
    "NORMS",
    "RELEASED_CODE_WARNING",
    "SPACES",
    "Found",
    "Map",
    "PhaseSpec",
    "ThreatSpec",
    "apply_noise",
    "attack_text",
    "evaluation_threat",
    "fraction_text",
    "in_space",
    "inside_ball",
    "parse_fraction",
    "pgd",
    "project",
    "search",
    "short_reach",
    "start_noise",
    "threat_text",
]

Map = Callable[[Tensor], Tensor]

_BALL_TOLERANCE = 2.0**-23  # float32 rounding of x + eps and of x_adv - x; pixels are at most 1


def pgd(
    model: nn.Module,
    x: Tensor,
    inner: Map,
    threat: ThreatSpec,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): x <- clamp(project_eps(x + step * direction), 0, 1).

    The direction is sign(grad) in l_inf and grad / ||grad||_2 in l_2. With `threat.attack: n_fgsm` nothing is projected.

    Args:
        model: maps [0, 1] images to logits [B, K]. Its parameters are frozen during the attack; modes are restored.
        x: natural images [B, C, H, W] in [0, 1], float32 or float64.
        inner: maps adversarial logits [B, K] to the loss [B] that the attack maximises.
        threat: radius, step, number of steps, start, BatchNorm mode, space.
        start: starting point, shaped like `x`, instead of `threat.init`.
        generator: for the random start, on the device of `x`.

    Returns:
        x_adv, shaped like `x`, detached: finite, in [0, 1] and within `threat.farthest` of `x` (asserted in float32).

    Raises:
        FloatingPointError: the attack's loss or gradient is not finite (sign(NaN) is 0 and would silently stop it).
    """
    with attack_mode(model, threat.bn), frozen(model):
        space_model, encode, decode = in_space(model, threat.space)
        x = encode(x.detach())
        if start is None:
            start = apply_noise(x, start_noise(x.shape, threat.start, x, generator), threat)
        found = search(space_model, x, inner, threat, start)
    if not found.finite:
        raise FloatingPointError(
            "The loss or gradient of the attack is not finite: the model's logits overflow or are NaN. "
            "Lower the learning rate, or train in bf16 or fp32 instead of fp16."
        )
    assert found.inside, f"the perturbation exceeds eps {threat.eps} or leaves [0, 1]"
    return decode(found.x_adv)


@dataclass(frozen=True)
class Found:
    """The result of `search`, as tensors on the device; `finite` and `inside` are bool scalars."""

    x_adv: Tensor  # shaped like the images, detached
    finite: Tensor  # every loss and gradient was finite
    inside: Tensor  # see `inside_ball`; if `finite` holds, only a bug can make it false
    gradient: Tensor | None  # of the first step, shaped like the images; None without a step


def search(
    model: Map, x: Tensor, inner: Map, threat: ThreatSpec, start: Tensor, first_model: Map | None = None
) -> Found:
    """The PGD loop from `start`, without a CPU-GPU sync point.

    Args:
        model: maps images to logits; the caller has frozen its parameters and set its mode.
        x, inner, threat, start: see `pgd`.
        first_model: the model in higher precision, for the first step. Close to `x` the gradient of a divergence is the
            difference of two almost equal outputs, in bf16 mere rounding noise.
    """
    x_adv, first_gradient = start.detach().clone(), None
    radius = math.inf if threat.attack == "n_fgsm" else threat.eps
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for number in range(threat.num_steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            attacked = first_model if first_model is not None and number == 0 else model
            objective = inner(attacked(x_adv))
            # Sum, not mean: the direction is the same and does not underflow in half precision.
            (gradient,) = torch.autograd.grad(objective.sum(), x_adv)
        finite &= gradient.isfinite().all() & objective.isfinite().all()
        first_gradient = gradient if number == 0 else first_gradient
        x_adv = project(x_adv.detach() + threat.step * _direction(gradient, threat.norm), x, radius, threat.norm)
    if threat.num_steps == 0:
        x_adv = project(x_adv, x, threat.eps, threat.norm)
    inside = inside_ball(x_adv, x, threat.farthest, around=threat.space == "pixel", norm=threat.norm)
    return Found(x_adv, finite, inside, first_gradient)


def start_noise(shape: torch.Size, init: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit noise of `shape` for `apply_noise`: N(0, 1), or U(-1, 1) for `uniform`; zeros for `zero`.

    Raises `UserError` for `per_class`, whose perturbations are part of the state of training.
    """
    if init == "per_class":
        raise UserError(
            "threat.init 'per_class' is for training, which keeps the perturbations. Give a start, or another init."
        )
    if init == "zero":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if init == "uniform":
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def apply_noise(x: Tensor, noise: Tensor, threat: ThreatSpec) -> Tensor:
    """The starting point that `threat` makes from unit `noise` (shaped like `x`): for `per_class` perturbations in [-1, 1]."""
    if threat.attack == "n_fgsm":
        return (x + threat.noise * threat.eps * noise).clamp(0, 1)
    if threat.init == "zero":
        return x.clone()
    if threat.init in ("uniform", "per_class"):
        return (x + threat.eps * (noise if threat.norm == "linf" else noise / _lengths(noise))).clamp(0, 1)
    if threat.init == "normal":
        return x + 0.001 * noise  # not clamped, as in TRADES: the first projection clamps
    return project(x + noise, x, threat.eps, threat.norm)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Project onto the ball of radius `eps` around `x`, then onto [0, 1], which does not increase the distance to `x`."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / _lengths(delta)).clamp(max=1)).clamp(0, 1)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    # Divide by the largest entry first: squares of small gradients underflow.
    largest = gradient.abs().amax((-3, -2, -1), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient / largest / _lengths(gradient / largest)


def _lengths(delta: Tensor) -> Tensor:
    """The l_2 norm of each image [B, 1, 1, 1] or of one image [1, 1, 1], at least the smallest normal number."""
    return torch.linalg.vector_norm(delta, dim=(-3, -2, -1), keepdim=True).clamp(min=torch.finfo(delta.dtype).tiny)


def inside_ball(x_adv: Tensor, x: Tensor, eps: float, *, around: bool, norm: str = "linf") -> Tensor:
    """Bool scalar: `x_adv` is finite, in [0, 1] and (if `around`) within `eps` of `x`, compared in float32 or float64."""
    x_adv, x = (images if images.dtype == torch.float64 else images.float() for images in (x_adv, x))
    inside = ((x_adv >= 0) & (x_adv <= 1)).all()  # false for NaN
    if not around:
        return inside
    if norm == "linf":
        return inside & ((x_adv - x).abs() <= eps + _BALL_TOLERANCE).all()
    # Each coordinate is off by at most one rounding error, so the norm by at most sqrt(coordinates) of them.
    slack = eps * 2.0**-20 + _BALL_TOLERANCE * math.sqrt(x[0].numel())
    return inside & (_lengths(x_adv - x) <= eps + slack).all()


def in_space(model: nn.Module, space: str, forward: Map | None = None) -> tuple[Map, Map, Map]:
    """The model in the coordinates of a threat space, with the maps from pixels to these coordinates and back.

    `pixel`: identities. `released_code`: coordinates are (x - mean) / std with the model's constants, so that eps and the
    clamp to [0, 1] act as in that code; the returned model maps back to pixels first. It calls `forward` instead of
    `model` if given, for instance under autocast.
    """
    forward = forward if forward is not None else model
    if space == "pixel":
        return forward, lambda x: x, lambda x: x
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        raise UserError("threat.space 'released_code' needs a model with `mean` and `std` buffers, like all of ours.")

    def encode(pixels: Tensor) -> Tensor:
        return (pixels - mean.to(pixels.dtype)) / std.to(pixels.dtype)

    def decode(normalised: Tensor) -> Tensor:
        return normalised * std.to(normalised.dtype) + mean.to(normalised.dtype)

    return lambda normalised: forward(decode(normalised)), encode, decode
