"""Flags for gaps between attacks that are larger than those of sound models.

On a sound model PGD and CW end within a few points of each other, and AutoAttack 2 to 4 points below them: gaps of that
size mean that the attacks differ, not that gradients are masked. A larger gap means that the attack with the higher
accuracy follows gradients that mislead it (Carlini et al. 2019, arXiv:1902.06705, section 3; Croce et al. 2022,
arXiv:2202.13711). NRAT's published row is an example: 57.0 % under PGD, 55.9 % under CW and 46.3 % under AutoAttack.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.attacks import TRANSFER, Attack, attack_title, parse_attack
from nrat_scale.evaluate.results import Outcome
from nrat_scale.evaluate.statistics import paired

_ERRORS = 3.0  # paired standard errors that a gap must exceed, besides its floor
_LEAST_STEPS = 10  # shorter PGD and CW have not converged: their gaps say nothing about the model


@dataclass(frozen=True)
class _Rule:
    """A comparison that is flagged if accuracy under `low` is more than `floor` below that under `high`."""

    low: Callable[[str, Attack], bool]  # (name of the entry, attack) -> whether it belongs to this side
    high: tuple[str, ...]  # kinds of attack; each by its strongest entry, and of several kinds the weaker one
    floor: float
    advice: str


def _is_transfer(name: str, attack: Attack) -> bool:
    return name.startswith(TRANSFER)


def _is_square(name: str, attack: Attack) -> bool:
    return not _is_transfer(name, attack) and attack.components == ("square",)


def _is_autoattack(name: str, attack: Attack) -> bool:
    return not _is_transfer(name, attack) and attack.kind == "aa" and not _is_square(name, attack)


def _is_cw(name: str, attack: Attack) -> bool:
    return not _is_transfer(name, attack) and attack.kind == "cw" and attack.steps >= _LEAST_STEPS


_RULES = (
    _Rule(
        _is_autoattack,
        ("pgd", "cw"),
        0.06,
        "Quote AutoAttack's number only, and confirm it with an attack that is adapted to the model.",
    ),
    _Rule(
        _is_cw,
        ("pgd",),
        0.05,
        "The cross-entropy misleads PGD, as it does on models that were trained with bounded losses such as NCE+RCE. Do not "
        "quote PGD's number; quote AutoAttack's.",
    ),
    _Rule(
        _is_square,
        ("pgd", "cw"),
        0.05,
        "An attack without gradients beats one that follows them, which means that the gradients are masked. Do not quote "
        "the gradient attack's number, and attack with an attack that is adapted to the model.",
    ),
    _Rule(
        _is_transfer,
        ("pgd", "cw"),
        0.05,
        "Images made on another model break more than those made on this one, which means that its gradients are masked. Do "
        "not quote the gradient attack's number, and attack with an attack that is adapted to the model.",
    ),
)


def attack_gaps(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Flags for attacks that leave far less accuracy than PGD or CW on the same images; at most one for each rule.

    Args:
        outcomes: by the attack's entry in results.json; without attacks that skipped images which others had broken.
    """
    attacks = dict[str, Attack]()
    for name in outcomes:
        with suppress(UserError):  # skip attacks that only another version has
            attacks[name] = parse_attack(name.removeprefix(TRANSFER))
    flags = []
    for rule in _RULES:
        gaps = []
        for low in (name for name, attack in attacks.items() if rule.low(name, attack)):
            kinds = [_strongest(kind, low, attacks, outcomes) for kind in rule.high]
            found = [gap for gap in kinds if gap is not None]
            if found:
                gaps.append(min(found, key=lambda gap: -gap.size))
        large = [gap for gap in gaps if gap.size > rule.floor and gap.size > _ERRORS * gap.error]
        if large:
            flags.append(max(large, key=lambda gap: gap.size).text(rule.advice))
    return flags


@dataclass(frozen=True)
class _Gap:
    low: str
    high: str
    n: int  # images that both attacks saw
    accuracy: tuple[float, float]  # under low, under high
    error: float  # paired standard error of the difference

    @property
    def size(self) -> float:
        return self.accuracy[1] - self.accuracy[0]

    def text(self, advice: str) -> str:
        low, high = (100 * accuracy for accuracy in self.accuracy)
        seen = f"{low:.1f} % under {attack_title(self.low)} and {high:.1f} % under {attack_title(self.high)}"
        size = f"{100 * self.size:.1f} points apart with a standard error of {100 * self.error:.1f}; 2 to 4 are normal"
        return f"On the same {self.n} images accuracy is {seen} ({size}). {advice}"


def _strongest(kind: str, low: str, attacks: Mapping[str, Attack], outcomes: Mapping[str, Outcome]) -> _Gap | None:
    """The gap to the strongest attack of a kind on the images that both saw; None without such an attack."""
    gaps = []
    for high, attack in attacks.items():
        if attack.kind == kind and not _is_transfer(high, attack) and attack.steps >= _LEAST_STEPS:
            gap = _gap(low, high, outcomes)
            if gap is not None:
                gaps.append(gap)
    return min(gaps, key=lambda gap: gap.size, default=None)


def _gap(low: str, high: str, outcomes: Mapping[str, Outcome]) -> _Gap | None:
    pair = paired(outcomes[low], outcomes[high])
    if pair.n == 0:
        return None
    # The difference of two outcomes is -1, 0 or 1: its variance over images, divided by n (McNemar 1947).
    size = (pair.other_right - pair.right) / pair.n
    error = math.sqrt(max((pair.only_first_broke + pair.only_second_broke) / pair.n - size**2, 0.0) / pair.n)
    return _Gap(low, high, pair.n, (pair.right / pair.n, pair.other_right / pair.n), error)
