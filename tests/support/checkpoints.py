"""Small checkpoints, damaged files, and system calls that fail."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faults.checkpoints import state_of
from nrat_scale.checkpoint.format import Checkpoint, save_checkpoint
from nrat_scale.checkpoint.state import Tensors
from nrat_scale.core.files import manifest_entry


def small_tensors(step: int) -> dict[str, Tensors]:
    """Tensors that differ between steps, among them several types, a view that is not contiguous, and an empty group."""
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    model = {
        "w": w,
        "n": torch.tensor(7),
        "d": torch.full((2,), 1 / 3, dtype=torch.float64),
        "h": torch.full((5,), 1 / 3, dtype=torch.bfloat16),
    }
    return {"model": model, "ema": {"w": (w + 1).t()}, "objective": {}}


def save(run: Path, step: int) -> Checkpoint:
    """Write a checkpoint that training could resume from."""
    return save_checkpoint(run, small_tensors(step), {**state_of(step), "loss": 0.1 + 0.2})


def rewrite_state(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Replace state.json and its manifest entry: an intact checkpoint that another version could have written."""
    content = json.dumps(state).encode()
    (checkpoint.folder / "state.json").write_bytes(content)
    edit_manifest(checkpoint.folder, lambda manifest: manifest.update({"state.json": manifest_entry(content)}))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Apply `edit` to the manifest of a checkpoint."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def failing(number: int) -> Callable[..., Any]:
    """A system call that fails with this errno."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
