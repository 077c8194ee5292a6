"""Robustness curves (`--curve`): accuracy against eps and against the steps of the attack, on one choice of images.

Each point is an attack with a threat of its own, measured and stored like any other attack, under `curves` of its checkpoint.
"""

from dataclasses import dataclass, replace

from nrat_scale.attacks import ThreatSpec, fraction_text, parse_fraction
from nrat_scale.core.errors import UserError, quoted
from nrat_scale.evaluate.attacks import Attack, parse_attack

AXES = ("eps", "steps")
EPS_ATTACK = "pgd20"  # of the curve against eps
CURVE_IMAGES = 1000  # at most, without --images


@dataclass(frozen=True)
class Curve:
    """One `--curve`: its axis, from AXES, and its values in ascending order."""

    axis: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    name: str  # its key in results.json, such as `eps=8/255` or `steps=20`
    attack: Attack
    threat: ThreatSpec


def parse_curve(text: str) -> Curve:
    """The curve in `eps=0,2/255,8/255` or `steps=1,10,50`; raises `UserError`."""
    axis, _, values = text.partition("=")
    if axis not in AXES:
        raise UserError(f"--curve {quoted(text)} has no known axis. Write eps=0,2/255,8/255 or steps=1,10,50.")
    try:
        found = [parse_fraction(value) for value in values.split(",")]
    except ValueError as error:
        raise UserError(f"--curve {quoted(text)}: {error}") from None
    if axis == "steps" and not all(value == int(value) and 0 <= value < 10**6 for value in found):
        raise UserError(f"--curve {quoted(text)}: numbers of steps are whole numbers from 0 on, such as steps=1,10,50.")
    if min(found) < 0:
        raise UserError(f"--curve {quoted(text)}: a radius is not negative.")
    return Curve(axis, tuple(sorted(set(found))))


def curve_points(curve: Curve, threat: ThreatSpec) -> list[Point]:
    """The points of a curve around `threat`.

    Against eps, PGD-20 takes steps in the ratio of `threat` to each radius (a quarter if its own radius is 0). Against steps,
    PGD has the radius and the step length of `threat`. No radius and no step are natural images.

    Raises:
        UserError: a radius is out of range.
    """
    ratio = threat.step / threat.eps if threat.eps else 0.25
    points = []
    for value in curve.values:
        if curve.axis == "eps":
            name = f"eps={radius_text(value)}"
            attack, around = EPS_ATTACK, replace(threat, eps=value, step=ratio * value)
        else:
            name, attack, around = f"steps={value:.0f}", f"pgd{value:.0f}", threat
        points.append(Point(name, parse_attack(attack if value else "natural"), around))
    return points


def radius_text(eps: float) -> str:
    """A radius as it is usually written: `0`, `0.2`, `8/255`."""
    return f"{eps:g}" if len(repr(eps)) <= len("0.125") else fraction_text(eps)
