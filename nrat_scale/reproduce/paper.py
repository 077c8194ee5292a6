"""The paper's printed accuracies, as data: `recipes/grids/paper.csv`."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from nrat_scale.reproduce.measured import Setting

PAPER = "Chen et al., NRAT: towards adversarial training with inherent label noise, Machine Learning, 2024"
# Table of paper.csv -> our method -> its name there; an empty table has our names.
Names = Mapping[str, Mapping[str, str]]
# Table 5 is NRAT whose attack maximises "our proposed loss function": read as NCE+RCE on the adversarial logits.
CIFAR10: Names = {"table1": {}, "table2": {}, "table3": {}, "table5": {"nrat-inner-nce_rce": "nrat"}}
_EDITIONS = {"table4_mnist": ("paper-mnist", "mnist"), "table4_fashion_mnist": ("paper-fashion_mnist", "fashion")}
_TABLES = Path(__file__).with_name("grids") / "paper.csv"


@cache
def printed_numbers() -> dict[tuple[str, str, str, str, str], float]:
    """All printed accuracies in %, by (table, method, noise, checkpoint, measure); noise is `clean` or such as `symmetric_0.4`."""
    with open(_TABLES, newline="", encoding="utf-8") as file:
        return {
            (row["table"], row["method"], row["noise"], row["checkpoint"], row["measure"]): float(row["percent"])
            for row in csv.DictReader(file)
        }


def printed(setting: Setting, checkpoint: str, measure: str, names: Names = CIFAR10) -> float | None:
    """The accuracy in % that the paper prints, in the first table of `names` that has it; None if none has.

    The paper does not say of which kind its asymmetric noise is: every kind of ours is looked up as `asymmetric`.
    """
    noise = "clean" if setting.noise_text == "clean" else f"{setting.noise.split('_')[0]}_{setting.rate:g}"
    numbers, method = printed_numbers(), setting.method
    theirs = {table: ours.get(method, "") if ours else method for table, ours in names.items()}
    found = (numbers.get((table, name, noise, checkpoint, measure)) for table, name in theirs.items())
    return next((number for number in found if number is not None), None)


def names_for(edition: str, names: Names) -> Names:
    """The tables of `names` that are printed for the data of an edition: MNIST and Fashion-MNIST have tables of their own."""
    return {table: ours for table, ours in names.items() if edition in _EDITIONS.get(table, (edition,))}
