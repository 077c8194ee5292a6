"""Behaviour that needs a GPU; skipped without one."""

from pathlib import Path

import pytest
import torch

from nrat_scale.recipe import load_recipe
from nrat_scale.train.compile import compile_models
from nrat_scale.train.graphs import StepGraphs
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.step import train_step
from tests.support.runs import RECIPE, digest, make_shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONSTANT_EMA = ["ema.decay=0.1", "ema.warmup_fraction=0"]  # so that the update is captured, too
WIDE = "{name: wrn28_10_silu, kwargs: {depth: 10, width: 1}}"


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    text = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated))
    path = folder / "tiny.yaml"
    path.write_text(text.replace("{name: cnn4, kwargs: {width: 4, hidden: 16}}", WIDE))
    return path


# Compilation takes most of the time of a compiled run, so only two precisions are compiled.
@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize(
    ("precision", "compiled"),
    [("fp32", "false"), ("fp32", "auto"), ("bf16", "false"), ("bf16", "auto"), ("fp16", "false"), ("fp64", "false")],
)
def test_every_precision_resumes(recipe_path: Path, tmp_path: Path, precision: str, compiled: str, graphs: str) -> None:
    """With deterministic algorithms a resumed run ends with the bits of an undisturbed one, also between two replays."""
    keys = {"precision": precision, "train.compile": compiled, "train.graphs": graphs, "train.deterministic": "true"}
    overrides = [*CONSTANT_EMA, *(f"{key}={value}" for key, value in keys.items())]
    whole = train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'whole'}"]))
    for stop in (["train.max_steps=5"], ["train.max_steps=9"], []):
        parts = train(load_recipe(recipe_path, [*overrides, *stop, f"run_dir={tmp_path / 'parts'}"]))
    assert digest(parts) == digest(whole)


VARIANTS = (
    ["objective.name=nrat"],
    ["objective.name=dm_at"],
    ["objective.name=pgd_at", "data.augment.cutmix=0.5"],
    ["objective.name=mart", "train.accumulate=2", "train.channels_last=false"],
    ["objective.name=trades", "awp.gamma=0.01", "awp.warmup_epochs=0"],
    ["data.resident=never"],
    ["data.resident=always"],
    ["train.fold_batchnorm=false"],
)


@pytest.mark.parametrize("options", VARIANTS, ids=" ".join)
def test_graphs_and_compilation_equal_eager(recipe_path: Path, tmp_path: Path, options: list[str]) -> None:
    """Six steps in float64: weights, EMA and BatchNorm of graphs, and of compiled graphs, are those of launches."""
    states = []
    for name, compiled, graphs in (("eager", "false", False), ("graphs", "false", True), ("both", "true", True)):
        given = [*CONSTANT_EMA, *options, "precision=fp64", f"train.compile={compiled}", "train.deterministic=true"]
        state = start(load_recipe(recipe_path, [*given, f"run_dir={tmp_path / name}"]))
        compile_models(state)
        state.graphs = StepGraphs(state, required=True) if graphs else None
        for batch in state.data.batches(0, 6):
            train_step(state, batch)
            state.step += 1
        states.append(state)
        if state.graphs is not None:
            assert state.graphs.attack.num_captures and state.graphs.training.num_captures
            assert bool(state.graphs.update.num_captures) is ("awp.gamma=0.01" not in options)
    for other in states[1:]:
        for name in ("base", "ema"):
            ours, theirs = (getattr(state, name).state_dict() for state in (states[0], other))
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("option", ["train.compile=true", "data.resident=always", "train.channels_last=false"])
def test_options_train(recipe_path: Path, tmp_path: Path, option: str) -> None:
    """A run trains compiled, with images on the GPU, or without channels-last memory."""
    overrides = ["precision=bf16", "train.compile=false", option, f"run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, overrides))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_never_waits_for_the_gpu(recipe_path: Path, tmp_path: Path, graphs: bool) -> None:
    """After some steps of warm-up no operation of a step synchronises with the host; torch raises if one does."""
    state = start(load_recipe(recipe_path, [*CONSTANT_EMA, "precision=bf16", f"run_dir={tmp_path / 'run'}"]))
    state.graphs = StepGraphs(state, required=True) if graphs else None
    for batch in state.data.batches(0, 10):
        # The first replays compare with eager results, on the host.
        torch.cuda.set_sync_debug_mode("error" if state.step >= 6 else "default")
        try:
            train_step(state, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        state.step += 1
