"""Save checkpoints in a background thread while training continues."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nrat_scale.checkpoint.folder import prune, queue_release, write_pointer
from nrat_scale.checkpoint.format import json_bytes, save_checkpoint
from nrat_scale.checkpoint.state import Tensors
from nrat_scale.core.errors import UserError, warn

# Transient errors that must not end a run: disk full, quota exceeded, I/O error, and a limit on the size of files.
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class Saver:
    """Saves the checkpoints of a run while it trains. Create one, on the main process, after `recover`.

    A thread writes the checkpoint, verifies it, moves the pointers and removes old checkpoints, in this order. At most one
    save is in progress: the next waits for it before it copies, so host memory holds one copy of the tensors.

    A save that fails with ENOSPC, EDQUOT, EIO or EFBIG is a warning and does not end the run; earlier checkpoints and
    pointers stay. If saving a best checkpoint fails, its copy stays in memory and is retried before the next save. The next
    `save` or `wait` raises any other error.

    As a context manager it waits at the end; an error of the block takes precedence over one of the thread.

    Args:
        run: the run directory.
        keep: how many of the newest checkpoints to keep, besides best and last.
        queue_every: queue the evaluated weights of every so many epochs for a release (`queue_release`); a failure there is
            only a warning.
    """

    def __init__(self, run: Path, keep: int, queue_every: int | None = None) -> None:
        self.run, self.keep, self.queue_every = run, keep, queue_every
        self._thread: threading.Thread | None = None
        self._good_until: int | None = None
        self._error: BaseException | None = None
        self._missed: UserError | None = None  # why the last save is not on disk
        self._unsaved_best: tuple[dict[str, Tensors], dict[str, Any]] | None = None

    def save(
        self,
        tensors: dict[str, Tensors],
        state: dict[str, Any],
        best: bool,
        selected: bool = True,
        final: bool = False,
        good_until: int | None = None,
    ) -> None:
        """Copy `tensors` and `state` and save them in the background.

        Args:
            tensors, state: see `save_checkpoint`. The caller may change both after the return.
            best: point best.json to this checkpoint too.
            selected: false if no validation has chosen it.
            final: return only when the checkpoint is durable.
            good_until: see `prune`.

        Raises:
            UserError: the previous save failed with an error that is not transient; with `final`, this save failed.
        """
        self.wait()
        # "pointer" is for `recover`, which completes the pointers of a killed save.
        self._good_until = good_until
        copied = json.loads(json_bytes({**state, "pointer": {"best": best, "selected": selected}}))
        # Not a daemon: a process that exits with an error still finishes the save in progress.
        self._thread = threading.Thread(target=self._work, args=(_to_host(tensors), copied), name="checkpoint")
        self._thread.start()
        if final:
            self.wait(final=True)

    def wait(self, final: bool = False) -> None:
        """Return when every save is durable or has been warned about; raises as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        if final and self._missed is not None:
            raise self._missed

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait(final=True)
        except Exception as failed:
            if error is None:
                raise
            warn(str(failed))

    def _work(self, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        try:
            self._missed = None
            delayed, self._unsaved_best = self._unsaved_best, None
            if delayed is not None and not state["pointer"]["best"]:
                self._commit_or_warn(*delayed, last=False)  # a delayed best checkpoint must not overwrite last.json
            self._commit_or_warn(tensors, state, last=True)
        except BaseException as error:
            self._error = error

    def _commit_or_warn(self, tensors: dict[str, Tensors], state: dict[str, Any], last: bool) -> None:
        epoch, pointer = state["epoch"], state["pointer"]
        try:
            checkpoint = save_checkpoint(self.run, tensors, state)
            if pointer["best"]:
                write_pointer(self.run, "best", checkpoint, selected=pointer["selected"])
            if last:
                write_pointer(self.run, "last", checkpoint)
            if self.queue_every is not None and epoch % self.queue_every == 0 and state.get("whole_epoch"):
                try:
                    queue_release(self.run, checkpoint)
                except (UserError, OSError) as error:
                    warn(f"The weights of epoch {epoch} are not queued for a release: {error}")
            prune(self.run, self.keep, self._good_until)
        except UserError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _TRANSIENT:
                raise
            self._missed = error
            self._unsaved_best = (tensors, state) if pointer["best"] else self._unsaved_best
            warn(f"{error} Training continues without the checkpoint of step {state['step']}.")


def _to_host(tensors: dict[str, Tensors]) -> dict[str, Tensors]:
    """Copies of all tensors in host memory (pinned if from CUDA), complete on return; the transfers overlap."""

    def copy(value: Tensor) -> Tensor:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return host.copy_(value.detach(), non_blocking=True)

    copies = {name: {key: copy(value) for key, value in values.items()} for name, values in tensors.items()}
    for device in {value.device for values in tensors.values() for value in values.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies
