"""Overrides of mappings: `key={}` empties one, and another model does not inherit `model.kwargs`."""

from pathlib import Path
from typing import Any

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.recipe import load_recipe

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
    assert "model.kwargs \"{'width': 4, 'hidden': 16}\" are those of 'cnn4' and are not used" in capsys.readouterr().err
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
