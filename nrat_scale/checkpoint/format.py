"""One checkpoint folder: write, verify, read.

A save writes a temporary sibling, fsyncs it, reads it back against the hashes of the intended bytes, and renames it. The
rename is the commit: a process killed before it leaves a temporary folder that `recover` removes.
"""

import errno
import json
import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from nrat_scale.checkpoint.state import NAMED, SCHEMA, Required, Tensors, schema_mismatch
from nrat_scale.core import files
from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.run_folder import RunFolder

STATE = "state.json"
_FILE = re.compile(r"\w+\.safetensors|state\.json", re.ASCII)  # a manifest must not name files outside its folder
_OVERHEAD_BYTES = 1 << 20  # headers, state, manifest, pointers


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
        """The weights to evaluate and release: `ema` if the run has an EMA, else `model`."""
        return "ema" if "ema.safetensors" in self.sha256 else "model"

    def tensors(self, name: str) -> Tensors:
        """The tensors of `name`.safetensors; empty if the checkpoint has no such file."""
        path = self.folder / f"{name}.safetensors"
        if path.name not in self.sha256:
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}).") from error


def save_checkpoint(run: Path, tensors: dict[str, Tensors], state: dict[str, Any]) -> Checkpoint:
    """Write RUN/checkpoints/step-XXXXXXXX; it is durable and verified on return. Equal values give equal bytes.

    An intact checkpoint of the same step is replaced; a damaged one is renamed and kept.

    Args:
        run: the run directory.
        tensors: file name without suffix -> tensors; empty groups are not written.
        state: JSON values, among them "step" and "epoch".

    Raises:
        UserError: it cannot be written (disk full, no permission), or reads back differently.
    """
    assert all(fits(state.get(key)) for key, fits in NAMED.items()), "state must contain step and epoch"
    state = {**state, "schema": SCHEMA}
    folder = RunFolder(run).checkpoint(state["step"])
    files.make_folder(folder.parent)
    temporary = files.temporary_sibling(folder)
    try:
        needed = _OVERHEAD_BYTES + sum(value.nbytes for values in tensors.values() for value in values.values())
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        sha256 = _write_files(temporary, tensors, state)
        _put_in_place(temporary, folder)
    except OSError as error:
        why = f"The checkpoint {folder} cannot be written ({error.strerror or error})."
        raise UserError(f"{why} Free space or replace the disk; earlier checkpoints are intact.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(folder, state, sha256)


def _write_files(folder: Path, tensors: dict[str, Tensors], state: dict[str, Any]) -> dict[str, str]:
    """Create `folder` with all files of a checkpoint, durable and verified; returns the sha256 of each but the manifest."""
    folder.mkdir()
    manifest = {
        f"{name}.safetensors": _write(folder / f"{name}.safetensors", _serialised(values))
        for name, values in tensors.items()
        if values
    }
    manifest[STATE] = _write(folder / STATE, json_bytes(state))
    _write(folder / files.MANIFEST, json_bytes(manifest))
    files.fsync_folder(folder)
    try:
        return _verified(folder).sha256
    except DamagedError as damage:
        raise OSError(errno.EIO, f"the files read back differ from what was written: {damage}") from damage


def _serialised(values: Tensors) -> bytes:
    # safetensors refuses tensors that share memory, such as tied weights: clone each.
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in values.items()}
    # Serialise in memory: hash the intended bytes, and let OSError keep its errno. One metadata key at most: safetensors
    # writes several in random order, and equal values must give equal bytes.
    return save(plain, metadata={"format": "pt"})


def json_bytes(value: dict[str, Any]) -> bytes:
    """Reproducible JSON. NaN and infinity raise ValueError."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write `content` durably; returns its manifest entry."""
    files.write_durably(path, content)
    with open(path, "rb") as file:  # drop the cached pages, so that verification reads from the disk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files.manifest_entry(content)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename durably. If the process is killed between the two renames, `recover` restores the replaced checkpoint."""
    replaced = folder.with_name(f".{folder.name}.replaced-{uuid.uuid4().hex[:8]}")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    files.fsync_folder(folder.parent)
    if is_intact(replaced):
        remove_checkpoint(replaced, folder)


def remove_checkpoint(path: Path, folder: Path) -> None:
    """Remove `path`, which is or was the checkpoint `folder`, under a temporary name: no reader sees half of it."""
    temporary = files.temporary_sibling(folder)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # `recover` removes the rest at the next start


class DamagedError(Exception):
    """What is wrong with a checkpoint, as the end of a sentence."""


def open_checkpoint(folder: Path, required: Required = NAMED) -> Checkpoint:
    """Verify size and sha256 of every file, and the `required` entries of the state.

    Raises:
        UserError: a file is missing or damaged, or the state is of another schema.
    """
    try:
        checkpoint = _verified(folder)
        if mismatch := schema_mismatch(checkpoint.state, required):
            why = f"The checkpoint {folder} has another schema: {mismatch}."
            raise UserError(f"{why} Use the version of nrat_scale that wrote it.")
        if folder.name != f"step-{checkpoint.step:08d}":
            raise DamagedError(f"{STATE} is that of step {checkpoint.step}")
    except DamagedError as damage:
        raise UserError(f"The checkpoint {folder} is damaged: {damage}.") from damage
    return checkpoint


def is_intact(folder: Path) -> bool:
    """Whether every file matches the manifest; neither the folder's name nor the state is checked."""
    with suppress(DamagedError):
        _verified(folder)
        return True
    return False


def _verified(folder: Path) -> Checkpoint:
    manifest = _read_object(folder / files.MANIFEST)
    for name, entry in manifest.items():
        if not _FILE.fullmatch(name):
            raise DamagedError(f"{files.MANIFEST} names {quoted(name)}, which is not a file of a checkpoint")
        if mismatch := files.manifest_mismatch(folder / name, entry):
            raise DamagedError(mismatch)
    unnamed = {STATE, *(path.name for path in folder.glob("*.safetensors"))} - manifest.keys()
    if unnamed:
        raise DamagedError(f"{files.MANIFEST} does not name {min(unnamed)}")
    return Checkpoint(folder, _read_object(folder / STATE), {name: entry["sha256"] for name, entry in manifest.items()})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return files.read_json(path, "file")
    except UserError as error:
        raise DamagedError(f"{path.name} is missing or not a JSON object") from error
