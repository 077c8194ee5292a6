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
        self.status = 130 if signum == signal.SIGINT else 143  # SIGUSR1 is a scheduler's warning, as SIGTERM is


class StopSignals:
    """The signal that this process has received (`received`), 0 for none. `watched` installs the handlers."""

    def __init__(self) -> None:
        self.received = 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            # Safe during a write: files are replaced by an atomic rename.
            os._exit(128 + signum)
        self.received = signum
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step and saving; a second signal ends the run at once\n")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Handle SIGNALS inside the block; does nothing outside the main thread, as Python demands."""
        in_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._handle) for number in SIGNALS if in_main}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def resume_command() -> str:
    """The command that resumes this run: the one that started it."""
    launcher, local = "accelerate launch", os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None:
        nodes = int(os.environ.get("WORLD_SIZE", local)) // int(local)
        launcher = f"torchrun --nproc_per_node {local}" + (f" --nnodes {nodes}" if nodes > 1 else "")
    arguments = [word for word in sys.argv[1:] if word != "resume=never"]
    return f"{launcher} -m nrat_scale.train {shlex.join(arguments)}"
