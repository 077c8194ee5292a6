"""The threat model: the perturbation set, the attack of training and its phases, and the notation of a radius, such as 8/255.

Pixels are in [0, 1]; the model normalises them. `threat.space: released_code` reproduces the paper's released code, which
applies eps and the clamp to [0, 1] in *normalised* units. It exists for comparison and is never a default.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean, quoted
from nrat_scale.core.modes import BN_MODES

NORMS = {"linf": "l_inf", "l2": "l_2"}  # name in recipes -> in text
AUTOATTACK_NORMS = {"linf": "Linf", "l2": "L2"}  # as AutoAttack and RobustBench write them
INITS = ("zero", "normal", "uniform", "normal01")  # of `start_noise`; in training also `per_class`
ATTACKS = ("pgd", "n_fgsm")  # of training
TRAINING_ONLY: dict[str, Any] = {"attack": "pgd", "noise": 2.0, "schedule": []}  # keys that evaluation does not use
SPACES = ("pixel", "released_code")
RELEASED_CODE_WARNING = (  # of reports, model cards and results
    "threat.space is 'released_code': eps and the clamp to [0, 1] apply to normalised pixels, which is a different threat "
    "model. These numbers are not comparable with RobustBench."
)


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
            `normal01` = x + N(0, 1), projected; `per_class` = x + a perturbation of the label's class, in training only.
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
        check_choice("threat.init", self.init, (*INITS, "per_class"))
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
        if self.norm != "linf" and (self.attack == "n_fgsm" or self.init == "per_class"):
            key = "threat.attack 'n_fgsm'" if self.attack == "n_fgsm" else "threat.init 'per_class'"
            raise UserError(f"{key} is defined for threat.norm 'linf' only, and the norm is '{self.norm}'.")
        if self.init == "per_class" and self.num_steps == 0:
            raise UserError(
                "threat.init 'per_class' needs a step, whose gradient moves the starts: threat.num_steps is 0."
            )
        if self.attack == "pgd":
            if self.noise != ThreatSpec.noise:
                unused = f"threat.noise is {self.noise:g}, but it is N-FGSM's and threat.attack is 'pgd'"
                raise UserError(f"{unused}. Remove it, or use threat.attack=n_fgsm.")
            return
        check_value("threat.noise", self.noise, 0 <= self.noise < math.inf, "finite and 0 or more")
        if self.init == "per_class":
            raise UserError(
                "threat.attack 'n_fgsm' starts from noise: threat.init 'per_class' needs threat.attack=pgd."
            )
        if self.space != "pixel":
            raise UserError(f"threat.attack 'n_fgsm' is defined in pixels only, and threat.space is '{self.space}'.")
        if self.num_steps != 1:
            what = f"threat.attack is 'n_fgsm', which takes one step, and threat.num_steps is {self.num_steps}"
            raise UserError(f"{what}. Use threat.num_steps=1 threat.step={fraction_text(self.eps)}.")

    def check_recipe(self, *, cutmix: float, objective: str, family: str) -> None:
        """Raise `UserError` if the rest of a recipe contradicts a start per class: it needs one label, and an attack."""
        if self.init != "per_class":
            return
        what, way_out = "threat.init is 'per_class', a perturbation of the label's class", "use threat.init=uniform"
        if cutmix:
            raise UserError(f"{what}, but data.augment.cutmix mixes labels. Set it to 0, or {way_out}.")
        if family == "natural":
            raise UserError(f"{what}, but objective '{objective}' makes no attack: {way_out}.")

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
    init = "uniform" if trained.init == "per_class" else trained.init
    return replace(trained, step=step, init=init, **TRAINING_ONLY)


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


def read_phases(value: Any) -> list[dict[str, Any]]:
    """The phases of a recipe's `threat.schedule` as fields of `PhaseSpec`, with numbers for `8/255`.

    Raises:
        UserError: it is no list of phases, or a phase has an unknown key, no end, or something else than a number.
    """
    example = "[{until: 0.3, num_steps: 1, step: 8/255}]"
    phases = [] if value is None else value
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise UserError(f"threat.schedule is {quoted(value)}; it must be a list of phases, such as {example}.")
    for number, phase in enumerate(phases, start=1):
        where = f"threat.schedule.{number}"
        if phase.get("until") is None:
            hint = " YAML needs a space after each colon." if any(":" in str(key) for key in phase) else ""
            raise UserError(f"{where} is {quoted(phase)}; it needs `until`, as in {example}.{hint}")
        for key in phase:
            if key not in PhaseSpec.__dataclass_fields__:
                known = did_you_mean(str(key), PhaseSpec.__dataclass_fields__)
                raise UserError(f"unknown key {quoted(f'{where}.{key}')}. {known}")
    return [
        {key: _as_number(given, f"threat.schedule.{number}.{key}", int if key == "num_steps" else float)
         for key, given in phase.items()}
        for number, phase in enumerate(phases, start=1)
    ]  # fmt: skip


def _as_number(value: Any, key: str, kind: type) -> Any:
    """The number of a phase, also from `8/255`; None stays."""
    try:
        number = parse_fraction(value) if isinstance(value, str) and kind is float else value
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    fits = isinstance(number, int if kind is int else (int, float)) and not isinstance(number, bool)
    check_value(key, value, number is None or fits, "a whole number" if kind is int else "a number")
    return number


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
    start = " from a start per class" if threat.init == "per_class" else ""
    return ", then ".join(parts) + start


def _one_attack_text(attack: ThreatSpec) -> str:
    steps = "1 step" if attack.num_steps == 1 else f"{attack.num_steps} steps"
    text = f"{steps} of {fraction_text(attack.step)}"
    return f"N-FGSM, {text} after noise within {attack.noise:g} eps" if attack.attack == "n_fgsm" else text
