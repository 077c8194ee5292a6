"""Run the missing cells of a grid on this machine, each in a process of its own, or write a script that does."""

import errno
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from nrat_scale.core.errors import UserError, printable
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.reproduce.cells import FAILED, FINISHED, STARTED, Place
from nrat_scale.reproduce.table_text import counted

LOCK_VARIABLE = "NRAT_SCALE_CELL_LOCK"  # the descriptor of the claim, which the process of a cell inherits
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_DISK_FULL = os.strerror(errno.ENOSPC)
_LOG_BYTES = 4096  # of the end of a log, in which an error is searched


@dataclass
class Outcome:
    """What became of the cells of one invocation."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # key of the cell -> why
    busy: list[str] = field(default_factory=list)  # another invocation runs them

    @property
    def text(self) -> str:
        """The cells that are not finished, in sentences; empty if all are."""
        lines = [f"FAILED {key}: {error}" for key, error in self.failed.items()]
        if self.failed:
            lines.append(
                f"{counted(len(self.failed), 'cell')} failed. The same command tries them again; finished cells stay."
            )
        if self.busy:
            lines.append(
                f"{counted(len(self.busy), 'cell')} left to another process, which runs: {', '.join(self.busy)}."
            )
        return "\n".join(lines)


def run_local(places: Sequence[Place], command: Sequence[str]) -> Outcome:
    """Run the cells that are not finished, in order. Other invocations may do the same at the same time.

    A cell that another process has claimed is left to it, and looked at again at the end.

    Args:
        command: the command of a process that runs one cell; its key is appended.

    Raises:
        UserError: the disk is full.
        SystemExit: after a signal, once the process of the cell has saved its state.
    """
    outcome, began = Outcome(), time.time()
    pending, progress = list(places), True
    while pending and progress:
        outcome.busy, progress, left = [], False, []
        for number, place in enumerate(pending, 1):
            if place.state() == FINISHED:
                outcome.finished.append(place.key)
                continue
            with place.claimed() as lock:
                if lock is None:
                    left.append(place)
                    outcome.busy.append(place.key)
                    continue
                _run_claimed(place, lock, [*command, place.key], outcome, began, f"[{number}/{len(pending)}]")
                progress = True
        pending = left
    return outcome


def _run_claimed(place: Place, lock: int, command: list[str], outcome: Outcome, began: float, count: str) -> None:
    """Run a cell, unless another invocation has finished it, or failed at it, since this one began."""
    state = place.state()
    if state == FINISHED:
        outcome.finished.append(place.key)
    elif state == FAILED and place.result.stat().st_mtime >= began:
        outcome.failed[place.key] = str((place.record() or {}).get("error"))
    else:
        print(f"{count} {place.key}: {'resumes' if state == STARTED else 'starts'}; log: {place.log}", flush=True)
        before = time.perf_counter()
        error = _run(place, lock, command)
        spent = duration(time.perf_counter() - before)
        if error is None:
            outcome.finished.append(place.key)
            print(f"{count} {place.key}: {result_text(place.record() or {})} ({spent})", flush=True)
            return
        outcome.failed[place.key] = error
        print(f"{count} {place.key}: FAILED after {spent}: {error}", flush=True)
        if _DISK_FULL in error:
            raise UserError(
                f"The disk is full ({error}). Free space; the same command goes on, and no finished cell is lost."
            )


def _run(place: Place, lock: int, command: list[str]) -> str | None:
    """Run the process of a cell; returns why it failed, None if it did not."""
    place.result.unlink(missing_ok=True)  # of an earlier failure
    try:
        log = open(place.log, "ab")  # noqa: SIM115  # closed below
    except OSError as error:
        return f"{place.log} cannot be written ({error.strerror})."
    with log:
        environment = {**os.environ, LOCK_VARIABLE: str(lock)}
        with _forwarded() as signals:  # before the process starts, so that no signal ends this one alone
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                env=environment,
            )
            signals.to(process)
            status = process.wait()
        received = signals.received
    if received:
        print(f"stopped by {signal.Signals(received[0]).name}; the same command resumes {place.key}.", flush=True)
        raise SystemExit(128 + received[0])
    record = place.record() or {}
    if status == 0 and record.get("status") == FINISHED:
        return None
    if record.get("status") == FAILED:
        return str(record.get("error"))
    if status < 0:
        name = signal.Signals(-status).name
        return f"its process was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; it resumes where it was"
    return _last_error(place.log) or f"its process ended with status {status}; {place.log} has its output"


class _Forwarded:
    """Signals that arrived, passed on to a child process, also those that came while it was started."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def to(self, process: "subprocess.Popen[bytes]") -> None:
        """Pass on to `process` from now on, first what has already arrived; one signal may be sent twice, none is lost."""
        self._process = process
        for signum in self.received:
            self._send(signum)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """The handler of all of these signals."""
        self.received.append(signum)
        self._send(signum)

    def _send(self, signum: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signum)


@contextmanager
def _forwarded() -> Iterator[_Forwarded]:
    """Handle signals until the block ends; `to` says which child process gets them."""
    signals = _Forwarded()
    before = {signum: signal.signal(signum, signals.handle) for signum in _FORWARDED}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _last_error(log: Path) -> str:
    """The last line of a log that says `error: ...`, without that word."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
        return next(
            (printable(line.removeprefix("error: ")) for line in reversed(lines) if line.startswith("error: ")), ""
        )
    return ""


# ---- scripts --------------------------------------------------------------------------------------------------------


_SHELL = """#!/usr/bin/env bash
# {title}: {count} not finished, one a line. Run it as it is, or several lines at once.
set -u
failed=0
{lines}
exit "$failed"
"""
_SLURM = """#!/usr/bin/env bash
# {title}: {count} not finished, one task of the array each. A task that Slurm stops saves, goes back into the
# queue, and resumes. Afterwards the same command without --jobs slurm prints the table.
#
#   sbatch {path}
#
#SBATCH --job-name=nrat_scale
#SBATCH --array=0-{last}
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
set -euo pipefail

cells=(
{cells}
)
status=0
srun --ntasks=1 {command} "${{cells[$SLURM_ARRAY_TASK_ID]}}" || status=$?
if [ "$status" -eq 143 ]; then
  echo "stopped after SIGTERM; back into the queue"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""


def write_script(kind: str, path: Path, title: str, places: Sequence[Place], command: Sequence[str]) -> Path:
    """Write a `shell` or `slurm` script that runs these cells.

    Args:
        command: as for `run_local`.
    """
    given, keys = shlex.join(command), [shlex.quote(place.key) for place in places]
    facts = {"title": printable(title), "count": counted(len(places), "cell"), "path": shlex.quote(str(path))}
    if kind == "shell":
        content = _SHELL.format(**facts, lines="\n".join(f"{given} {key} || failed=1" for key in keys))
    else:
        cells = "\n".join(f"  {key}" for key in keys)
        content = _SLURM.format(**facts, cells=cells, command=given, last=len(keys) - 1)
    make_folder(path.parent)
    write_atomically(path, content)
    path.chmod(0o755)
    return path


# ---- text -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """90 as `1 min 30 s`, 7200 as `2.0 h`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s" if seconds >= 60 else f"{seconds:.0f} s"


def result_text(record: Mapping[str, Any]) -> str:
    """The accuracies of a finished cell in one line."""
    return "; ".join(
        f"{label} " + " ".join(f"{name} {100 * entry['accuracy']:.1f}" for name, entry in attacks.items())
        for label, attacks in record.get("results", {}).items()
    )
