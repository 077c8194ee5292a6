"""`train.compile`: on for CUDA by default; a failure falls back to eager, or ends the run if it is `true`."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train import compile as compiling
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import train_step


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled code of this test."""
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    return tmp_path / "cache" / "torchinductor"


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


def _started(recipe_path: Path, run: Path, *overrides: str) -> TrainState:
    return start(load_recipe(recipe_path, ["train.compile=true", *overrides, f"run_dir={run}"]))


@pytest.mark.usefixtures("compiler")
def test_where_compiled_code_is_kept(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache; a folder that is set stays; torch's own without a cache that can be written."""
    state, usual = _started(recipe_path, tmp_path / "run"), default_cache_dir()
    (tmp_path / "file").touch()
    own, file = tmp_path / "cache", tmp_path / "file"
    for variables, expected in (
        ({"XDG_CACHE_HOME": str(own)}, own / "nrat_scale" / "torchinductor"),
        ({"XDG_CACHE_HOME": str(own), "TORCHINDUCTOR_CACHE_DIR": usual}, own / "nrat_scale" / "torchinductor"),
        ({"XDG_CACHE_HOME": str(own), "NRAT_SCALE_CACHE": str(tmp_path / "c")}, tmp_path / "c" / "torchinductor"),
        ({"XDG_CACHE_HOME": str(own), "TORCHINDUCTOR_CACHE_DIR": "/chosen"}, Path("/chosen")),
        ({"XDG_CACHE_HOME": str(file), "TORCHINDUCTOR_CACHE_DIR": usual}, Path(usual)),
    ):
        for name in ("XDG_CACHE_HOME", "NRAT_SCALE_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        compiling.compile_models(state)
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == expected


@pytest.mark.parametrize("damaged", [True, False])
def test_damaged_compiled_code_is_compiled_anew(
    recipe_path: Path,
    tmp_path: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damaged: bool,
) -> None:
    """A failure that goes away without the stored files is theirs: they are removed. Any other leaves them."""
    state = _started(recipe_path, tmp_path / "run")
    kept.mkdir(parents=True)
    (kept / "code.py").write_text("broken")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(kept / "triton" / "0"))  # as torch sets it

    def compiled(function, *, dynamic):
        used = os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ.get("TRITON_CACHE_DIR", "")
        if not damaged or any(folder.startswith(str(kept)) for folder in used):
            raise NameError("name 'broken' is not defined")
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    if damaged:
        compiling.compile_models(state)
        assert "had damaged files (name 'broken' is not defined); it was removed" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="cannot compile the model"):
            compiling.compile_models(state)
    assert kept.exists() is not damaged


@pytest.mark.parametrize("options", [[], ["precision=bf16"], ["objective.name=pgd_at"], ["objective.name=dm_at"]])
def test_everything_that_a_step_calls_is_compiled_before(
    wide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Also the attack's natural logits, which need no gradient and therefore have a graph of their own."""
    calls: list[tuple[int, bool]] = []

    def compiled(function, *, dynamic):
        def call(*given):
            calls.append((id(function), torch.is_grad_enabled()))
            return function(*given)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    state = _started(wide_path, tmp_path / "run", *options)
    compiling.compile_models(state)
    before = set(calls)
    train_step(state, next(state.data.batches(0, 1)))
    assert set(calls) == before


@pytest.mark.slow
def test_a_second_start_compiles_nothing(
    recipe_path: Path, tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With torch's real compiler: the graphs of the first start are read from the cache."""
    state = _started(recipe_path, tmp_path / "run", "objective.name=natural", "objective.inner=ce")
    lines = []
    for _ in range(2):
        compiling.compile_models(state)
        lines += [line for line in capsys.readouterr().out.splitlines() if line.startswith("torch.compile")]
    first, second = (re.match(r"torch.compile: (\d+) graphs compiled, (\d+) read from (\S+),", line) for line in lines)
    assert first is not None and int(first[1]) > 0 and int(first[2]) == 0
    assert second is not None and int(second[1]) == 0 and int(second[2]) == int(first[1])
    assert first[3] == second[3] == str(kept)


def test_stored_recipes_load(recipe_path: Path) -> None:
    """Older recipes hold a boolean; no value changes the identity, and others are refused."""
    recipes = [load_recipe(recipe_path, [f"train.compile={value}"]) for value in ("true", "false", "auto")]
    assert [recipe.train.compile for recipe in recipes] == [True, False, "auto"]
    assert len({recipe.identity for recipe in recipes}) == 1
    with pytest.raises(UserError, match=r"train\.compile is 'maybe'; it must be auto, true or false"):
        load_recipe(recipe_path, ["train.compile=maybe"])
