"""Checkpoints: directories of safetensors that are whole or not there, verified before anything is read.

    RUN/checkpoints/step-00000980/   model, ema, optimizer, objective .safetensors (those that exist), state.json
                                     manifest.json: name -> bytes, sha256 of every other file
    RUN/checkpoints/best.json, last.json   {"step", "epoch", "folder"}; "selected": false before any validation

A checkpoint is written to a temporary sibling, fsynced and renamed. Nothing is ever unpickled.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nrat_scale.errors import UserError
from nrat_scale.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json

Tensors = dict[str, Tensor]
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is its state.json, `sha256` maps file names to hashes."""

    folder: Path
    state: dict[str, Any]
    sha256: dict[str, str]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def evaluated(self) -> str:
        """The weights that are evaluated and released: `ema` where there is one, else `model`."""
        return "ema" if "ema.safetensors" in self.sha256 else "model"

    def tensors(self, name: str) -> Tensors:
        """The tensors of `name`.safetensors; none where the checkpoint has no such file."""
        path = self.folder / f"{name}.safetensors"
        if path.name not in self.sha256:
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}).") from error


def save_checkpoint(run: Path, tensors: dict[str, Tensors], state: dict[str, Any]) -> Checkpoint:
    """Write RUN/checkpoints/step-XXXXXXXX, durable when this returns.

    Args:
        run: the run directory.
        tensors: file name without ending -> tensors; empty ones are left out.
        state: JSON values, among them "step" and "epoch".

    Raises:
        UserError: it cannot be written (disk full, no permission).
    """
    folder = run / "checkpoints" / f"step-{int(state['step']):08d}"
    make_folder(folder.parent)
    temporary = temporary_sibling(folder)
    try:
        temporary.mkdir()
        for name, values in tensors.items():
            if values:
                contiguous = {key: value.detach().cpu().contiguous() for key, value in values.items()}
                # One metadata key at most: several would be written in random order and break bit equality.
                save_file(contiguous, temporary / f"{name}.safetensors", metadata={"format": "pt"})
        (temporary / STATE).write_text(json.dumps(state, indent=1, sort_keys=True, allow_nan=False) + "\n")
        files = sorted(path for path in temporary.iterdir())
        sha256 = {path.name: sha256_of(path) for path in files}
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256[path.name]} for path in files}
        for path in files:
            _fsync(path)
        write_json(temporary / MANIFEST, manifest)
        if folder.exists():  # a damaged one from before a resume: kept aside, never deleted
            os.replace(folder, folder.with_name(f".{folder.name}.replaced-{uuid.uuid4().hex[:8]}"))
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {folder} cannot be written ({error}). Free some space and start again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(folder, state, sha256)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify size and sha256 of every file that the manifest names, then read the state.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    manifest = read_json(folder / MANIFEST, "manifest of the checkpoint")
    sha256 = {}
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"The checkpoint {folder} is damaged: {name} is missing.")
        if (
            not isinstance(entry, dict)
            or path.stat().st_size != entry.get("bytes")
            or sha256_of(path) != entry.get("sha256")
        ):
            raise UserError(f"The checkpoint {folder} is damaged: {name} does not match its size and sha256.")
        sha256[name] = str(entry["sha256"])
    if STATE not in sha256:
        raise UserError(f"The checkpoint {folder} is damaged: its manifest does not name {STATE}.")
    return Checkpoint(folder, read_json(folder / STATE, "state of the checkpoint"), sha256)


def checkpoint_folders(run: Path) -> list[Path]:
    """All checkpoints of a run, newest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def set_aside(run: Path, after: int) -> None:
    """Hide the checkpoints of later steps than `after`, under names that nothing reads; they are not deleted."""
    for folder in checkpoint_folders(run):
        if step_of(folder) > after:
            os.replace(folder, folder.with_name(f".{folder.name}.collapsed-{uuid.uuid4().hex[:8]}"))
    fsync_folder(run / "checkpoints")


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one sentence for each newer one that does not.

    Raises:
        UserError: there are checkpoints, but not one of them is whole.
    """
    damaged: list[str] = []
    for folder in checkpoint_folders(run):
        try:
            return open_checkpoint(folder), damaged
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"No checkpoint of {run} is whole. {damaged[0]} Start again with another run_dir.")
    return None, []


def write_pointer(run: Path, name: str, checkpoint: Checkpoint, *, selected: bool = True) -> None:
    """Let best.json or last.json name `checkpoint`; `selected` is false where no validation has chosen it."""
    pointer = {"step": checkpoint.step, "epoch": checkpoint.state["epoch"], "folder": checkpoint.folder.name}
    write_json(run / "checkpoints" / f"{name}.json", pointer if selected else {**pointer, "selected": False})


def named_checkpoint(run: Path, name: str) -> Checkpoint:
    """The checkpoint that best.json or last.json names, verified.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = run / "checkpoints" / f"{name}.json"
    if not path.is_file():
        raise UserError(f"The run {run} has no '{name}' checkpoint yet (no {path}). Train it first.")
    folder = str(read_json(path, f"pointer to the {name} checkpoint").get("folder", ""))
    if Path(folder).name != folder or not (run / "checkpoints" / folder).is_dir():
        raise UserError(f"{path} names the checkpoint '{folder}', which is not there.")
    return open_checkpoint(run / "checkpoints" / folder)


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest and those that best.json and last.json name."""
    wanted = {folder.name for folder in checkpoint_folders(run)[:keep]}
    for name in ("best", "last"):
        path = run / "checkpoints" / f"{name}.json"
        if path.is_file():
            wanted.add(str(read_json(path, "pointer").get("folder")))
    for folder in checkpoint_folders(run):
        if folder.name not in wanted:
            shutil.rmtree(folder)


# ---- optimizer state as named tensors -------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """The optimizer's state tensors, called `parameter name/state key` (for SGD: `.../momentum_buffer`)."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Undo `optimizer_tensors`.

    Raises:
        UserError: a tensor belongs to no parameter of `model`, or has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise UserError(f"The checkpoint's optimizer state '{name}' does not fit the model.")
        # Adam counts its steps in a scalar that stays as it is; everything else lives with its parameter.
        scalar = value.ndim == 0 and parameter.ndim > 0
        optimizer.state[parameter][key] = value if scalar else value.to(parameter.device, parameter.dtype)
