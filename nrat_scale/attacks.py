"""The threat model and the one projected-gradient loop that training, validation and evaluation share.

Pixels are in [0, 1] and normalisation is inside the model. `threat.space: released_code` repeats what the paper's
released code does instead (eps and the clamp to [0, 1] in *normalised* units) for comparison; it is never a default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.core.modes import BN_MODES, attack_mode, frozen

Model = Callable[[Tensor], Tensor]
Inner = Callable[[Tensor], Tensor]

NORMS = ("linf", "l2")
INITS = ("zero", "normal", "uniform", "normal01")
SPACES = ("pixel", "released_code")
# One float32 rounding of x + eps and of the subtraction that checks it: pixels are at most 1.
_BALL_TOLERANCE = 2.0**-23


@dataclass(frozen=True)
class ThreatSpec:
    """An l_inf or l_2 threat and how it is searched.

    Attributes:
        eps: radius as a fraction of the pixel range (recipes may write `8/255`); in l_2 the norm of the whole perturbation.
        step: step length in the same unit and norm.
        num_steps: gradient steps.
        init: `zero`; `normal` = x + 0.001 N(0, 1); `uniform` = x + U(-eps, eps), clamped (in l_2: of length eps in the
            direction of such noise); `normal01` = x + N(0, 1), projected.
        bn: BatchNorm while attacking: `eval`, or `batch` (batch statistics, running ones untouched).
        space: `pixel`, or `released_code` (l_inf only).
        norm: `linf` or `l2`.

    Raises:
        UserError: a value out of range or of the wrong unit.
    """

    eps: float
    step: float
    num_steps: int
    init: str = "uniform"
    bn: str = "eval"
    space: str = "pixel"
    norm: str = "linf"

    def __post_init__(self) -> None:
        for name, value in (("eps", self.eps), ("step", self.step)):
            if self.norm == "l2" and 0.0 <= value < math.inf:
                continue
            if not 0.0 <= value < 1.0:
                hint = f" Write {value:g}/255 if you mean {value:g} grey levels." if value >= 1.0 else ""
                raise UserError(f"threat.{name} is {value:g}; it is a fraction of the pixel range, in [0, 1).{hint}")
        if self.num_steps < 0:
            raise UserError(f"threat.num_steps is {self.num_steps}; it must be 0 or more.")
        for name, choice, known in (
            ("init", self.init, INITS),
            ("bn", self.bn, BN_MODES),
            ("space", self.space, SPACES),
            ("norm", self.norm, NORMS),
        ):
            if choice not in known:
                raise UserError(f"threat.{name} is '{choice}'. {did_you_mean(choice, known)}")
        if self.norm == "l2" and self.space != "pixel":
            raise UserError(f"threat.space '{self.space}' is defined for threat.norm 'linf' only.")


def pgd(
    model: nn.Module,
    x: Tensor,
    inner: Inner,
    threat: ThreatSpec,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): x <- clamp(project_eps(x + step * direction), 0, 1).

    The direction is sign(grad) in l_inf and grad / ||grad||_2 in l_2.

    Args:
        model: maps [0, 1] images to logits [B, K]. Its parameters are frozen meanwhile; modes are restored.
        x: natural images [B, C, H, W] in [0, 1], float32 or float64.
        inner: adversarial logits [B, K] -> what the attack maximises [B].
        threat: radius, step, number of steps, start, BatchNorm mode, space.
        start: where to begin, shaped like `x`, instead of `threat.init`.
        generator: of the random start, on the device of `x`.

    Returns:
        x_adv, shaped like `x`, without gradient: finite, in [0, 1] and within eps of `x` (asserted in float32).

    Raises:
        FloatingPointError: the attack's loss or gradient is not finite (sign(NaN) is 0 and would silently stop it).
    """
    with attack_mode(model, threat.bn), frozen(model):
        space_model, encode, decode = in_space(model, threat.space)
        x = encode(x.detach())
        start = start if start is not None else initial_point(x, threat, generator)
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
    """What a search found, nothing of it read by the host yet.

    Attributes:
        x_adv: shaped like the images, without gradient.
        finite: bool scalar: every loss and gradient on the way was.
        inside: bool scalar: `x_adv` is finite, in [0, 1] and within eps of the images. Only a bug can make it false
            where `finite` holds.
    """

    x_adv: Tensor
    finite: Tensor
    inside: Tensor


