"""Recipes shared by the tests of training; each test runs as in a new process."""

from pathlib import Path

import pytest

from tests.support.accelerate import fresh_process  # noqa: F401  (autouse in this folder)
from tests.support.runs import RECIPE, make_shards


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
