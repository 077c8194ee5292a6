"""Liveness: each rank touches RUN/.alive/rank-N every second, so that survivors can name the rank that died or froze."""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

from nrat_scale.core.files import make_folder
from nrat_scale.core.run_folder import RunFolder

_PERIOD_SECONDS = 1.0
_SILENT_SECONDS = 2.5  # with slack for a busy machine


@contextlib.contextmanager
def heartbeat(run: RunFolder, rank: int) -> Iterator[None]:
    """Touch the file of `rank` every second inside the block."""
    make_folder(run.alive)
    path, over = run.alive / f"rank-{rank}", threading.Event()

    def beat() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # a full disk must not end the run
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


def silent_ranks(run: RunFolder) -> list[int]:
    """The ranks whose file stays untouched while this waits (3.5 seconds)."""
    time.sleep(_SILENT_SECONDS + _PERIOD_SECONDS)
    now = run.alive / f"now-{uuid.uuid4().hex[:8]}"
    ages: dict[int, float] = {}
    with contextlib.suppress(OSError):
        now.touch()  # ages are by the file system's clock, because those of hosts differ
        for path in run.alive.glob("rank-*"):
            ages[int(path.name.removeprefix("rank-"))] = now.stat().st_mtime - path.stat().st_mtime
        now.unlink()
    return sorted(rank for rank, seconds in ages.items() if seconds > _SILENT_SECONDS)
