"""How a claim is decided by finished cells: effects, their intervals, the rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.reproduce.contrasts import Estimate
from nrat_scale.reproduce.measured import RELEASED, Measured, Setting, by_setting, strongest_attack
from nrat_scale.reproduce.paper import printed
from nrat_scale.reproduce.table import estimate

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not decided at this size"
FEWEST_SEEDS = 3
TIE = 1.0  # points: an effect below it is none


@dataclass(frozen=True)
class Term:
    """A coefficient times an accuracy in %."""

    coefficient: float
    setting: Setting
    checkpoint: str
    measure: str
    space: str = "pixel"


@dataclass(frozen=True)
class Effect:
    """A sum of terms, in points, that a claim says is above zero; or, for `no_gain`, that it is not."""

    text: str  # such as "NRAT − TRADES, AutoAttack, symmetric 0.4"
    terms: tuple[Term, ...]
    constant: float = 0.0
    no_gain: bool = False
    decides: bool = True  # the claim rests on it; the others are shown

    @property
    def printed(self) -> float | None:
        """The effect in the paper's printed numbers, None if they lack a term."""
        values = [printed(term.setting, term.checkpoint, term.measure) for term in self.terms]
        if any(term.space != "pixel" for term in self.terms) or None in values:
            return None
        pairs = zip(self.terms, values, strict=True)
        return self.constant + sum(term.coefficient * value for term, value in pairs if value is not None)

    def verdict(self, found: Estimate | str) -> str:
        """The rule: see `RULE`."""
        if isinstance(found, str) or len(found.seeds) < FEWEST_SEEDS:
            return UNDECIDED
        if self.no_gain:
            return FAILS if found.low > 0 else HOLDS if found.high < TIE else UNDECIDED
        if found.low > 0:
            return HOLDS
        return FAILS if found.high < 0 or (found.low > -TIE and found.high < TIE) else UNDECIDED


RULE = (
    "An effect is a paired difference on the same test images, averaged over the seeds that both sides have, with a 95 % interval over "
    f"images and trainings. It **{HOLDS}** if the interval lies above zero, however small the effect; otherwise it **{FAILS}** if the "
    f"interval lies below zero or within ±{TIE:g} point (a tie). An effect that the claim denies **{FAILS}** if the interval lies above "
    f"zero; otherwise it **{HOLDS}** if the interval lies below +{TIE:g} point. All other effects, and all with fewer than {FEWEST_SEEDS} "
    f"seeds, are **{UNDECIDED}**. A claim holds if all effects that it rests on hold, and does not hold if one of them does not hold."
)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper."""

    name: str
    says: str  # what the paper says
    effects: tuple[Effect, ...]
    remark: str = ""
    whole_attack: bool = False  # parts of AutoAttack do not decide the effects that it rests on
    grid: str = "noise-benchmark"  # that has its cells

    @property
    def methods(self) -> list[str]:
        """Ids of the methods that its effects compare."""
        return sorted({term.setting.method for effect in self.effects for term in effect.terms})


@dataclass(frozen=True)
class Finding:
    """A claim, decided by the cells of one edition."""

    claim: Claim
    edition: str
    effects: list[tuple[Effect, Estimate | str, str]]  # with its verdict

    @property
    def verdict(self) -> str:
        """By the effects that the claim rests on."""
        verdicts = [verdict for effect, _, verdict in self.effects if effect.decides]
        return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED

    @property
    def decided(self) -> int:
        """The number of effects with a verdict."""
        return sum(verdict != UNDECIDED for *_, verdict in self.effects)


def decide(claim: Claim, cells: Sequence[Measured], edition: str) -> Finding:
    """The claim by the cells of an edition. Where these have parts of AutoAttack only, they stand for it, by their name."""
    groups = {space: by_setting(cells, edition, space) for space in ("pixel", RELEASED)}
    usual = strongest_attack(cell for cell in cells if cell.edition == edition)
    found = []
    for effect in claim.effects:
        attack = _autoattack(effect, groups) or usual
        value = _measured(effect, groups, attack)
        named = replace(effect, text=effect.text.replace("AutoAttack", attack_title(attack)))
        partly = claim.whole_attack and effect.decides and attack != "aa"
        found.append((named, value, UNDECIDED if partly else effect.verdict(value)))
    return Finding(claim, edition, found)


def cells_of(effect: Effect, cells: Sequence[Measured], edition: str) -> list[tuple[Measured, str]]:
    """The cells that an effect is measured by, each with the checkpoint that it uses."""
    return [
        (cell, term.checkpoint)
        for term in effect.terms
        for cell in by_setting(cells, edition, term.space).get(term.setting, ())
    ]


def _autoattack(effect: Effect, groups: Mapping[str, Mapping[Setting, Sequence[Measured]]]) -> str | None:
    """What stands for AutoAttack in an effect: AutoAttack or the parts of it that most seeds have on all sides; None without."""
    seeds: dict[str, list[set[int]]] = {}
    terms = [term for term in effect.terms if term.measure == "aa"]
    for number, term in enumerate(terms):
        for cell in groups[term.space].get(term.setting, ()):
            for checkpoint, attack in cell.outcomes:
                if checkpoint == term.checkpoint and attack.partition(":")[0] == "aa":
                    seeds.setdefault(attack, [set() for _ in terms])[number].add(cell.seed)
    shared = {attack: len(set.intersection(*found)) for attack, found in seeds.items()}
    return max(shared, key=lambda attack: (shared[attack], attack == "aa"), default=None)


def _measured(
    effect: Effect, groups: Mapping[str, Mapping[Setting, Sequence[Measured]]], attack: str
) -> Estimate | str:
    parts = [
        (
            term.coefficient,
            groups[term.space].get(term.setting, ()),
            term.checkpoint,
            attack if term.measure == "aa" else term.measure,
        )
        for term in effect.terms
    ]
    return estimate(parts, effect.constant, across_threats=len({term.space for term in effect.terms}) > 1)
