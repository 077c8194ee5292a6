"""`nrat_scale.load("user/repo")` against a Hub of the tests' own on loopback, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from nrat_scale.models import ModelSpec, create, model_arguments

SCRIPT = """
import sys, torch, nrat_scale
from nrat_scale.errors import run_cli
def main():
    model = nrat_scale.load(sys.argv[1])
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    print(model.training, model(x).double().sum().item())
run_cli(main)
"""


def load(source: str, server: SimpleNamespace, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, source]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture
def released(server: SimpleNamespace) -> SimpleNamespace:
    """A server with the release someone/robust; its `logits` are what the model gives."""
    arguments = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 8}), 10, 1, (0.3,), (0.3,))
    torch.manual_seed(0)
    model = create("cnn4", arguments).eval()
    config = {
        "architecture": "cnn4",
        "num_classes": 10,
        "num_features": 8,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 10,
            "input_size": [1, 8, 8],
            "first_conv": "features.0",
            "classifier": "classifier",
        },
    }
    for revision in ("main", "0" * 40):
        root = f"/someone/robust/resolve/{revision}"
        server.files[f"{root}/config.json"] = json.dumps(config).encode()
        server.files[f"{root}/model.safetensors"] = save(dict(model.state_dict()))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    server.logits = model(x).double().sum().item()
    return server


def test_a_release_loads_from_the_hub(released: SimpleNamespace, tmp_path: Path) -> None:
    """One line fetches a release, in evaluation mode with the published weights; a missing one is a sentence."""
    result = load("someone/robust", released, tmp_path)
    assert result.returncode == 0, result.stderr
    training, total = result.stdout.split()
    assert training == "False"
    assert float(total) == pytest.approx(released.logits, abs=1e-9)
    missing = load("someone/other", released, tmp_path)
    assert missing.returncode == 2
    assert "someone/other" in missing.stderr
    assert "Traceback" not in missing.stderr
