"""The threat model and the one projected-gradient loop that training, validation and evaluation share.

Pixels are in [0, 1] and normalisation is inside the model. `threat.space: released_code` repeats what the paper's
released code does instead (eps and the clamp to [0, 1] in *normalised* units) for comparison; it is never a default.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrat_scale.errors import UserError, did_you_mean
from nrat_scale.modes import BN_MODES, attack_mode, frozen

Model = Callable[[Tensor], Tensor]
Inner = Callable[[Tensor], Tensor]

INITS = ("zero", "normal", "uniform", "normal01")
SPACES = ("pixel", "released_code")
# One float32 rounding of x + eps and of the subtraction that checks it: pixels are at most 1.
_BALL_TOLERANCE = 2.0**-23


@dataclass(frozen=True)
class ThreatSpec:
    """An l_inf threat and how it is searched.

    Attributes:
        eps: radius as a fraction of the pixel range (recipes may write `8/255`).
        step: step length in the same unit.
        num_steps: gradient steps.
        init: `zero`; `normal` = x + 0.001 N(0, 1); `uniform` = x + U(-eps, eps), clamped; `normal01` = x + N(0, 1),
            projected.
        bn: BatchNorm while attacking: `eval`, or `batch` (batch statistics, running ones untouched).
        space: `pixel`, or `released_code`.

    Raises:
        UserError: a value out of range or of the wrong unit.
    """

    eps: float
    step: float
    num_steps: int
    init: str = "uniform"
    bn: str = "eval"
    space: str = "pixel"

    def __post_init__(self) -> None:
        for name, value in (("eps", self.eps), ("step", self.step)):
            if not 0.0 <= value < 1.0:
                hint = f" Write {value:g}/255 if you mean {value:g} grey levels." if value >= 1.0 else ""
                raise UserError(f"threat.{name} is {value:g}; it is a fraction of the pixel range, in [0, 1).{hint}")
        if self.num_steps < 0:
            raise UserError(f"threat.num_steps is {self.num_steps}; it must be 0 or more.")
        for name, choice, known in (
            ("init", self.init, INITS),
            ("bn", self.bn, BN_MODES),
            ("space", self.space, SPACES),
        ):
            if choice not in known:
                raise UserError(f"threat.{name} is '{choice}'. {did_you_mean(choice, known)}")


def pgd(
    model: nn.Module,
    x: Tensor,
    inner: Inner,
    threat: ThreatSpec,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): x <- clamp(project_eps(x + step * sign(grad)), 0, 1).

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
        return decode(_search(space_model, encode(x.detach()), inner, threat, start, generator))


def _search(
    model: Model, x: Tensor, inner: Inner, threat: ThreatSpec, start: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    x_adv = start.detach().clone() if start is not None else initial_point(x, threat, generator)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for _ in range(threat.num_steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            objective = inner(model(x_adv))
            # The sum has the same gradient sign as the mean and does not underflow in half precision.
            (gradient,) = torch.autograd.grad(objective.sum(), x_adv)
        finite &= gradient.isfinite().all() & objective.isfinite().all()
        x_adv = project(x_adv.detach() + threat.step * gradient.sign(), x, threat.eps)
    if threat.num_steps == 0:
        x_adv = project(x_adv, x, threat.eps)
    if not finite:  # the only synchronisation of the attack
        raise FloatingPointError(
            "The loss or gradient of the attack is not finite: the model's logits overflow or are NaN. "
            "Lower the learning rate, or train in bf16 or fp32 instead of fp16."
        )
    assert_in_ball(x_adv, x, threat.eps, unit_box=threat.space == "pixel")
    return x_adv


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
        return (x + threat.eps * noise).clamp(0, 1)
    if threat.init == "normal":
        return x + 0.001 * noise  # not clamped, as in TRADES: the first projection does it
    return project(x + noise, x, threat.eps)


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Onto the l_inf ball of radius `eps` around `x`, then onto [0, 1]."""
    return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)


def assert_in_ball(x_adv: Tensor, x: Tensor, eps: float, *, unit_box: bool = True) -> None:
    """Only a bug can fail this: `x_adv` is finite, in [0, 1] and within `eps` of `x`, in at least float32."""
    x_adv, x = (t if t.dtype == torch.float64 else t.float() for t in (x_adv, x))
    assert bool(x_adv.isfinite().all()), "adversarial images are not finite"
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all()), "adversarial images leave [0, 1]"
    if unit_box:
        distance = float((x_adv - x).abs().max()) if x.numel() else 0.0
        assert distance <= eps + _BALL_TOLERANCE, f"perturbation {distance} exceeds eps {eps}"


def in_space(model: nn.Module, space: str) -> tuple[Model, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The model, and the maps from pixels and back, of a threat space.

    `pixel`: everything as it is. `released_code`: coordinates are (x - mean) / std with the constants of the model, and
    the model undoes that before it normalises by itself; eps and the clamp to [0, 1] then act as in that code.
    """
    if space == "pixel":
        return model, lambda x: x, lambda x: x
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        raise UserError(
            "threat.space 'released_code' needs a model with `mean` and `std` buffers (all of ours have them)."
        )
    return (
        lambda z: model(z * std.to(z.dtype) + mean.to(z.dtype)),
        lambda x: (x - mean.to(x.dtype)) / std.to(x.dtype),
        lambda z: z * std.to(z.dtype) + mean.to(z.dtype),
    )
