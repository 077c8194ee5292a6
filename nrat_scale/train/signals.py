"""Signals that stop a run: the first lets it finish the step and save, a second one ends it at once."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from nrat_scale.core.distributed import launcher

# What schedulers, shells, terminals and time limits send before they kill a process.
SIGNALS = (
    signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGINT,
)  # fmt: skip
# torchrun forwards a signal to ranks that the terminal or Slurm has already sent it to: a repetition within this time is no
# second request.
_REPEATED_SECONDS = 2.0


class Stopped(Exception):
    """A run saved its state and stopped because of a signal. `status` is the exit status of the process."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


class StopSignals:
    """The signal that this process has received (`received`), 0 for none. `watched` installs the handlers.

    Args:
        exits: a second signal ends the process. In a notebook it must not: there it reaches the handler from before.
    """

    def __init__(self, *, exits: bool = True) -> None:
        self.received, self._at, self._exits = 0, 0.0, exits
        self._before: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            if signum == self.received and time.monotonic() - self._at < _REPEATED_SECONDS:
                return
            # Safe during a write: files are replaced by an atomic rename.
            if self._exits:
                os._exit(128 + signum)
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)
            return
        self.received, self._at = signum, time.monotonic()
        name, ends = signal.Signals(signum).name, "the run at once" if self._exits else "it at once, without saving"
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: stopping after this step and saving; a second signal ends {ends}\n".encode())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Handle SIGNALS inside the block, except those that the process was started to ignore, as by nohup.

        Does nothing outside the main thread, where Python installs no handlers.
        """
        in_main = threading.current_thread() is threading.main_thread()
        handled = [number for number in SIGNALS if in_main and signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)


def resume_command() -> str:
    """The command that resumes this run: the one that started it."""
    command, local = launcher() or "python", os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None:
        nodes = int(os.environ.get("WORLD_SIZE", local)) // int(local)
        command += f" --nproc_per_node {local}" + (f" --nnodes {nodes}" if nodes > 1 else "")
    arguments = [word for word in sys.argv[1:] if word != "resume=never"]
    return f"{command} -m nrat_scale.train {shlex.join(arguments)}"
