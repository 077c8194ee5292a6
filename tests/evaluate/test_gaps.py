"""Gaps between attacks are flagged beyond three paired standard errors and a floor; the usual gaps are not."""

import numpy as np
import pytest

from nrat_scale.evaluate.gaps import attack_gaps
from nrat_scale.evaluate.results import Outcome
from nrat_scale.evaluate.sanity import contradictions


def outcome(n: int, right: int) -> Outcome:
    return np.arange(n), np.arange(n) < right


def outcomes(n: int, **percent: float) -> dict[str, Outcome]:
    """Accuracies in percent by attack, each image robust to the weaker ones if to the stronger; `_` stands for - and :."""
    names = {"aa_square": "aa:square", "transfer_pgd20": "transfer-pgd20", "aa_apgd": "aa-apgd"}
    return {names.get(name, name): outcome(n, round(n * value / 100)) for name, value in percent.items()}


@pytest.mark.parametrize(
    ("n", "percent", "words"),
    [
        (10_000, {"natural": 82.66, "pgd20": 57.0, "cw20": 55.9, "aa": 46.3}, ["46.3 % under AutoAttack and 57.0 %"]),
        (1_000, {"pgd20": 57.0, "aa": 50.0}, ["7.0 points apart with a standard error of 0.8; 2 to 4 are normal"]),
        (1_000, {"pgd20": 57.0, "aa_apgd": 50.0}, ["adapted"]),
        (1_000, {"pgd20": 57.0, "cw20": 51.5}, ["bounded losses"]),
        (1_000, {"pgd20": 57.0, "aa_square": 50.0}, ["without gradients"]),
        (1_000, {"cw20": 57.0, "transfer_pgd20": 50.0}, ["another model"]),
        (10_000, {"pgd20": 57.0, "cw20": 46.0, "aa": 45.0}, ["45.0 % under AutoAttack", "bounded losses"]),
        (20, {"pgd20": 90.0, "aa": 20.0}, ["n 20"]),
    ],
)
def test_large_gaps_are_flagged(n: int, percent: dict[str, float], words: list[str]) -> None:
    """NRAT's published row, PGD over CW, Square and transferred attacks under PGD: one flag each, with what to do."""
    flags = contradictions(outcomes(n, **percent))
    assert len(flags) == len(words)
    for flag, word in zip(flags, words, strict=True):
        assert word.replace("n 20", "On the same 20 images") in flag


@pytest.mark.parametrize(
    ("n", "percent"),
    [
        (10_000, {"natural": 84.9, "pgd20": 56.6, "cw20": 54.2, "aa": 53.1}),  # TRADES
        (10_000, {"pgd20": 57.0, "cw20": 53.0, "aa": 51.1}),
        (10_000, {"pgd20": 57.0, "cw20": 57.0, "aa_square": 60.0, "transfer_pgd20": 75.0}),
        (10_000, {"pgd20": 57.0, "aa_square": 53.0}),
        (10_000, {"pgd2": 70.0, "aa": 50.0}),  # two steps have not converged
        (100, {"pgd20": 57.0, "aa": 50.0}),  # seven images
        (20, {"pgd20": 50.0, "cw20": 40.0, "aa": 20.0}),
        (1, {"pgd20": 100.0, "cw20": 100.0, "aa": 100.0}),
    ],
)
def test_usual_gaps_are_not_flagged(n: int, percent: dict[str, float]) -> None:
    """Gaps of sound models, and gaps of few images."""
    assert attack_gaps(outcomes(n, **percent)) == []


def test_the_strongest_entry_represents_its_kind() -> None:
    """AutoAttack is compared with PGD-100, not with the PGD-20 beside it, and only on common images."""
    assert attack_gaps(outcomes(1_000, pgd20=60.0, pgd100=54.0, aa=50.0)) == []
    other = np.arange(1_000, 2_000), np.arange(1_000) < 100
    assert attack_gaps(outcomes(1_000, pgd20=60.0) | {"aa": other}) == []


def test_the_error_is_paired() -> None:
    """The same accuracies, but on images that hardly overlap: the gap is within three standard errors."""
    n = 200
    pgd, aa = np.arange(n) < 110, np.arange(n) >= 110  # 55 % and 45 %, opposite images
    assert attack_gaps({"pgd20": (np.arange(n), pgd), "aa": (np.arange(n), aa)}) == []
    assert len(attack_gaps({"pgd20": (np.arange(n), pgd), "aa": outcome(n, 90)})) == 1