def search(
    model: Model, x: Tensor, inner: Inner, threat: ThreatSpec, start: Tensor, first_model: Model | None = None
) -> Found:
    """The loop of `pgd` from `start`, without a word to the host: on a GPU nothing waits.

    Args:
        model: maps images to logits; whose parameters need no gradient, and whose modes are the attack's already.
        x, inner, threat, start: see `pgd`.
        first_model: computes the first step instead, in higher precision: where start and image are almost equal the
            gradient of a divergence is the difference of two almost equal outputs, in bf16 rounding noise.
    """
    x_adv = start.detach().clone()
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for number in range(threat.num_steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            objective = inner((first_model if first_model is not None and number == 0 else model)(x_adv))
            # The sum has the same gradient sign as the mean and does not underflow in half precision.
            (gradient,) = torch.autograd.grad(objective.sum(), x_adv)
        finite &= gradient.isfinite().all() & objective.isfinite().all()
        x_adv = project(x_adv.detach() + threat.step * _direction(gradient, threat.norm), x, threat.eps, threat.norm)
    if threat.num_steps == 0:
        x_adv = project(x_adv, x, threat.eps, threat.norm)
    inside = inside_ball(x_adv, x, threat.eps, around=threat.space == "pixel", norm=threat.norm)
    return Found(x_adv, finite, inside)


def initial_point(x: Tensor, threat: ThreatSpec, generator: torch.Generator | None = None) -> Tensor:
    """The random start named by `threat.init`, shaped like `x`."""
    if threat.init == "zero":
        return x.clone()
    noise = start_noise(x.shape, threat.init, x, generator)
    return apply_noise(x, noise, threat)


def start_noise(shape: torch.Size, init: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit noise of `shape` for `apply_noise`: N(0, 1), or U(-1, 1) for `uniform`; zeros for `zero`."""
    if init == "zero":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if init == "uniform":
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def apply_noise(x: Tensor, noise: Tensor, threat: ThreatSpec) -> Tensor:
    """The start that `threat.init` makes of unit `noise` (shaped like `x`)."""
    if threat.init == "zero":
        return x.clone()
    if threat.init == "uniform":
        return (x + threat.eps * (noise if threat.norm == "linf" else noise / _lengths(noise))).clamp(0, 1)
    if threat.init == "normal":
        return x + 0.001 * noise  # not clamped, as in TRADES: the first projection does it
    return project(x + noise, x, threat.eps, threat.norm)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Onto the ball of radius `eps` around `x`, then onto [0, 1], which brings it no farther from `x`."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / _lengths(delta)).clamp(max=1)).clamp(0, 1)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    # Scaled by its largest entry first: the square of a small gradient underflows.
    largest = gradient.abs().amax((-3, -2, -1), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient / largest / _lengths(gradient / largest)


def _lengths(delta: Tensor) -> Tensor:
    """The l_2 norm of each image [B, 1, 1, 1], or of one image [C, H, W]; tiny instead of 0, so that it can divide."""
    return torch.linalg.vector_norm(delta, dim=(-3, -2, -1), keepdim=True).clamp(min=torch.finfo(delta.dtype).tiny)


def inside_ball(x_adv: Tensor, x: Tensor, eps: float, *, around: bool, norm: str = "linf") -> Tensor:
    """Whether `x_adv` is finite, in [0, 1] and (`around`) within `eps` of `x`, in at least float32: bool scalar."""
    x_adv, x = (t if t.dtype == torch.float64 else t.float() for t in (x_adv, x))
    inside = ((x_adv >= 0) & (x_adv <= 1)).all()  # false for NaN
    if not around:
        return inside
    if norm == "linf":
        return inside & ((x_adv - x).abs() <= eps + _BALL_TOLERANCE).all()
    # Each coordinate of the difference is rounded once; the worst case adds up like the lengths of orthogonal sides.
    slack = eps * 2.0**-20 + _BALL_TOLERANCE * math.sqrt(x[0].numel())
    return inside & (_lengths(x_adv - x) <= eps + slack).all()


def in_space(
    model: nn.Module, space: str, forward: Model | None = None
) -> tuple[Model, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The model, and the maps from pixels and back, of a threat space.

    `pixel`: everything as it is. `released_code`: coordinates are (x - mean) / std with the constants of the model, and
    the model undoes that before it normalises by itself; eps and the clamp to [0, 1] then act as in that code.

    Args:
        forward: called instead of `model`, for instance under autocast.
    """
    forward = forward if forward is not None else model
    if space == "pixel":
        return forward, lambda x: x, lambda x: x
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        raise UserError(
            "threat.space 'released_code' needs a model with `mean` and `std` buffers (all of ours have them)."
        )
    return (
        lambda z: forward(z * std.to(z.dtype) + mean.to(z.dtype)),
        lambda x: (x - mean.to(x.dtype)) / std.to(x.dtype),
        lambda z: z * std.to(z.dtype) + mean.to(z.dtype),
    )
