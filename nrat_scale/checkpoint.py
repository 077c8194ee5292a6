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
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nrat_scale.errors import UserError
from nrat_scale.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json

Tensors = dict[str, Tensor]
MANIFEST, STATE = "manifest.json", "state.json"
POINTERS = ("best", "last")
_FILE = re.compile(r"\w+\.safetensors|state\.json", re.ASCII)  # what a manifest may name: nothing outside the folder
_STEP = r"step-[0-9]{8}"
_TEMPORARY = re.compile(rf"\.({_STEP}|(best|last)\.json)\.[0-9a-f]{{12}}\.tmp")
_REPLACED = re.compile(rf"\.({_STEP})\.replaced-[0-9a-f]{{8}}")
# What a run outlives: no room, or a disk that fails just now. EFBIG is what a limit on the size of files gives.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
_MARGIN = 1 << 20  # bytes beside the tensors: headers, state, manifest, pointers


# ---- what a state.json must hold ------------------------------------------------------------------------------------


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_rows(value: object) -> bool:
    """Numbers of each process."""

    def numbers(row: object) -> bool:
        return isinstance(row, list) and all(type(number) in (int, float) for number in row)

    return isinstance(value, list) and len(value) > 0 and all(numbers(row) for row in value)


def _is_selection(value: object) -> bool:
    """None before the first validation, else its row."""
    if value is None:
        return True
    robust = value.get("robust") if isinstance(value, dict) else None
    return isinstance(robust, dict) and _is_count(robust.get("correct"))


Required = dict[str, Callable[[object], bool]]
NAMED: Required = {"step": _is_count, "epoch": _is_count}  # for evaluation and release
RESUMED: Required = NAMED | {  # what training goes on from
    "best": _is_selection,
    "validation_due": lambda value: isinstance(value, bool),
    "metrics_lines": _is_count,
    "sums": _are_rows,
    "guard": lambda value: isinstance(value, dict),
    "guard_sums": _are_rows,
    "scaler": lambda value: value is None or isinstance(value, dict),
}


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
    manifest[STATE] = _write(folder / STATE, _json(state))
    manifest = dict(sorted(manifest.items()))
    _write(folder / MANIFEST, _json(manifest))
    fsync_folder(folder)
    try:
        return _inspect(folder, NAMED).sha256
    except _DamagedError as damage:
        raise OSError(errno.EIO, f"what was read back is not what was written: {damage}") from damage


def _json(value: dict[str, Any]) -> bytes:
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
    if aside is not None and _is_whole(aside):
        _remove(aside, folder)


def _remove(path: Path, folder: Path) -> None:
    """Remove `path`, a checkpoint that is or was `folder`: never half there under a name that counts."""
    temporary = temporary_sibling(folder)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # what stays is taken away at the next start


class _DamagedError(Exception):
    """What is wrong with a checkpoint, as the end of a sentence."""


