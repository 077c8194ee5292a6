"""Who of a run's processes still lives: each touches a file of its own every second, and reads those of the others.

A collective that fails says that somebody is gone, but not who. The files are RUN/.alive/rank-N; a process that is killed,
or stands still, touches its own no more.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nrat_scale.core.files import make_folder

_PERIOD_SECONDS = 1.0
_SILENT_SECONDS = 2.5  # longer than a period, so that a busy machine is not taken for a dead one


@contextlib.contextmanager
def heartbeat(run: Path, rank: int, num_processes: int) -> Iterator[None]:
    """Touch this rank's file every second meanwhile. Nothing happens where there is one process."""
    if num_processes == 1:
        yield
        return
    folder = run / ".alive"
    make_folder(folder)
    path, over = folder / f"rank-{rank}", threading.Event()

    def beat() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # a full disk is no reason to die
                path.touch()
            over.wait(_PERIOD_SECONDS)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def silent_ranks(run: Path) -> list[int]:
    """The ranks that have not been heard of for some seconds. It takes as long to tell."""
    time.sleep(_SILENT_SECONDS + _PERIOD_SECONDS)
    now = run / ".alive" / f"now-{uuid.uuid4().hex[:8]}"
    silent = []
    with contextlib.suppress(OSError):
        now.touch()  # the file system has a clock of its own
        for path in now.parent.glob("rank-*"):
            if now.stat().st_mtime - path.stat().st_mtime > _SILENT_SECONDS:
                silent.append(int(path.name.removeprefix("rank-")))
        now.unlink()
    return sorted(silent)
