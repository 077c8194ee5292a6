"""The cost of a recipe in forward passes: attack, training forwards, weight perturbation."""

import re
import shlex
from pathlib import Path

import pytest

from nrat_scale.cost import forward_equivalents
from nrat_scale.recipe import load_recipe
from tests.support.runs import RECIPE, ROOT


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """A recipe whose data are never read."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", "real").replace("GENERATED", "generated"))
    return path


@pytest.mark.parametrize(
    ("name", "reuses", "expected"),
    [("nrat", False, 27), ("trades", False, 27), ("dm_at", True, 26), ("pgd_at", False, 23), ("natural", False, 3)],
)
def test_forwards_of_a_step(recipe_path: Path, name: str, reuses: bool, expected: float) -> None:
    """Ten attack steps of two passes each, natural logits if the attack needs them, three passes a training forward."""
    recipe = load_recipe(recipe_path, [f"objective.name={name}", "threat.num_steps=10"])
    assert forward_equivalents(recipe, reuses_natural=reuses) == expected


def test_weight_perturbation_repeats_the_training_passes_once_it_begins(recipe_path: Path) -> None:
    """AWP adds a forward and backward of the outer loss, from `awp.warmup_epochs` on; the mean weighs both parts."""
    changes = ["objective.name=trades", "threat.num_steps=10", "train.epochs=100", "awp.gamma=0.005"]
    recipe = load_recipe(recipe_path, changes)
    assert [forward_equivalents(recipe, epoch) for epoch in (0, 8, 9, 99)] == [27, 27, 33, 33]
    assert forward_equivalents(recipe) == pytest.approx(27 + 6 * 91 / 100)
    late = load_recipe(recipe_path, [*changes, "awp.warmup_epochs=200"])
    assert forward_equivalents(late) == 27


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adr", 24), ("trades_adr", 28), ("te", 23 + 0.55), ("sglr", 23 + 0.55), ("noilin", 23), ("trades_te", 27.55)],
)
def test_label_refinement_costs_the_forwards_of_its_predictions(recipe_path: Path, name: str, expected: float) -> None:
    """One for ADR's teacher; one for TE and SGLR from the epoch on in which they begin, the ninth of 20."""
    recipe = load_recipe(recipe_path, [f"objective.name={name}", "threat.num_steps=10", "train.epochs=20"])
    assert forward_equivalents(recipe) == pytest.approx(expected + (0.05 if name in ("te", "sglr", "trades_te") else 0))


def test_the_variants_of_the_page_cost_what_it_says() -> None:
    """Each line of the table in docs/training.md is a valid override of the recipe, with its two costs."""
    page, recipe = (ROOT / "docs" / "training.md").read_text(), ROOT / "recipes" / "fashion_mnist.yaml"
    lines = re.findall(r"^\| [^|]* \| `([^`]*threat[^`]*)` \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(lines) >= 8
    for overrides, nrat, pgd_at in lines:
        for name, cost in (("nrat", nrat), ("pgd_at", pgd_at)):
            found = load_recipe(recipe, [f"objective.name={name}", *shlex.split(overrides)])
            assert forward_equivalents(found) == pytest.approx(float(cost)), overrides
