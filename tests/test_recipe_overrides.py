"""Overrides of mappings: `key={}` empties one, and another model does not inherit `model.kwargs`."""

import re
from pathlib import Path
from typing import Any

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.overrides import SYNONYMS
from nrat_scale.recipe import load_recipe, to_yaml
from nrat_scale.train import __main__ as train_cli

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


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("epochs=5", "'train.epochs'"),
        ("lr=0.1", "'optim.lr'"),
        ("objective.lr=0.1", "'optim.lr'"),
        ("batch_size=8", "'data.batch_size'"),
        ("objective.beta=6", "'objective.lam'"),
        ("epsilon=0.1", "'threat.eps'"),
        ("train.learning_rate=0.1", "'optim.lr'"),
        ("train.epochz=5", "'epochs'"),
        ("sed=5", "'seed'"),
    ],
)
def test_an_unknown_key_names_the_key_that_was_meant(recipe: Path, override: str, meant: str) -> None:
    """Also one of another section, and the word of another paper."""
    with pytest.raises(UserError, match=f"unknown key '{override.split('=')[0]}'. Did you mean {meant}"):
        load_recipe(recipe, [override])


def test_other_words_for_keys_name_keys(recipe: Path) -> None:
    """No entry of the table is out of date."""
    known = to_yaml(load_recipe(recipe))
    for meant in SYNONYMS.values():
        *sections, key = meant.split(".")
        assert re.search(
            "".join(rf"^ *{name}:\n(?:.*\n)*?" for name in sections) + rf" *{key}:", known, re.MULTILINE
        ), meant


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"threat\.eps, threat\.step, threat\.num_steps, data\.real\.shards not set"),
        ("threat: {eps: 0.1, step: 0.1, num_steps: 1}\n", r"r\.yaml: data\.real\.shards not set"),
        (
            "threat: {eps: 0.1, step: '???', num_steps: 1}\ndata: {real: {shards: x}}\n",
            r"r\.yaml: threat\.step not set",
        ),
        (
            "threat: {eps: 0.1, step: 0.1}\ndata: {real: {shards: x}}\n",
            r"r.yaml: threat.num_steps not set. .*prepare template",
        ),
    ],
)
def test_a_recipe_without_its_threat_says_what_is_missing(recipe: Path, content: str, message: str) -> None:
    """In the recipe's words, not in those of the library that reads it."""
    recipe.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(recipe)


def test_a_recipe_that_is_no_file_names_the_file(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped name, a run, and another folder."""
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(UserError, match=r"There is no recipe r\.yml\. Did you mean r\.yaml\?"):
        load_recipe("r.yml")
    with pytest.raises(UserError, match=r"There is no recipe zzz\.yaml\.$"):
        load_recipe("zzz.yaml")
    (recipe.parent / "runs" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a folder\. Name a YAML file"):
        load_recipe("runs/a")
    (recipe.parent / "runs" / "a" / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match=r"runs/a is a run: its recipe is runs/a/recipe\.yaml"):
        load_recipe("runs/a")


@pytest.mark.parametrize("words", [["--epochs", "5"], ["--train.epochs=5"], ["--lr=0.1"]])
def test_an_override_is_not_an_option(recipe: Path, words: list[str]) -> None:
    """The sentence shows how an override is written."""
    with pytest.raises(UserError, match=rf"There is no option {words[0]}\. Keys .* key=value"):
        train_cli.main([str(recipe), *words])


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [("{img_size:16,depth:2}", r"model\.kwargs\.img_size=16"), ("{img-size: 16}", "not the name of an")],
)
def test_arguments_of_a_model_have_names(recipe: Path, kwargs: str, hint: str) -> None:
    """YAML reads {a:1} as the key 'a:1' without a value, which timm would ignore."""
    with pytest.raises(UserError, match=f"model.kwargs has the key .*{hint}"):
        load_recipe(recipe, [f"model.kwargs={kwargs}"])


def test_one_tracker_needs_no_list(recipe: Path) -> None:
    """As one module of `imports`."""
    assert (
        load_recipe(recipe, ["train.trackers=wandb"]).train.trackers
        == load_recipe(recipe, ["train.trackers=[wandb]"]).train.trackers
    )
