"""Fixtures of the tests of the data plane."""

from pathlib import Path

import pytest

import nrat_scale.remote.transfer
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, ValidationSpec
from nrat_scale.labels import NoiseSpec
from tests.support.numbered_shards import numbered_shards
from tests.support.small_shards import write_small


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a millisecond, and no proxy between the tests and their server."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """New shards of 70 images."""
    return write_small(tmp_path / "shards")


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """130 real images with label noise and 310 generated ones, without augmentation; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    real, generated = numbered_shards(folder / "real", 130), numbered_shards(folder / "generated", 310)
    return DataSpec(
        batch_size=24,
        real=RealSpec(str(real), NoiseSpec("symmetric", 0.4)),
        generated=GeneratedSpec(str(generated), 0.7),
        validation=ValidationSpec(size=30),
        augment=AugmentSpec(crop=0, flip=False),
    )
