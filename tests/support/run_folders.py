"""Run directories as training writes them, around weights of a test's choice: for what comes after training."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from nrat_scale.checkpoint.folder import queue_release, write_pointer
from nrat_scale.checkpoint.format import save_checkpoint
from nrat_scale.recipe import load_recipe, to_yaml


def write_run(
    folder: Path,
    model: nn.Module,
    arguments: dict[str, Any],
    side: int,
    *,
    threat: str,
    train: str = "train",
    queue: bool = False,
) -> Path:
    """A run of `cnn4` whose EMA is `model` and whose raw weights are not; best and last are the same step.

    Args:
        arguments: of the model.
        side: of its images, in pixels.
        threat: eps and step as YAML, such as "eps: 0.1, step: 0.02".
        train: shards that the recipe names.
        queue: put the checkpoint aside for a release too.
    """
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(f"threat: {{{threat}, num_steps: 1}}\ndata: {{real: {{shards: {train}}}}}\n")
    raw = {key: value * 0.9 for key, value in model.state_dict().items()}
    state = {"step": 8, "epoch": 2, "whole_epoch": True}
    saved = save_checkpoint(folder, {"model": raw, "ema": dict(model.state_dict())}, state)
    for pointer in ("best", "last"):
        write_pointer(folder, pointer, saved)
    if queue:
        queue_release(folder, saved)
    (folder / "recipe.yaml").write_text(to_yaml(load_recipe(path)))
    description = {
        "architecture": "cnn4",
        "model_args": arguments,
        "image_shape": [side, side, 1],
        "class_names": [str(i) for i in range(10)],
        "dataset": "digits",
    }
    (folder / "model.json").write_text(json.dumps(description))
    rows = [
        {"kind": "validation", "epoch": epoch, "step": 4 * epoch, "attack": "pgd10", "labels": "given",
         "natural": {"correct": 50, "n": 100, "accuracy": 0.5}, "robust": {"correct": 40, "n": 100, "accuracy": 0.4},
         "natural_clean": None, "robust_clean": None}
        for epoch in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def folder_contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
