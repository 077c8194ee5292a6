"""A small CNN and the releases that hold its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nrat_scale.models import ModelSpec, model_arguments

ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 8}), 10, 1, (0.3,), (0.2,))


def same_logits(a: nn.Module, b: nn.Module, shape: tuple[int, ...] = (3, 1, 8, 8)) -> bool:
    """Whether both models give the same logits, bit for bit, on seeded images."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def write_release(folder: Path, model: nn.Module, **changes: Any) -> Path:
    """A release folder of a `cnn4`; `changes` replace entries of its configuration."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "cnn4", "num_classes": 10, "model_args": ARGUMENTS}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder
