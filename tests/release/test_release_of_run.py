"""A release holds the evaluated weights of a run, and is refused without results for exactly these weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe, to_yaml
from nrat_scale.release import bundle
from tests.support.run_folders import write_run

ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 16}), 10, 1, (0.3,), (0.3,))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create("cnn4", ARGUMENTS).eval()


@pytest.fixture
def run(model: nn.Module, tmp_path: Path) -> Path:
    """A run directory whose EMA is `model` and whose raw weights are not, with 60 test images beside it."""
    images = np.random.default_rng(2).integers(0, 256, (60, 12, 12, 1), dtype=np.uint8)
    data = LabelledArrays(images, np.arange(60) % 10, "custom", tuple("0123456789"))
    write_shards(data, tmp_path / "test", progress=False)
    train = f"{tmp_path}/secret/train"
    return write_run(tmp_path / "run", model, ARGUMENTS, 12, threat="eps: 0.06, step: 0.02", train=train)


def results_of(run: Path, *options: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    evaluate_cli.main([str(run), "--data", str(run.parent / "test"), *options])
    return json.loads((run / "results.json").read_text())


def test_release_is_the_evaluated_model(run: Path, model: nn.Module, tmp_path: Path) -> None:
    """The folder loads through nrat_scale and timm with the EMA's logits, names no local path, and is made once."""
    results_of(run, "--attacks", "natural,pgd3")
    folder = bundle.release(run, tmp_path / "out" / "mine")
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        "config.json",
        "curves.png",
        "manifest.json",
        "model.safetensors",
        "model_info.json",
        "new_model_issue.md",
        "recipe.yaml",
        "results.json",
        "results.npz",
    ]
    x = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded, through_timm = nrat_scale.load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(through_timm(x), model(x))
    assert not any(str(tmp_path) in p.read_text() for p in folder.rglob("*.*") if p.suffix in (".md", ".json", ".yaml"))
    card, record = (folder / "README.md").read_text(), json.loads((run / "results.json").read_text())
    pgd = record["checkpoints"]["best"]["attacks"]["pgd3"]
    assert f"{100 * pgd['accuracy']:.1f}" in card
    assert "n = 60" in card
    assert bundle.release(run, folder) == folder
    evaluate_cli.main(
        [str(folder), "--data", str(run.parent / "test"), "--attacks", "pgd3", "--out", str(tmp_path / "again.json")]
    )
    again = json.loads((tmp_path / "again.json").read_text())["checkpoints"]["release"]["attacks"]["pgd3"]
    assert again["correct"] == pgd["correct"]


def test_the_card_of_natural_training_cites_no_method(run: Path, tmp_path: Path) -> None:
    """Plain cross-entropy is nobody's method, neither NRAT's nor that of this package."""
    text = to_yaml(load_recipe(run / "recipe.yaml", ["objective.name=natural", "objective.inner=ce"]))
    (run / "recipe.yaml").write_text(text)
    card = (bundle.release(run, tmp_path / "natural", unevaluated=True) / "README.md").read_text()
    assert "Citation" not in card and "* nrat_scale" not in card and "NRAT" not in card


def test_results_and_card_say_how_the_objective_started(run: Path, tmp_path: Path) -> None:
    """results.json of the run and of its release, and the card, name a warm start, which no publication has."""
    recipe = run / "recipe.yaml"
    usual = results_of(run, "--attacks", "natural")["checkpoints"]["best"]
    assert usual["objective"] == "nrat"
    recipe.write_text(to_yaml(load_recipe(recipe, ["objective.warm_start=0.3"])))
    (run / "results.json").unlink()
    warm = results_of(run, "--attacks", "natural")["checkpoints"]["best"]
    assert warm["objective"] == "nrat, warm start over 30 % of training"
    folder = bundle.release(run, tmp_path / "warm")
    card = (folder / "README.md").read_text()
    assert "trained with **nrat, warm start over 30 % of training**" in card
    assert "goes linearly from cross-entropy to its own over the first 30 % of training" in card
    out = tmp_path / "again.json"
    data = ["--data", str(run.parent / "test"), "--attacks", "natural"]
    evaluate_cli.main([str(folder), *data, "--out", str(out)])
    assert json.loads(out.read_text())["checkpoints"]["release"]["objective"] == warm["objective"]


def test_release_refuses(run: Path, tmp_path: Path) -> None:
    """No results, or those of other weights, are not passed off as these; nothing foreign is overwritten."""
    with pytest.raises(UserError, match="no results"):
        bundle.release(run, tmp_path / "out")
    card = (bundle.release(run, tmp_path / "bare", unevaluated=True) / "README.md").read_text()
    assert "Not evaluated" in card
    results_of(run, "--attacks", "natural")
    results = json.loads((run / "results.json").read_text())
    for record in results["checkpoints"].values():
        record["sha256"] = "0" * 64
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="no results"):
        bundle.release(run, tmp_path / "out")
    (tmp_path / "full").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "full" / "model.safetensors")
    with pytest.raises(UserError, match="exists already"):
        bundle.release(run, tmp_path / "full", unevaluated=True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["model.safetensors"]
