"""Behaviour that needs a GPU; skipped without one."""

from pathlib import Path

import pytest
import torch

from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.step import train_step
from tests.support.runs import RECIPE, digest, make_shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
@pytest.mark.parametrize(
    ("precision", "compiled"),
    [("fp32", "false"), ("fp32", "auto"), ("bf16", "false"), ("bf16", "auto"), ("fp16", "false"), ("fp64", "false")],
)
def test_every_precision_resumes(
    recipe_path: Path, tmp_path: Path, precision: str, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With deterministic algorithms a resumed run ends with the bits of an undisturbed one."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    overrides = [f"precision={precision}", f"train.compile={compiled}"]
    whole = train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'whole'}"]))
    for stop in (["train.max_steps=5"], []):
        parts = train(load_recipe(recipe_path, [*overrides, *stop, f"run_dir={tmp_path / 'parts'}"]))
    assert digest(parts) == digest(whole)


@pytest.mark.parametrize("option", ["train.compile=true", "data.resident=always", "train.channels_last=false"])
def test_options_train(recipe_path: Path, tmp_path: Path, option: str) -> None:
    """A run trains compiled, with images on the GPU, or without channels-last memory."""
    overrides = ["precision=bf16", "train.compile=false", option, f"run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, overrides))


def test_a_step_never_waits_for_the_gpu(recipe_path: Path, tmp_path: Path) -> None:
    """After two steps of warm-up no operation of a step synchronises with the host; torch raises if one does."""
    state = start(load_recipe(recipe_path, ["precision=bf16", f"run_dir={tmp_path / 'run'}"]))
    for batch in state.data.batches(0, 6):
        torch.cuda.set_sync_debug_mode("error" if state.step >= 2 else "default")
        try:
            train_step(state, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        state.step += 1
