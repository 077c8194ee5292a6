"""A threat whose attack cannot do its work is refused in training, and flagged in evaluation."""

import pytest

from nrat_scale.attacks import ThreatSpec, short_reach
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.sanity import short_reaches
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from tests.support.runs import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["threat.step=0.001"], ["2 steps of 0.001 reach 0.002 of eps = 0.1", "threat.step=0.125"]),
        (["threat.norm=l2", "threat.eps=0.5", "threat.step=0.02"], ["reach 0.04 of eps = 0.5"]),
    ],
)
def test_a_new_run_far_from_its_radius_is_refused(recipe_path, tmp_path, overrides, words):
    """Before anything is written, with the numbers and a step that would do."""
    with pytest.raises(UserError) as caught:
        train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["threat.eps=0.2"], "2 steps of 0.05 reach 0.1 of eps = 0.2"),
        (["threat.num_steps=1"], "1 step of 0.05 reaches 0.05 of eps = 0.1"),
        (["threat.num_steps=0"], "0 steps"),
    ],
)
def test_a_run_that_almost_reaches_its_radius_is_warned(recipe_path, tmp_path, capsys, overrides, words):
    """A quick try with fewer steps trains, and says that its attack is weak."""
    train(load_recipe(recipe_path, [*overrides, "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]))
    assert f"warning: The attack of training is too weak for its radius: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides", [["objective.name=natural", "objective.inner=ce"], ["threat.num_steps=0", "threat.init=uniform"]]
)
def test_training_without_an_attack_needs_no_reach(recipe_path, tmp_path, capsys, overrides):
    """Plain training, and training on noise alone; an attack of validation that is too weak is a warning."""
    given = ["threat.step=0.01", "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, [*overrides, *given]))
    assert (
        "Robust validation accuracies are too high: 2 steps of 0.01 reach 0.02 of eps = 0.1" in capsys.readouterr().err
    )


def test_a_run_of_an_earlier_version_is_resumed(recipe_path, tmp_path, monkeypatch, capsys):
    """It says that its attack is weak; it is not refused."""
    given = ["threat.step=0.01", f"run_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as earlier:
        earlier.setattr("nrat_scale.train.setup._check_reach", lambda recipe: None)
        train(load_recipe(recipe_path, [*given, "train.max_steps=1"]))
    start(load_recipe(recipe_path, given)).owner.release()
    assert "The attack of training is too weak for its radius" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_published_recipes_reach_their_radius(path):
    """Training and validation."""
    recipe = load_recipe(path)
    assert short_reach(recipe.threat, recipe.threat.num_steps) is None
    assert short_reach(recipe.threat, int(recipe.train.validation_attack.lstrip("pgdcw"))) is None


@pytest.mark.parametrize(
    "overrides", [["threat.norm=l2"], ["threat.norm=l2", "threat.eps=0.5"], ["threat.norm=l2", "threat.step=0.1"]]
)
def test_another_norm_asks_for_radius_and_step(overrides):
    """Lengths in l_inf mean something else in l_2."""
    with pytest.raises(UserError, match=r"threat\.norm is changed from linf to l2.*Give both"):
        load_recipe(ROOT / "recipes" / "resnet18_cifar10.yaml", overrides)
    both = ["threat.norm=l2", "threat.eps=0.5", "threat.step=0.125"]
    assert load_recipe(ROOT / "recipes" / "resnet18_cifar10.yaml", both).threat.norm == "l2"


def test_an_evaluation_is_flagged():
    """PGD and CW whose steps are too short; not FGSM, AutoAttack and natural images."""
    entries = {
        "natural": {}, "fgsm": {"steps": 1, "step": 0.2, "eps": 0.2}, "aa": {"eps": 0.2},
        "pgd10": {"steps": 10, "step": 0.001, "eps": 0.2}, "cw200": {"steps": 200, "step": 0.001, "eps": 0.2},
    }  # fmt: skip
    (flag,) = short_reaches(entries, ThreatSpec(0.2, 0.001, 1))
    assert flag.startswith("PGD-10 is too weak for its radius: 10 steps of 0.001 reach 0.01 of eps = 0.2.")
