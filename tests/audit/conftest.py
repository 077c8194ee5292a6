"""Tiny shards, a tiny recipe of the folds, and one finished audit; each test runs as in a new process."""

from pathlib import Path

import pytest

from nrat_scale.audit.api import Audit, audit
from tests.support.accelerate import fresh_process, new_process  # noqa: F401  (fresh_process is autouse in this folder)
from tests.support.runs import make_shards

pytest.importorskip("cleanlab")

OVERRIDES = {
    "model.kwargs": {"width": 4, "hidden": 16},
    "data.batch_size": 32,
    "data.augment.crop": 0,
    "data.augment.flip": False,
    "train.epochs": 8,
    "optim.lr": 0.02,
}


@pytest.fixture(scope="session")
def overrides() -> dict[str, object]:
    """A network that learns the bands of `make_shards` in a second."""
    return OVERRIDES


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "train", 600, 0, dataset="digits")


@pytest.fixture(scope="session")
def hold_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("holdout") / "test", 300, 1, dataset="digits")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, hold_out: Path) -> Audit:
    """An audit of 20 % symmetric noise in two folds."""
    out = tmp_path_factory.mktemp("audits") / "symmetric"
    chosen = {"clean_holdout": hold_out, "noise": "symmetric:0.2:0", "bootstrap": 200, "overrides": OVERRIDES}
    with new_process():
        return audit(data, folds=2, out=out, **chosen)
