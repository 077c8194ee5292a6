"""Recipes shared by the tests of training, and the state of a fresh process for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.support.runs import RECIPE, make_shards


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps one state per process; training sets flush_denormal for its process. The small models of the tests
    only lose time to a second thread."""
    monkeypatch.setattr("nrat_scale.train.setup.use_all_cores", lambda: torch.set_num_threads(1))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of four steps of a small network without BatchNorm."""
    folder = tmp_path_factory.mktemp("train")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


@pytest.fixture(scope="session")
def wide_path(recipe_path: Path) -> Path:
    """The same with BatchNorm: a WideResNet of depth 10."""
    path = recipe_path.with_name("wide.yaml")
    model = "{name: wrn28_10_silu, kwargs: {depth: 10, width: 1}}"
    path.write_text(recipe_path.read_text().replace("{name: cnn4, kwargs: {width: 4, hidden: 16}}", model))
    return path
