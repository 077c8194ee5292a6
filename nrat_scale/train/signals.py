"""Signals that stop a run: the first lets it finish the step and save, a second one ends it at once."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A run saved its state and stopped because of a signal. `status` is the exit status of the process."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def status(self) -> int:
        """130 after SIGINT, as in shells; 143 after SIGTERM and SIGUSR1, the warnings of schedulers."""
        return 130 if self.signum == signal.SIGINT else 143


class StopSignals:
    """The signal that this process has received (`received`), 0 for none. `watched` installs the handlers."""

    def __init__(self) -> None:
        self.received = 0

    def __bool__(self) -> bool:
        return self.received != 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            # Safe in the middle of a write: files are written beside their place and renamed.
            os._exit(128 + signum)
        self.received = signum
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step and saving; a second signal ends the run at once\n")

    @contextlib.contextmanager
    def watched(self) -> Iterator["StopSignals"]:
        """Handle `SIGNALS` inside the block. Only the main thread can; in another thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def resume_command() -> str:
    """The command that resumes this run: the one that started it."""
    module = "-m nrat_scale.train"
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is None:
        launcher = "accelerate launch"
    else:
        nodes = int(os.environ.get("WORLD_SIZE", local)) // int(local)
        launcher = f"torchrun --nproc_per_node {local}" + (f" --nnodes {nodes}" if nodes > 1 else "")
    arguments = [word for word in sys.argv[1:] if word != "resume=never"]
    return f"{launcher} {module} {shlex.join(arguments)}"
