"""`train.compile`: on for CUDA by default; a failure falls back to eager, or ends the run if it is `true`."""

from pathlib import Path

import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train import compile as compiling
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replaces torch.compile by nothing; what was given to it."""
    given: list[object] = []

    def compiled(function, *, dynamic):
        given.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    return given


def test_auto_is_off_on_a_cpu(recipe_path: Path, tmp_path: Path, compiler: list[object]) -> None:
    """`auto` compiles nothing on a CPU, and `false` nothing anywhere."""
    for compile_ in ("auto", "false"):
        train(load_recipe(recipe_path, [f"train.compile={compile_}", f"run_dir={tmp_path / compile_}"]))
    assert compiler == []


@pytest.mark.parametrize("model", [[], ["model.bn=groups", "model.bn_group_size=4"]], ids=["local", "groups"])
def test_attack_and_training_are_separate_graphs(
    wide_path: Path, tmp_path: Path, compiler: list[object], model: list[str]
) -> None:
    """Two graphs; the passes that compile them change neither weights nor statistics, so the run's metrics are the same."""
    runs = [
        train(load_recipe(wide_path, [f"train.compile={on}", *model, "train.epochs=1", f"run_dir={tmp_path / on}"]))
        for on in ("false", "true")
    ]
    assert len(compiler) == 2
    assert RunFolder(runs[0]).read_metrics() == RunFolder(runs[1]).read_metrics()


def test_validation_runs_eager(wide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an EMA the trained model itself is validated: the compiled graph sees training batches only."""
    modes: list[bool] = []

    def compiled(function, *, dynamic):
        def call(*given):
            modes.append(any(layer.training for layer in batchnorms(state_of(function))))
            return function(*given)

        return call

    def state_of(function) -> torch.nn.Module:
        return getattr(function, "__self__", function)

    monkeypatch.setattr(torch, "compile", compiled)
    overrides = [
        "ema.decay=0",
        "threat.bn=batch",
        "train.compile=true",
        "train.epochs=1",
        f"run_dir={tmp_path / 'run'}",
    ]
    train(load_recipe(wide_path, overrides))
    assert modes and all(modes)


def test_a_failure_to_compile(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`true` ends the run with an error; under `auto`, on a device of AUTO_DEVICES, the run prints the reason and is eager."""

    def broken(function: object, *, dynamic: bool) -> object:
        raise RuntimeError("no C compiler found\nlong details")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"cannot compile the model \(no C compiler found\)\. Use train\.compile=auto"):
        train(load_recipe(recipe_path, ["train.compile=true", f"run_dir={tmp_path / 'true'}"]))
    monkeypatch.setattr(compiling, "AUTO_DEVICES", ("cpu",))
    state = start(load_recipe(recipe_path, [f"run_dir={tmp_path / 'auto'}"]))
    compiling.compile_models(state)
    assert "warning: torch.compile cannot compile the model (no C compiler found)" in capsys.readouterr().out
    assert state.attack_model.forward is state.attack_model.module and state.base._compiled_call_impl is None


def test_stored_recipes_load(recipe_path: Path) -> None:
    """Older recipes hold a boolean; no value changes the identity, and others are refused."""
    recipes = [load_recipe(recipe_path, [f"train.compile={value}"]) for value in ("true", "false", "auto")]
    assert [recipe.train.compile for recipe in recipes] == [True, False, "auto"]
    assert len({recipe.identity for recipe in recipes}) == 1
    with pytest.raises(UserError, match=r"train\.compile is 'maybe'; it must be auto, true or false"):
        load_recipe(recipe_path, ["train.compile=maybe"])
