"""Checkpoints: directories of safetensors that are whole or not there, verified before anything is read.

    RUN/checkpoints/step-00000980/   model, ema, optimizer, objective .safetensors (those that exist), state.json
                                     manifest.json: name -> bytes, sha256 of every other file
    RUN/checkpoints/best.json, last.json   {"step", "epoch", "folder"}; "selected": false before any validation

A save goes: temporary sibling, fsync, read back against the hashes of what was meant, rename (from here on it counts),
pointers, removal of old ones. Killed anywhere in between, a run finds its last checkpoint whole or the one before;
`recover` tidies up and completes the pointers. `Saver` does all that beside training. Nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from nrat_scale.checkpoint.state import NAMED, Required, Tensors
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling

MANIFEST, STATE = "manifest.json", "state.json"
_FILE = re.compile(r"\w+\.safetensors|state\.json", re.ASCII)  # what a manifest may name: nothing outside the folder
STEP_NAME = r"step-[0-9]{8}"
_MARGIN = 1 << 20  # bytes beside the tensors: headers, state, manifest, pointers


# ---- one checkpoint -------------------------------------------------------------------------------------------------


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
    """Write RUN/checkpoints/step-XXXXXXXX, durable and read back when this returns. Equal values give equal bytes.

    A whole checkpoint of the same step is replaced; a damaged one is kept aside, never deleted.

    Args:
        run: the run directory.
        tensors: file name without ending -> tensors; empty ones are left out.
        state: JSON values, among them "step" and "epoch".

    Raises:
        UserError: it cannot be written (disk full, no permission), or what was read back is not what was written.
    """
    assert all(fits(state.get(key)) for key, fits in NAMED.items()), "a state names its step and epoch"
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    make_folder(folder.parent)
    temporary = temporary_sibling(folder)
    try:
        _require_room(folder.parent, tensors)
        sha256 = _write_files(temporary, tensors, state)
        _put_in_place(temporary, folder)
    except OSError as error:
        raise UserError(
            f"The checkpoint {folder} cannot be written ({error.strerror or error}). Make room or repair the disk; "
            "what was saved before stays."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(folder, state, sha256)


def _require_room(folder: Path, tensors: dict[str, Tensors]) -> None:
    needed = _MARGIN + sum(value.nbytes for values in tensors.values() for value in values.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")


def _write_files(folder: Path, tensors: dict[str, Tensors], state: dict[str, Any]) -> dict[str, str]:
    """Make `folder` with all files of a checkpoint, durable and read back; the sha256 of each but the manifest."""
    folder.mkdir()
    manifest = {}
    for name, values in tensors.items():
        if values:
            # A clone each: safetensors refuses tensors that share memory, such as tied weights.
            plain = {
                key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in values.items()
            }
            # One metadata key at most: several would be written in random order and break bit equality. As bytes, so
            # that the hash is that of what was meant, and an error of the disk keeps its number.
            content = save(plain, metadata={"format": "pt"})
            manifest[f"{name}.safetensors"] = _write(folder / f"{name}.safetensors", content)
    manifest[STATE] = _write(folder / STATE, json_bytes(state))
    manifest = dict(sorted(manifest.items()))
    _write(folder / MANIFEST, json_bytes(manifest))
    fsync_folder(folder)
    try:
        return _inspect(folder, NAMED).sha256
    except DamagedError as damage:
        raise OSError(errno.EIO, f"what was read back is not what was written: {damage}") from damage


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write `content` durably; its entry in the manifest."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else it would be read back from memory and not from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename, durably. Killed between the two renames, `recover` puts back what was there."""
    aside = None
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.replaced-{uuid.uuid4().hex[:8]}")
        os.replace(folder, aside)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)
    if aside is not None and is_whole(aside):
        remove_checkpoint(aside, folder)


def remove_checkpoint(path: Path, folder: Path) -> None:
    """Remove `path`, a checkpoint that is or was `folder`: never half there under a name that counts."""
    temporary = temporary_sibling(folder)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # what stays is taken away at the next start


class DamagedError(Exception):
    """What is wrong with a checkpoint, as the end of a sentence."""


def open_checkpoint(folder: Path, required: Required = NAMED) -> Checkpoint:
    """Verify size and sha256 of every file, then the state.

    Args:
        required: keys that the state must have -> whether a value is of the right kind.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    try:
        return open_verified(folder, required)
    except DamagedError as damage:
        raise UserError(f"The checkpoint {folder} is damaged: {damage}.") from damage


def open_verified(folder: Path, required: Required) -> Checkpoint:
    checkpoint = _inspect(folder, required)
    if folder.name != f"step-{checkpoint.step:08d}":
        raise DamagedError(f"{STATE} is that of step {checkpoint.step}")
    return checkpoint


def _inspect(folder: Path, required: Required) -> Checkpoint:
    manifest = _read_object(folder / MANIFEST)
    for name, entry in manifest.items():
        if not _FILE.fullmatch(name):
            raise DamagedError(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
        _verify(folder / name, entry)
    if STATE not in manifest:
        raise DamagedError(f"{MANIFEST} does not name {STATE}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest:
            raise DamagedError(f"{MANIFEST} does not name {path.name}")
    state = _read_object(folder / STATE)
    for key, fits in required.items():
        if key not in state:
            raise DamagedError(f"{STATE} has no '{key}'")
        if not fits(state[key]):
            raise DamagedError(f"'{key}' in {STATE} is {_short(state[key])}")
    return Checkpoint(folder, state, {name: entry["sha256"] for name, entry in manifest.items()})


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _verify(path: Path, entry: object) -> None:
    """Compare `path` with its `entry` in the manifest."""
    if not path.is_file():
        raise DamagedError(f"{path.name} is missing")
    try:
        same = (
            isinstance(entry, dict)
            and path.stat().st_size == entry.get("bytes")
            and sha256_of(path) == entry.get("sha256")
        )
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from error
    if not same:
        raise DamagedError(f"{path.name} does not match its size and sha256")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DamagedError(f"{path.name} is missing")
    try:
        return read_json(path, "file")
    except UserError as error:
        raise DamagedError(f"{path.name} cannot be read as a JSON object") from error


def is_whole(folder: Path) -> bool:
    try:
        _inspect(folder, NAMED)
    except DamagedError:
        return False
    return True
