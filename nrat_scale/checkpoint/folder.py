"""The checkpoints of a run: newest, pointers, pruning, recovery after a kill, the release queue."""

import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from nrat_scale.checkpoint.format import Checkpoint, is_intact, open_checkpoint, remove_checkpoint
from nrat_scale.checkpoint.state import RESUMED, is_count
from nrat_scale.core.errors import UserError, missing_folder, warn
from nrat_scale.core.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json
from nrat_scale.core.run_folder import QUEUED, RunFolder

_TEMPORARY = re.compile(r"\.(step-[0-9]{8}|(best|last)\.json)\.[0-9a-f]{12}\.tmp")
_REPLACED = re.compile(r"\.(step-[0-9]{8})\.replaced-[0-9a-f]{8}")


def checkpoint_folders(run: Path) -> list[Path]:
    """All checkpoints of a run, newest first."""
    return sorted(RunFolder(run).checkpoints.glob("step-" + "[0-9]" * 8), reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def set_aside(run: Path, after: int) -> None:
    """Rename the checkpoints of steps later than `after` to hidden names that nothing reads; nothing is deleted."""
    for folder in checkpoint_folders(run):
        if step_of(folder) > after:
            os.replace(folder, folder.with_name(f".{folder.name}.collapsed-{uuid.uuid4().hex[:8]}"))
    fsync_folder(RunFolder(run).checkpoints)


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that training can resume from, and one sentence for each newer one that it cannot.

    Raises:
        UserError: the run has checkpoints, but training can resume from none of them.
    """
    refused: list[str] = []
    for folder in checkpoint_folders(run):
        try:
            return open_checkpoint(folder, RESUMED), refused
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError(f"{run} cannot be resumed from any checkpoint. {refused[0]} Or start with another run_dir.")
    return None, []


def recover(run: Path) -> None:
    """Clean up after a killed process: call it before anything is read, while no other process writes this run.

    Removes the temporary files of unfinished saves, restores an intact checkpoint that was about to be replaced, and writes
    the pointers that a committed save did not reach. Other files stay.

    Raises:
        UserError: something cannot be removed or written, or training can resume from no checkpoint.
    """
    folder = RunFolder(run).checkpoints
    if not folder.is_dir():
        return
    try:
        for path in sorted(folder.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif replaced and not (folder / replaced[1]).exists() and is_intact(path):
                os.replace(path, folder / replaced[1])
        fsync_folder(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be cleaned up ({error}). Change its permissions and start again.") from error
    folders = checkpoint_folders(run)
    with suppress(UserError):  # last.json is missing or damaged: write it
        if not folders or _read_pointer(run, "last")[0] == folders[0]:
            return
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint is not None
    save = checkpoint.state.get("pointer")  # written by `Saver`
    if isinstance(save, dict) and save.get("best") is True:
        write_pointer(run, "best", checkpoint, selected=save.get("selected") is not False)
    write_pointer(run, "last", checkpoint)


def write_pointer(run: Path, name: str, checkpoint: Checkpoint, *, selected: bool = True) -> None:
    """Point best.json or last.json to `checkpoint`; `selected` is false if no validation has chosen it."""
    pointer = {"step": checkpoint.step, "epoch": checkpoint.state["epoch"], "folder": checkpoint.folder.name}
    write_json(RunFolder(run).pointer(name), pointer if selected else {**pointer, "selected": False})


def _read_pointer(run: Path, name: str) -> tuple[Path, int]:
    """The folder and the epoch that best.json or last.json names; the folder may not exist."""
    path = RunFolder(run).pointer(name)
    pointer = read_json(path, f"pointer to the {name} checkpoint")
    if (
        not {"step", "epoch", "folder"} <= pointer.keys() <= {"step", "epoch", "folder", "selected"}
        or not all(is_count(pointer[key]) for key in ("step", "epoch"))
        or not isinstance(pointer.get("selected", False), bool)
        # Redundant: a flipped digit in the pointer must not select another checkpoint.
        or pointer["folder"] != RunFolder(run).checkpoint(pointer["step"]).name
    ):
        raise UserError(f"The pointer {path} is damaged: it does not name one step, its epoch and its folder.")
    return RunFolder(run).checkpoint(pointer["step"]), pointer["epoch"]


def named_checkpoint(run: Path, name: str) -> Checkpoint:
    """The verified checkpoint that best.json or last.json names; raises `UserError` if it is missing or damaged."""
    path = RunFolder(run).pointer(name)
    if not path.is_file():
        if not run.is_dir():
            raise UserError(missing_folder(run))
        raise UserError(f"The run {run} has no '{name}' checkpoint yet (no {path}). Train it first.")
    folder, epoch = _read_pointer(run, name)
    if not folder.is_dir():
        raise UserError(f"{path} names the checkpoint '{folder.name}', which does not exist.")
    checkpoint = open_checkpoint(folder)
    if checkpoint.state["epoch"] != epoch:
        raise UserError(f"The pointer {path} is damaged: {folder.name} is of epoch {checkpoint.state['epoch']}.")
    return checkpoint


def prune(run: Path, keep: int, good_until: int | None = None) -> None:
    """Remove old checkpoints: all but the `keep` newest (at least one) and those that best.json and last.json name.

    With `good_until` the newest one of a step up to it stays too, and that of step 0: a later collapse is rewound to them.
    Checkpoints newer than last.json are damaged; they are not counted in `keep` and not removed.
    If a pointer is damaged, its checkpoint is unknown: nothing is removed, with a warning.

    Raises:
        UserError: an old checkpoint cannot be removed.
    """
    named = {}
    for name in ("best", "last"):
        try:
            if RunFolder(run).pointer(name).exists():
                named[name] = _read_pointer(run, name)[0].name
        except UserError as error:
            warn(f"{error} No old checkpoint is removed.")
            return
    folders = [folder for folder in checkpoint_folders(run) if folder.name <= named.get("last", "step-99999999")]
    needed = set(named.values())
    if good_until is not None:
        good = [folder.name for folder in folders if step_of(folder) <= good_until]
        needed |= {*good[:1], RunFolder(run).checkpoint(0).name}
    for folder in folders[max(1, keep) :]:
        if folder.name not in needed:
            try:
                remove_checkpoint(folder, folder)
            except OSError as error:
                raise UserError(f"The old checkpoint {folder} cannot be removed ({error.strerror}).") from error


def queue_release(run: Path, checkpoint: Checkpoint) -> Path:
    """Copy the evaluated weights of a verified checkpoint to `run/releases/epoch-NNNN/`, atomically.

    The folder holds `model.safetensors` and `queued.json` (step, epoch, "ema" or "model", sha256). An existing folder is
    not changed.

    Raises:
        UserError, OSError: it cannot be written, or the copy differs from the checkpoint.
    """
    source = checkpoint.folder / f"{checkpoint.evaluated}.safetensors"
    sha256, epoch = checkpoint.sha256[source.name], checkpoint.state["epoch"]
    folder = RunFolder(run).release(epoch)
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    staged = temporary_sibling(folder)
    try:
        staged.mkdir()
        copy = staged / "model.safetensors"
        shutil.copyfile(source, copy)
        with open(copy, "rb+") as file:
            os.fsync(file.fileno())
        if sha256_of(copy) != sha256:
            raise UserError(f"{source} could not be copied: the copy has another sha256.")
        facts = {"step": checkpoint.step, "epoch": epoch, "weights": checkpoint.evaluated, "sha256": sha256}
        write_json(staged / QUEUED, facts)
        os.replace(staged, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder
