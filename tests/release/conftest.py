"""One evaluated run for the tests of releases, copied for each."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.run_folders import write_run

ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 16}), 10, 1, (0.3,), (0.3,))


@pytest.fixture(scope="package")
def model() -> nn.Module:
    """The model whose weights are released."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create("cnn4", ARGUMENTS).eval()


@pytest.fixture(scope="package")
def test_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 test images."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labelled = LabelledArrays(images, np.arange(40) % 10, "digits", tuple("0123456789"))
    return write_shards(labelled, tmp_path_factory.mktemp("shards") / "test", progress=False)


@pytest.fixture(scope="package")
def evaluated_run(model: nn.Module, test_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run with one queued checkpoint, and files in it that must never be published."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    write_run(folder, model, ARGUMENTS, 8, threat="eps: 8/255, step: 2/255", queue=True)
    for name in (".env", "train.log", "token"):
        (folder / name).write_text("HF_TOKEN=hf_secret")
    evaluate_cli.main(
        [str(folder), "--data", str(test_shards), "--attacks", "natural,pgd3,aa-apgd", "--aa-images", "10"]
    )
    return folder


@pytest.fixture
def run(evaluated_run: Path, tmp_path: Path) -> Path:
    """A copy of the evaluated run that a test may change."""
    return shutil.copytree(evaluated_run, tmp_path / "run")
