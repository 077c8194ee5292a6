"""The checkpoints of a run: newest, pointers, pruning, recovery after a kill, the release queue."""

import os
import re
import shutil
import uuid
from pathlib import Path

from nrat_scale.checkpoint.format import (
    STEP_NAME,
    Checkpoint,
    DamagedError,
    is_whole,
    open_checkpoint,
    open_verified,
    remove_checkpoint,
)
from nrat_scale.checkpoint.state import NAMED, RESUMED, is_count
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json

POINTERS = ("best", "last")
_TEMPORARY = re.compile(rf"\.({STEP_NAME}|(best|last)\.json)\.[0-9a-f]{{12}}\.tmp")
_REPLACED = re.compile(rf"\.({STEP_NAME})\.replaced-[0-9a-f]{{8}}")


# ---- the checkpoints of a run ---------------------------------------------------------------------------------------


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
    """The newest checkpoint that training can go on from, and one sentence for each newer one that is damaged.

    Raises:
        UserError: there are checkpoints, but not one of them is whole.
    """
    damaged: list[str] = []
    for folder in checkpoint_folders(run):
        try:
            return open_checkpoint(folder, RESUMED), damaged
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"No checkpoint of {run} is whole. {damaged[0]} Start again with another run_dir.")
    return None, []


def recover(run: Path) -> None:
    """Bring a run whose process was killed into the state of one that was not; call it before anything is read.

    Temporary siblings of killed saves are removed, a whole checkpoint that was about to be replaced is put back, and the
    pointers of a finished save are completed. Nothing else is touched. No other process may be writing this run.

    Raises:
        UserError: something cannot be removed or written, or no checkpoint is whole.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return
    try:
        for path in sorted(folder.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif replaced and not (folder / replaced[1]).exists() and is_whole(path):
                os.replace(path, folder / replaced[1])
        fsync_folder(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be tidied up ({error}). Change its permissions, and start again.") from error
    _complete_pointers(run)


def _complete_pointers(run: Path) -> None:
    """Write what a save that was killed after its rename had still to write."""
    folders = checkpoint_folders(run)
    try:
        if not folders or _pointed(run, "last")[0] == folders[0]:
            return
    except UserError:  # absent or damaged: written anew
        pass
    checkpoint, _ = newest_checkpoint(run)
    if checkpoint is None:
        return
    selection = checkpoint.state.get("pointer")
    if isinstance(selection, dict) and selection.get("best") is True:
        write_pointer(run, "best", checkpoint, selected=selection.get("selected") is not False)
    write_pointer(run, "last", checkpoint)


def write_pointer(run: Path, name: str, checkpoint: Checkpoint, *, selected: bool = True) -> None:
    """Let best.json or last.json name `checkpoint`; `selected` is false where no validation has chosen it."""
    pointer = {"step": checkpoint.step, "epoch": checkpoint.state["epoch"], "folder": checkpoint.folder.name}
    write_json(run / "checkpoints" / f"{name}.json", pointer if selected else {**pointer, "selected": False})


def _pointed(run: Path, name: str) -> tuple[Path, int]:
    """The folder and the epoch that best.json or last.json names; whether it is there was not looked at.

    Raises:
        UserError: there is no pointer, or it is damaged.
    """
    path = run / "checkpoints" / f"{name}.json"
    pointer = read_json(path, f"pointer to the {name} checkpoint")
    step, folder = pointer.get("step"), pointer.get("folder")
    if (
        not {"step", "epoch", "folder"} <= pointer.keys() <= {"step", "epoch", "folder", "selected"}
        or not all(is_count(pointer[key]) for key in ("step", "epoch"))
        or folder != f"step-{step:08d}"  # said twice, so that no other folder is taken for it
        or not isinstance(pointer.get("selected", False), bool)
    ):
        raise UserError(f"The pointer {path} is damaged: it does not name one step, its epoch and its folder.")
    return run / "checkpoints" / folder, pointer["epoch"]


def named_checkpoint(run: Path, name: str) -> Checkpoint:
    """The checkpoint that best.json or last.json names, verified.

    Raises:
        UserError: there is none, or the pointer or the checkpoint is damaged.
    """
    path = run / "checkpoints" / f"{name}.json"
    if not path.is_file():
        raise UserError(f"The run {run} has no '{name}' checkpoint yet (no {path}). Train it first.")
    folder, epoch = _pointed(run, name)
    if not folder.is_dir():
        raise UserError(f"{path} names the checkpoint '{folder.name}', which is not there.")
    try:
        checkpoint = open_verified(folder, NAMED)
    except DamagedError as damage:
        raise UserError(f"The '{name}' checkpoint of {run}, {folder.name}, is damaged: {damage}.") from damage
    if checkpoint.state["epoch"] != epoch:
        raise UserError(f"The pointer {path} is damaged: {folder.name} is of epoch {checkpoint.state['epoch']}.")
    return checkpoint


def prune(run: Path, keep: int) -> list[str]:
    """Remove old checkpoints: all but the `keep` newest (one at least) and those that best.json and last.json name.

    Newer ones than last.json names are those that a run has gone back from: they neither count nor are removed. With a
    damaged pointer it is not known what it protects, so nothing is removed.

    Returns:
        One sentence for each damaged pointer.

    Raises:
        UserError: an old checkpoint cannot be removed.
    """
    wanted, damaged = {}, []
    for name in POINTERS:
        if (run / "checkpoints" / f"{name}.json").exists():
            try:
                wanted[name] = _pointed(run, name)[0].name
            except UserError as error:
                damaged.append(f"{error} No old checkpoint is removed.")
    if damaged:
        return damaged
    folders = [folder for folder in checkpoint_folders(run) if folder.name <= wanted.get("last", "step-99999999")]
    for folder in folders[max(1, keep) :]:
        if folder.name not in wanted.values():
            try:
                remove_checkpoint(folder, folder)
            except OSError as error:
                raise UserError(f"The old checkpoint {folder} cannot be removed ({error.strerror}).") from error
    return []


# ---- weights put aside for a release -----------------------------------------------------------------------------------


QUEUE = "releases"


def queue_release(run: Path, checkpoint: Checkpoint) -> Path:
    """Copy the evaluated weights of a verified checkpoint to `run/releases/epoch-NNNN/`, whole or not at all.

    A folder that is there already is left as it is. Beside `model.safetensors` lies `queued.json`: step, epoch, whether it
    is the EMA, sha256.

    Raises:
        UserError, OSError: it cannot be written, or is not what was saved.
    """
    name = f"{checkpoint.evaluated}.safetensors"
    folder = run / QUEUE / f"epoch-{checkpoint.state['epoch']:04d}"
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    staged = temporary_sibling(folder)
    try:
        staged.mkdir()
        shutil.copyfile(checkpoint.folder / name, staged / "model.safetensors")
        with open(staged / "model.safetensors", "rb+") as file:
            os.fsync(file.fileno())
        if sha256_of(staged / "model.safetensors") != checkpoint.sha256[name]:
            raise UserError(f"{checkpoint.folder / name} could not be copied: other bytes arrived.")
        facts = {"step": checkpoint.step, "epoch": checkpoint.state["epoch"], "weights": checkpoint.evaluated}
        write_json(staged / "queued.json", {**facts, "sha256": checkpoint.sha256[name]})
        os.replace(staged, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder
