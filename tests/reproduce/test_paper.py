"""The paper's numbers are in the package, and found under our names."""

import pytest

from nrat_scale.reproduce.measured import Setting
from nrat_scale.reproduce.paper import printed, printed_numbers


def test_all_numbers() -> None:
    """396 accuracies, none of them twice."""
    assert len(printed_numbers()) == 396
    assert printed_numbers()["table1", "pgd_at", "clean", "best", "natural"] == 86.18


@pytest.mark.parametrize(
    ("method", "noise", "rate", "checkpoint", "measure", "percent"),
    [
        ("trades", "none", 0.0, "last", "aa", 54.77),
        ("nrat", "symmetric", 0.4, "best", "aa", 49.00),
        ("nrat", "asymmetric_bidirectional", 0.4, "last", "natural", 71.01),
        ("nrat_awp", "symmetric", 0.4, "last", "cw20", 57.80),
        ("nrat-inner-nce_rce", "symmetric", 0.4, "best", "aa", 52.92),
        ("nrat-inner-ce", "symmetric", 0.4, "best", "aa", None),
        ("nrat_awp", "none", 0.0, "best", "aa", None),
        ("pgd_at_apl", "symmetric", 0.4, "best", "aa", None),
        ("nrat", "cifar10n", 0.4, "best", "aa", None),
        ("nrat", "symmetric", 0.3, "best", "aa", None),
    ],
)
def test_printed(method: str, noise: str, rate: float, checkpoint: str, measure: str, percent: float | None) -> None:
    """Tables 1 to 3 and 5 by our names; what the paper does not print is None, and never another cell's number."""
    assert printed(Setting(method, noise, rate), checkpoint, measure) == percent


def test_tables_of_other_data() -> None:
    """Table 4 is found only if it is asked for."""
    fashion = {"table4_fashion_mnist": {"nrat": "nrat"}}
    assert printed(Setting("nrat", "asymmetric", 0.4), "best", "aa", fashion) == 61.48
    assert printed(Setting("nrat", "asymmetric", 0.4), "best", "cw20", fashion) is None
    assert printed(Setting("trades", "none", 0.0), "best", "aa", fashion) is None
