"""The threat model, the PGD loop of training, validation and evaluation, and the notation of a radius, such as 8/255.

Pixels are in [0, 1]; the model normalises them. `threat.space: released_code` reproduces the paper's released code, which
applies eps and the clamp to [0, 1] in *normalised* units. It exists for comparison and is never a default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.core.modes import BN_MODES, attack_mode, frozen

Map = Callable[[Tensor], Tensor]

NORMS = {"linf": "l_inf", "l2": "l_2"}  # name in recipes -> in text
AUTOATTACK_NORMS = {"linf": "Linf", "l2": "L2"}  # as AutoAttack and RobustBench write them
INITS = ("zero", "normal", "uniform", "normal01", "class")
ATTACKS = ("pgd", "n_fgsm")  # of training
SPACES = ("pixel", "released_code")
RELEASED_CODE_WARNING = (  # of reports, model cards and results
    "threat.space is 'released_code': eps and the clamp to [0, 1] apply to normalised pixels, which is a different threat "
    "model. These numbers are not comparable with RobustBench."
)
_BALL_TOLERANCE = 2.0**-23  # float32 rounding of x + eps and of x_adv - x; pixels are at most 1


@dataclass(frozen=True)
class PhaseSpec:
    """A phase of `threat.schedule`; what it leaves out is as in `threat`."""

    until: float  # the fraction of training at which the phase ends, in (0, 1)
    num_steps: int | None = None  # gradient steps of the phase
    step: float | None = None  # step length of the phase
    eps: float | None = None  # radius of the phase

    def __post_init__(self) -> None:
        way_out = "in (0, 1): the last phase is threat itself and lasts to the end"
        check_value("threat.schedule: until", self.until, 0.0 < self.until < 1.0, way_out)


@dataclass(frozen=True)
class ThreatSpec:
    """A perturbation set (l_inf or l_2 ball) and the attack of training that searches it.

    Attributes:
        eps: radius as a fraction of the pixel range (recipes may write `8/255`); in l_2 the norm of the whole perturbation.
        step: step length in the same unit and norm.
        num_steps: gradient steps.
        init: `zero`; `normal` = x + 0.001 N(0, 1); `uniform` = x + U(-eps, eps), clamped (in l_2: scaled to length eps);
            `normal01` = x + N(0, 1), projected; `class` = x + a perturbation of the label's class, in training only.
        bn: BatchNorm during the attack: `eval`, or `batch` (batch statistics; running statistics unchanged).
        space: `pixel`, or `released_code` (l_inf only).
        norm: `linf` or `l2`.
        attack: of training: `pgd`, or `n_fgsm` (de Jorge et al. 2022, l_inf only): x + U(-noise eps, noise eps), then one step
            that is not projected onto the ball; `init` is not used. Evaluation has its own attacks.
        noise: half the width of N-FGSM's noise in units of eps, k in the paper.
        schedule: phases of training before the one that the other keys describe, for instance
            `[{until: 0.3, num_steps: 1, step: 8/255}]`; each ends at the fraction `until` of training and changes `num_steps`,
            `step` or `eps`. Validation and evaluation use `eps` of `threat` throughout.

    Raises:
        UserError: a value is out of range or in the wrong unit, or a phase cannot reach its radius.
    """

    eps: float
    step: float
    num_steps: int
    init: str = "uniform"
    bn: str = "eval"
    space: str = "pixel"
    norm: str = "linf"
    attack: str = "pgd"
    noise: float = 2.0
    schedule: list[PhaseSpec] = field(default_factory=list)

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
        check_choice("threat.attack", self.attack, ATTACKS)
        self._check_attack()
        self._check_schedule()

    def _check_attack(self) -> None:
        """What N-FGSM and starts per class need."""
        if self.norm != "linf" and (self.attack == "n_fgsm" or self.init == "class"):
            key = "threat.attack 'n_fgsm'" if self.attack == "n_fgsm" else "threat.init 'class'"
            raise UserError(f"{key} is defined for threat.norm 'linf' only, and the norm is '{self.norm}'.")
        if self.init == "class" and self.num_steps == 0:
            raise UserError("threat.init 'class' needs a step, whose gradient moves the starts: threat.num_steps is 0.")
        if self.attack == "pgd":
            if self.noise != ThreatSpec.noise:
                unused = f"threat.noise is {self.noise:g}, but it is N-FGSM's and threat.attack is 'pgd'"
                raise UserError(f"{unused}. Remove it, or use threat.attack=n_fgsm.")
            return
        check_value("threat.noise", self.noise, 0 <= self.noise < math.inf, "finite and 0 or more")
        if self.init == "class":
            raise UserError("threat.attack 'n_fgsm' starts from noise: threat.init 'class' needs threat.attack=pgd.")
        if self.space != "pixel":
            raise UserError(f"threat.attack 'n_fgsm' is defined in pixels only, and threat.space is '{self.space}'.")
        if self.num_steps != 1:
            what = f"threat.attack is 'n_fgsm', which takes one step, and threat.num_steps is {self.num_steps}"
            raise UserError(f"{what}. Use threat.num_steps=1 threat.step={fraction_text(self.eps)}.")

    def _check_schedule(self) -> None:
        """Phases follow each other, and the attack of each reaches the surface of its ball."""
        before = 0.0
        for number, ((_, attack), phase) in enumerate(zip(self.phases, self.schedule, strict=False), start=1):
            where = f"Phase {number} of threat.schedule (until {phase.until:g})"
            if phase.until <= before:
                raise UserError(f"{where} does not end after the phase before it, until {before:g}. Sort them.")
            before = phase.until
            if (problem := short_reach(attack, attack.num_steps)) is not None:
                way_out = f"a longer step, for instance step: {fraction_text(attack.eps / max(attack.num_steps, 1))}"
                raise UserError(f"{where} is too weak for its radius: {problem}. Give it more num_steps or {way_out}.")

    @property
    def phases(self) -> tuple[tuple[float, "ThreatSpec"], ...]:
        """The phases of training: the fraction of training at which each ends, and its threat, which has no schedule."""
        final = replace(self, schedule=[]) if self.schedule else self
        found = []
        for number, phase in enumerate(self.schedule, start=1):
            given = {name: getattr(phase, name) for name in ("num_steps", "step", "eps")}
            try:
                attack = replace(final, **{name: value for name, value in given.items() if value is not None})
            except UserError as error:
                raise UserError(f"Phase {number} of threat.schedule (until {phase.until:g}): {error}") from error
            found.append((phase.until, attack))
        return (*found, (1.0, final))

    def phase(self, progress: float) -> int:
        """The number of the phase, from 0, of the step before which the fraction `progress` of training is done."""
        return sum(progress >= phase.until for phase in self.schedule)

    def at(self, progress: float) -> "ThreatSpec":
        """The threat of that step, without a schedule."""
        return self.phases[self.phase(progress)][1] if self.schedule else self

    @property
    def start(self) -> str:
        """The `init` whose unit noise `apply_noise` takes."""
        return "uniform" if self.attack == "n_fgsm" else self.init

    @property
    def key(self) -> tuple[float, ...]:
        """The numbers of the loop, which a CUDA graph freezes; a phase of a schedule changes them."""
        return self.num_steps, self.step, self.eps

    @property
    def farthest(self) -> float:
        """How far from x the attack may end: `eps`, for N-FGSM its noise and its step."""
        # Each of its two sums rounds in float32.
        return self.noise * self.eps + self.step + 2.0**-22 if self.attack == "n_fgsm" else self.eps


def evaluation_threat(trained: ThreatSpec) -> ThreatSpec:
    """The threat that a model trained for `trained` is evaluated at: its radius, norm and space, searched by PGD.

    The step is that of training unless it is longer than eps / 2, as that of an attack with few steps; PGD with many steps
    would then jump from side to side of the ball, so it is eps / 4.
    """
    step = trained.eps / 4 if 0 < trained.eps / 2 < trained.step else trained.step
    init = "uniform" if trained.init == "class" else trained.init
    return replace(trained, step=step, init=init, attack="pgd", noise=ThreatSpec.noise, schedule=[])


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
    assert found.inside, f"the perturbation exceeds {threat.farthest} or leaves [0, 1]"
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

    Raises `UserError` for `class`, whose perturbations are part of the state of training.
    """
    if init == "class":
        raise UserError(
            "threat.init 'class' is for training, which keeps the perturbations. Give a start, or another init."
        )
    if init == "zero":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if init == "uniform":
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def apply_noise(x: Tensor, noise: Tensor, threat: ThreatSpec) -> Tensor:
    """The starting point that `threat` makes from unit `noise` (shaped like `x`): for `class` perturbations in [-1, 1]."""
    if threat.attack == "n_fgsm":
        return (x + threat.noise * threat.eps * noise).clamp(0, 1)
    if threat.init == "zero":
        return x.clone()
    if threat.init in ("uniform", "class"):
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


def attack_text(threat: ThreatSpec) -> str:
    """The attack of training in text: `10 steps of 2/255`, `N-FGSM: ...`, with the phases of a schedule before it."""
    radius, parts = threat.eps, []
    for until, attack in threat.phases:
        text = _one_attack_text(attack)
        if attack.eps != radius:
            text, radius = f"{text} at eps = {fraction_text(attack.eps)}", attack.eps
        parts.append(text if until == 1.0 else f"{text} until {100 * until:g} % of training")
    start = " from a start per class" if threat.init == "class" else ""
    return ", then ".join(parts) + start


def _one_attack_text(attack: ThreatSpec) -> str:
    steps = "1 step" if attack.num_steps == 1 else f"{attack.num_steps} steps"
    text = f"{steps} of {fraction_text(attack.step)}"
    return f"N-FGSM, {text} after noise within {attack.noise:g} eps" if attack.attack == "n_fgsm" else text
