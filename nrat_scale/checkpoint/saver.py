"""Save checkpoints in a background thread while training continues."""

import errno
import json
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nrat_scale.checkpoint.folder import prune, queue_release, write_pointer
from nrat_scale.checkpoint.format import Checkpoint, json_bytes, save_checkpoint
from nrat_scale.checkpoint.state import Tensors
from nrat_scale.core.errors import UserError

# What a run outlives: no room, or a disk that fails just now. EFBIG is what a limit on the size of files gives.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


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
        copied = json.loads(json_bytes({**state, "pointer": {"best": best, "selected": selected}}))
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
