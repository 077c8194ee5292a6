"""A digits classifier that is robust on some images, test images, and a run directory around both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate.measures import Images
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.digits import CNN_ARGUMENTS, DIGIT_NAMES, as_images, digits, trained_cnn
from tests.support.run_folders import write_run


@pytest.fixture(scope="session")
def threat() -> ThreatSpec:
    """The threat that `model` was trained for and `run` names."""
    return ThreatSpec(0.15, 0.04, 1)


@pytest.fixture(scope="session")
def model(threat: ThreatSpec) -> nn.Module:
    pixels, labels = digits()
    return trained_cnn(pixels[:1200], labels[:1200], threat.eps)


@pytest.fixture(scope="session")
def images() -> Images:
    pixels, labels = digits()
    return as_images(pixels[1200:1280], labels[1200:1280])


@pytest.fixture
def run(model: nn.Module, tmp_path: Path) -> Path:
    """A run directory whose EMA is `model` and whose raw weights are not, and the pixels of `images` as shards in `test`."""
    pixels, labels = digits()
    data = LabelledArrays(pixels[1200:1280], labels[1200:1280], "digits", DIGIT_NAMES)
    write_shards(data, tmp_path / "test", progress=False)
    return write_run(tmp_path / "run", model, CNN_ARGUMENTS, 8, threat="eps: 0.15, step: 0.04")


@pytest.fixture
def measured(run: Path) -> Callable[..., dict[str, Any]]:
    """Evaluate `run` by the command line, in this process: the content of its results.json."""

    def measure(*options: str) -> dict[str, Any]:
        evaluate_cli.main([str(run), "--data", str(run.parent / "test"), *options])
        return json.loads((run / "results.json").read_text())

    return measure
