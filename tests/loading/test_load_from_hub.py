"""`nrat_scale.load("user/repo")` with the real client against a Hub on loopback, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save

from nrat_scale.models import ModelSpec, create, model_arguments

SCRIPT = """
import sys, torch, nrat_scale
from nrat_scale.core.errors import run_cli
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
    """A server with the release someone/robust; `logits` is the sum of its model's logits."""
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


@pytest.mark.medium
def test_a_release_loads_from_the_hub(released: SimpleNamespace, tmp_path: Path) -> None:
    """One line fetches a release, in evaluation mode with the published weights; a missing one ends in a sentence."""
    result = load("someone/robust", released, tmp_path)
    assert result.returncode == 0, result.stderr
    training, total = result.stdout.split()
    assert training == "False"
    assert float(total) == pytest.approx(released.logits, abs=1e-9)
    missing = load("someone/other", released, tmp_path)
    assert missing.returncode == 2
    assert "someone/other" in missing.stderr
    assert "Traceback" not in missing.stderr


PRETRAINED = """
import sys, torch
from nrat_scale.loading.foreign import pretrained
from nrat_scale.core.errors import run_cli
def main():
    model = pretrained(sys.argv[1])
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    print(model.training, model.num_classes, model.in_chans, model(x).double().sum().item())
run_cli(main)
"""


@pytest.mark.medium
def test_a_pretrained_timm_model_normalises_its_input(server: SimpleNamespace, tmp_path: Path) -> None:
    """`pretrained` fetches timm's weights and takes [0, 1] images; without the Hub it ends in a sentence."""
    name = "test_resnet.r160_in1k"
    torch.manual_seed(0)
    net = timm.create_model("test_resnet").eval()
    for revision in ("main", "0" * 40):
        server.files[f"/timm/{name}/resolve/{revision}/model.safetensors"] = save(dict(net.state_dict()))
    known = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (known.mean, known.std))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def run(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            **variables,
        }
        command = [sys.executable, "-c", PRETRAINED, name]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    result = run(tmp_path / "a")
    assert result.returncode == 0, result.stderr
    training, num_classes, in_chans, total = result.stdout.split()
    assert (training, int(num_classes), int(in_chans)) == ("False", 1000, 3)
    with torch.no_grad():
        assert float(total) == pytest.approx(net((x - mean) / std).double().sum().item(), rel=1e-4, abs=1e-3)
    # HF_HUB_OFFLINE instead of a refused connection, which ends the same way after a minute of retries.
    unreachable = run(tmp_path / "b", HF_HUB_OFFLINE="1")
    assert unreachable.returncode == 2, unreachable.stderr
    assert f"timm's weights of '{name}' cannot be fetched" in unreachable.stderr
    assert "Traceback" not in unreachable.stderr