def open_checkpoint(folder: Path, required: Required = NAMED) -> Checkpoint:
    """Verify size and sha256 of every file, then the state.

    Args:
        required: keys that the state must have -> whether a value is of the right kind.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    try:
        return _opened(folder, required)
    except _DamagedError as damage:
        raise UserError(f"The checkpoint {folder} is damaged: {damage}.") from damage


def _opened(folder: Path, required: Required) -> Checkpoint:
    checkpoint = _inspect(folder, required)
    if folder.name != f"step-{checkpoint.step:08d}":
        raise _DamagedError(f"{STATE} is that of step {checkpoint.step}")
    return checkpoint


def _inspect(folder: Path, required: Required) -> Checkpoint:
    manifest = _read_object(folder / MANIFEST)
    for name, entry in manifest.items():
        if not _FILE.fullmatch(name):
            raise _DamagedError(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
        _verify(folder / name, entry)
    if STATE not in manifest:
        raise _DamagedError(f"{MANIFEST} does not name {STATE}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest:
            raise _DamagedError(f"{MANIFEST} does not name {path.name}")
    state = _read_object(folder / STATE)
    for key, fits in required.items():
        if key not in state:
            raise _DamagedError(f"{STATE} has no '{key}'")
        if not fits(state[key]):
            raise _DamagedError(f"'{key}' in {STATE} is {_short(state[key])}")
    return Checkpoint(folder, state, {name: entry["sha256"] for name, entry in manifest.items()})


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _verify(path: Path, entry: object) -> None:
    """Compare `path` with its `entry` in the manifest."""
    if not path.is_file():
        raise _DamagedError(f"{path.name} is missing")
    try:
        same = (
            isinstance(entry, dict)
            and path.stat().st_size == entry.get("bytes")
            and sha256_of(path) == entry.get("sha256")
        )
    except OSError as error:
        raise _DamagedError(f"{path.name} cannot be read ({error.strerror})") from error
    if not same:
        raise _DamagedError(f"{path.name} does not match its size and sha256")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _DamagedError(f"{path.name} is missing")
    try:
        return read_json(path, "file")
    except UserError as error:
        raise _DamagedError(f"{path.name} cannot be read as a JSON object") from error


def _is_whole(folder: Path) -> bool:
    try:
        _inspect(folder, NAMED)
    except _DamagedError:
        return False
    return True


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
            elif replaced and not (folder / replaced[1]).exists() and _is_whole(path):
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
        or not all(_is_count(pointer[key]) for key in ("step", "epoch"))
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
        checkpoint = _opened(folder, NAMED)
    except _DamagedError as damage:
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
                _remove(folder, folder)
            except OSError as error:
                raise UserError(f"The old checkpoint {folder} cannot be removed ({error.strerror}).") from error
    return []


# ---- saving beside training -----------------------------------------------------------------------------------------


def to_host(tensors: dict[str, Tensors]) -> dict[str, Tensors]:
    """Copies in host memory, complete when this returns: clones, from CUDA into pinned memory, all transfers at once."""
    copies = {name: {key: _copy(value.detach()) for key, value in values.items()} for name, values in tensors.items()}
    devices = {value.device for values in tensors.values() for value in values.values() if value.is_cuda}
    for device in devices:
        with torch.cuda.device(device):
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
    return copies


def _copy(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value.to("cpu", copy=True)
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _print_warning(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Save:
    tensors: dict[str, Tensors]
    state: dict[str, Any]
    best: bool
    selected: bool


class Saver:
    """Saves a run's checkpoints beside its training. One process of a run has one, made after `recover`.

    A thread writes, reads back, moves the pointers and removes old checkpoints, in this order. At most one save is under
    way: the next waits for its end before it copies, so one copy of the tensors is held in host memory.

    A save that finds no room (or a disk that fails: ENOSPC, EDQUOT, EIO, EFBIG) does not end the run: it is told to
    `warn`, and the checkpoints and pointers from before stay. If it was a best one its copy is kept, and written before
    the next save: else the selected weights would be lost. Everything else is raised by the next `save` or `wait`.

    As a context manager it waits at the end; an error of the block goes before one of the thread.

    Args:
        run: the run directory.
        keep: how many of the newest checkpoints stay; best and last always do.
        warn: takes a sentence. It is called from the thread.
        queue_every: put the evaluated weights of every so many epochs aside for a release (`queue_release`); what goes wrong
            there is told and costs nothing else.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        warn: Callable[[str], None] = _print_warning,
        queue_every: int | None = None,
    ) -> None:
        self.run, self.keep, self.warn, self.queue_every = run, keep, warn, queue_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._missed: UserError | None = None  # why the last save is not on the disk, if it is not
        self._unsaved_best: _Save | None = None

    def save(
        self,
        tensors: dict[str, Tensors],
        state: dict[str, Any],
        best: bool,
        selected: bool = True,
        *,
        final: bool = False,
    ) -> None:
        """Copy `tensors` and `state`, and return; with `final`, only once they are durable.

        Args:
            tensors, state: see `save_checkpoint`. Neither is looked at after the return.
            best: let best.json name it too.
            selected: false where no validation has chosen it.

        Raises:
            UserError: the save before could not be done, for another reason than room; with `final`, this one, for any.
        """
        self.wait()
        # As it will be read, and with what `recover` needs to complete the pointers.
        copied = json.loads(_json({**state, "pointer": {"best": best, "selected": selected}}))
        job = _Save(to_host(tensors), copied, best, selected)
        # Not a daemon: a process that ends by an error still finishes the save that is under way.
        self._thread = threading.Thread(target=self._work, args=(job,), name="checkpoint")
        self._thread.start()
        if final:
            self.wait(final=True)

    def wait(self, final: bool = False) -> None:
        """Return when everything that was saved is durable, or was warned of.

        Raises:
            UserError: see `save`; with `final`, also where the last save or a best one found no room.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        if final and self._missed is not None:
            raise self._missed

    def close(self) -> None:
        """`wait(final=True)`: nothing is lost unseen."""
        self.wait(final=True)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            self.warn(str(failed))

    def _work(self, job: _Save) -> None:
        try:
            self._missed = None
            waiting, self._unsaved_best = self._unsaved_best, None
            if waiting is not None and not job.best:
                self._commit_or_warn(waiting, last=False)
            self._commit_or_warn(job, last=True)
        except BaseException as error:
            self._error = error

    def _commit_or_warn(self, job: _Save, last: bool) -> None:
        try:
            sentences: Iterable[str] = self._commit(job, last)
        except UserError as error:
            if not _passes(error):
                raise
            self._missed = error
            self._unsaved_best = job if job.best else self._unsaved_best
            sentences = [f"{error} The run goes on without the checkpoint of step {job.state['step']}."]
        for sentence in sentences:
            self.warn(sentence)

    def _commit(self, job: _Save, last: bool) -> list[str]:
        checkpoint = save_checkpoint(self.run, job.tensors, job.state)
        # A best one that comes late is not the last one.
        if job.best:
            write_pointer(self.run, "best", checkpoint, selected=job.selected)
        if last:
            write_pointer(self.run, "last", checkpoint)
        queued = [] if self.queue_every is None else self._queue(checkpoint, self.queue_every)
        return [*queued, *prune(self.run, self.keep)]

    def _queue(self, checkpoint: Checkpoint, every: int) -> list[str]:
        # A checkpoint within an epoch is not that epoch's.
        if checkpoint.state["epoch"] % every or not checkpoint.state.get("whole_epoch"):
            return []
        try:
            queue_release(self.run, checkpoint)
        except (UserError, OSError) as error:
            return [f"The weights of epoch {checkpoint.state['epoch']} are not put aside for a release: {error}"]
        return []


def _passes(error: UserError) -> bool:
    """Whether a later save may go well."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING


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
    for name, value in tensors.items():  # all of them before the first is used
        parameter = parameters.get(name.rpartition("/")[0])
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise UserError(f"The checkpoint's optimizer state '{name}' does not fit the model.")
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # Adam counts its steps in a scalar of its own type; everything else is like its parameter, in its memory format
        # too: fused optimizers go through both side by side.
        scalar = value.ndim == 0 and parameter.ndim > 0
        like = torch.empty_like(parameter.detach())
        optimizer.state[parameter][key] = value.to(parameter.device) if scalar else like.copy_(value)
