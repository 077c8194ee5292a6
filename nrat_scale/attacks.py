"""The threat model, the PGD loop of training, validation and evaluation, and the notation of a radius, such as 8/255.

Pixels are in [0, 1]; the model normalises them. `threat.space: released_code` reproduces the paper's released code, which
applies eps and the clamp to [0, 1] in *normalised* units. It exists for comparison and is never a default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.core.modes import BN_MODES, attack_mode, frozen

Map = Callable[[Tensor], Tensor]

NORMS = {"linf": "l_inf", "l2": "l_2"}  # name in recipes -> in text
AUTOATTACK_NORMS = {"linf": "Linf", "l2": "L2"}  # as AutoAttack and RobustBench write them
INITS = ("zero", "normal", "uniform", "normal01")
SPACES = ("pixel", "released_code")
RELEASED_CODE_WARNING = (  # of reports, model cards and results
    "threat.space is 'released_code': eps and the clamp to [0, 1] apply to normalised pixels, which is a different threat "
    "model. These numbers are not comparable with RobustBench."
)
_BALL_TOLERANCE = 2.0**-23  # float32 rounding of x + eps and of x_adv - x; pixels are at most 1


@dataclass(frozen=True)
class ThreatSpec:
    """A perturbation set (l_inf or l_2 ball) and the PGD attack that searches it.

    Attributes:
        eps: radius as a fraction of the pixel range (recipes may write `8/255`); in l_2 the norm of the whole perturbation.
        step: step length in the same unit and norm.
        num_steps: gradient steps.
        init: `zero`; `normal` = x + 0.001 N(0, 1); `uniform` = x + U(-eps, eps), clamped (in l_2: scaled to length eps);
            `normal01` = x + N(0, 1), projected.
        bn: BatchNorm during the attack: `eval`, or `batch` (batch statistics; running statistics unchanged).
        space: `pixel`, or `released_code` (l_inf only).
        norm: `linf` or `l2`.

    Raises:
        UserError: a value is out of range or in the wrong unit.
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
            if not 0.0 <= value < (math.inf if self.norm == "l2" else 1.0):
                hint = f" Write {value:g}/255 if you mean {value:g} grey levels." if value >= 1.0 else ""
                raise UserError(f"threat.{name} is {value:g}; it is a fraction of the pixel range, in [0, 1).{hint}")
        check_value("threat.num_steps", self.num_steps, self.num_steps >= 0, "0 or more")
        check_choice("threat.init", self.init, INITS)
        check_choice("threat.bn", self.bn, BN_MODES)
        check_choice("threat.space", self.space, SPACES)
        check_choice("threat.norm", self.norm, NORMS)
        if self.norm == "l2" and self.space != "pixel":
            raise UserError(f"threat.space '{self.space}' is defined for threat.norm 'linf' only.")


def short_reach(threat: ThreatSpec, num_steps: int) -> str | None:
    """`10 steps of 2/255 reach 0.0784 of eps = 0.5` if they cannot lead from an image to the surface of its ball, else None.

    A random start does not help: from there the far side of the ball is up to 2 eps away.
    """
    reach = num_steps * threat.step
    if reach >= threat.eps * (1 - 1e-6):  # eps / 4 four times may round below eps
        return None
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    step, eps = (fraction_text(value) for value in (threat.step, threat.eps))
    return f"{steps} of {step} reach{'es' if num_steps == 1 else ''} {reach:.3g} of eps = {eps}"


def pgd(
    model: nn.Module,
    x: Tensor,
    inner: Map,
    threat: ThreatSpec,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): x <- clamp(project_eps(x + step * direction), 0, 1).

    The direction is sign(grad) in l_inf and grad / ||grad||_2 in l_2.

    Args:
        model: maps [0, 1] images to logits [B, K]. Its parameters are frozen during the attack; modes are restored.
        x: natural images [B, C, H, W] in [0, 1], float32 or float64.
        inner: maps adversarial logits [B, K] to the loss [B] that the attack maximises.
        threat: radius, step, number of steps, start, BatchNorm mode, space.
        start: starting point, shaped like `x`, instead of `threat.init`.
        generator: for the random start, on the device of `x`.

    Returns:
        x_adv, shaped like `x`, detached: finite, in [0, 1] and within eps of `x` (asserted in float32).

    Raises:
        FloatingPointError: the attack's loss or gradient is not finite (sign(NaN) is 0 and would silently stop it).
    """
    with attack_mode(model, threat.bn), frozen(model):
        space_model, encode, decode = in_space(model, threat.space)
        x = encode(x.detach())
        if start is None:
            start = apply_noise(x, start_noise(x.shape, threat.init, x, generator), threat)
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
    x_adv = start.detach().clone()
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for number in range(threat.num_steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            attacked = first_model if first_model is not None and number == 0 else model
            objective = inner(attacked(x_adv))
            # Sum, not mean: the direction is the same and does not underflow in half precision.
            (gradient,) = torch.autograd.grad(objective.sum(), x_adv)
        finite &= gradient.isfinite().all() & objective.isfinite().all()
        x_adv = project(x_adv.detach() + threat.step * _direction(gradient, threat.norm), x, threat.eps, threat.norm)
    if threat.num_steps == 0:
        x_adv = project(x_adv, x, threat.eps, threat.norm)
    inside = inside_ball(x_adv, x, threat.eps, around=threat.space == "pixel", norm=threat.norm)
    return Found(x_adv, finite, inside)


def start_noise(shape: torch.Size, init: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit noise of `shape` for `apply_noise`: N(0, 1), or U(-1, 1) for `uniform`; zeros for `zero`."""
    if init == "zero":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if init == "uniform":
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def apply_noise(x: Tensor, noise: Tensor, threat: ThreatSpec) -> Tensor:
    """The starting point that `threat.init` makes from unit `noise` (shaped like `x`)."""
    if threat.init == "zero":
        return x.clone()
    if threat.init == "uniform":
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


def parse_fraction(text: str) -> float:
    """The value of a fraction or decimal such as `8/255` or `0.03`; raises `ValueError` if it is not a finite number."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"'{text}' is not a number; write 8/255 or 0.03.")
    return value


def fraction_text(value: float) -> str:
    """`8/255` if `value` is exactly that and no short decimal, else its shortest one; `parse_fraction` reads it back."""
    levels, decimal = round(value * 255), repr(float(value))
    return f"{levels}/255" if levels % 255 and levels / 255 == value and len(decimal) > len("0.1234") else decimal


def threat_text(norm: str, eps: float, space: str = "pixel") -> str:
    """A threat model in text, everywhere: `l_inf, eps = 8/255`, `l_2, eps = 0.5`; a norm of another version as it is."""
    short = norm == "l2" and len(repr(eps)) <= len("0.125")  # radii in l_2 are usually no grey levels
    return f"{NORMS.get(norm, norm)}, eps = {eps if short else fraction_text(eps)}" + (
        "" if space == "pixel" else f" in {space} space"
    )
