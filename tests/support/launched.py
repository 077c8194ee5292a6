"""Training in processes of its own, forked from a server that has imported everything: they start at once."""

import atexit
import contextlib
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nrat_scale.train.__main__", "torch.utils.tensorboard"])
TIMEOUT_SECONDS = 120


def _train(arguments: Sequence[str], environment: dict[str, str], output: Path, script: str) -> None:
    """One process: `python -m nrat_scale.train` with `arguments`, after the lines of `script`."""
    import torch

    from nrat_scale.core.errors import run_cli
    from nrat_scale.train import setup
    from nrat_scale.train.__main__ import main

    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["train", *arguments]
    setup.use_all_cores = lambda threads=None: torch.set_num_threads(threads or 1)  # as tests in this process train
    if script:
        exec(script, {"__name__": "script"})
    else:
        run_cli(main)


def free_port() -> int:
    """A free port outside the range from which the kernel serves others, until a rank binds it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Launched:
    """The ranks of one launch, without a launcher that ends the others when one fails; see `launched`."""

    def __init__(
        self,
        arguments: Sequence[str],
        processes: int = 1,
        script: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="launched-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        environments: list[dict[str, str]] = [{"CUDA_VISIBLE_DEVICES": "", **(environment or {})}]
        if processes > 1:
            port = free_port()
            shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
            environments = [environments[0] | shared | rank for rank in ranks]
        self.ranks: list[BaseProcess] = []
        for rank, environment in enumerate(environments):
            given = (list(arguments), environment, self._folder / str(rank), script)
            self.ranks.append(_CONTEXT.Process(target=_train, args=given, daemon=True))
            self.ranks[-1].start()

    def pid(self, rank: int = 0) -> int:
        """The process id of a rank."""
        pid = self.ranks[rank].pid
        assert pid is not None
        return pid

    def text(self, ending: str, rank: int = 0) -> str:
        """The output of a rank so far: `out` or `err`."""
        path = self._folder / f"{rank}.{ending}"
        return path.read_text() if path.is_file() else ""

    def wait_for_rows(self, run: Path, count: int) -> None:
        """Return when metrics.jsonl of the run has `count` rows."""
        path, end = run / "metrics.jsonl", time.monotonic() + TIMEOUT_SECONDS
        while not path.is_file() or len(path.read_text().splitlines()) < count:
            assert time.monotonic() < end and any(rank.is_alive() for rank in self.ranks), self.text("err")
            time.sleep(0.002)

    def wait(self, *ranks: int) -> list[int | None]:
        """Exit statuses, of all ranks by default, once they have ended; negative: ended by that signal."""
        waited = [self.ranks[rank] for rank in ranks] if ranks else self.ranks
        for rank in waited:
            rank.join(TIMEOUT_SECONDS)
        return [rank.exitcode for rank in waited]

    def succeed(self) -> str:
        """Wait, require success; the output of rank 0."""
        statuses = self.wait()
        assert statuses == [0] * len(statuses), "\n".join(self.text("err", rank) for rank in range(len(statuses)))
        return self.text("out")

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
                rank.join(TIMEOUT_SECONDS)


@contextlib.contextmanager
def launched(
    arguments: Sequence[str], processes: int = 1, script: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[Launched]:
    """A launch that leaves no process behind.

    Args:
        arguments: of `python -m nrat_scale.train`.
        processes: ranks; several find each other as under torchrun.
        script: runs instead of the command.
        environment: changes of the environment.
    """
    launch = Launched(arguments, processes, script, environment)
    try:
        yield launch
    finally:
        launch.kill()
