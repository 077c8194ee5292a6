"""Overrides of mappings: `key={}` empties one, and another model does not inherit `model.kwargs`."""

from pathlib import Path
from typing import Any

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.recipe import load_recipe, to_yaml

RECIPE = """
threat: {eps: 0.1, step: 0.05, num_steps: 2}
model: {name: cnn4, kwargs: {width: 4, hidden: 16}, mean: [0.5]}
data: {real: {shards: x}}
"""
OF_CNN4 = {"width": 4, "hidden": 16}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with arguments of `cnn4`."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


@pytest.mark.parametrize(
    ("overrides", "name", "kwargs"),
    [
        ([], "cnn4", OF_CNN4),
        (["model.name=cnn4"], "cnn4", OF_CNN4),
        (["model.kwargs.width=8"], "cnn4", {"width": 8, "hidden": 16}),
        (["model.kwargs={width: 8}"], "cnn4", {"width": 8, "hidden": 16}),
        (["model.kwargs={}"], "cnn4", {}),
        (["model.kwargs={}", "model.kwargs.hidden=3"], "cnn4", {"hidden": 3}),
        (["model.kwargs.hidden=3", "model.kwargs={}"], "cnn4", {}),
        (["model.name=resnet18"], "resnet18", {}),
        (["model={name: resnet18}"], "resnet18", {}),
        (["model.name=wrn28_10", "model.kwargs.depth=10"], "wrn28_10", {"depth": 10}),
        (["model.kwargs.depth=10", "model.name=wrn28_10"], "wrn28_10", {"depth": 10}),
        (["model.name=my_model:MyNet"], "my_model:MyNet", {}),
        (["model.name=resnet18", "model.name=cnn4"], "cnn4", OF_CNN4),
    ],
)
def test_arguments_of_the_model(recipe: Path, overrides: list[str], name: str, kwargs: dict[str, Any]) -> None:
    """They belong to the recipe's model; the rest of the section stays."""
    model = load_recipe(recipe, overrides).model
    assert (model.name, model.kwargs, model.mean) == (name, kwargs, [0.5])


def test_dropped_arguments_are_said(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning names them, unless the overrides empty them too."""
    load_recipe(recipe, ["model.name=resnet18"])
    assert "model.kwargs \"{'width': 4, 'hidden': 16}\" is that of 'cnn4' and is not used" in capsys.readouterr().err
    load_recipe(recipe, ["model.name=resnet18", "model.kwargs={}"])
    load_recipe(recipe, ["model.kwargs.width=8"])
    assert capsys.readouterr().err == ""


def test_an_empty_section_is_that_of_the_defaults(recipe: Path) -> None:
    """`{}` empties any mapping, also a whole section; no other value becomes a mapping."""
    assert load_recipe(recipe, ["model={}"]).model.name == "resnet18_cifar"
    with pytest.raises(UserError, match="Nothing to train on"):
        load_recipe(recipe, ["data={}"])
    with pytest.raises(UserError, match="seed"):
        load_recipe(recipe, ["seed={}"])


def test_another_objective_has_its_own_losses(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resolved recipe holds the losses of its preset; an override of the name does not inherit them."""
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(load_recipe(recipe)))
    for name in ("natural", "pgd_at", "trades", "trades_ikl", "mart"):
        assert load_recipe(resolved, [f"objective.name={name}"]).objective.title == name
    assert capsys.readouterr().err == ""
    changed = to_yaml(load_recipe(recipe, ["objective.loss=gce"]))
    resolved.write_text(changed)
    assert load_recipe(resolved, ["objective.name=trades"]).objective.loss == "ce"
    assert "objective.loss 'gce' is that of 'nrat' and is not used" in capsys.readouterr().err
    assert load_recipe(resolved, ["objective.name=trades", "objective.loss=sce"]).objective.loss == "sce"
