"""Liveness: the surviving rank names the one that died or froze."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.launched import launched


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_run(recipe_path: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """One of two processes is killed or freezes: the other names it and ends instead of waiting for ever; the run resumes."""
    run = tmp_path / "run"
    arguments = [str(recipe_path), "train.epochs=12", f"run_dir={run}"]
    with launched([*arguments, "train.timeout_minutes=0.15"], processes=2) as launch:
        launch.wait_for_rows(run, 4)
        os.kill(launch.pid(1), signum)
        assert launch.wait(0) == [1]
        assert "rank 0 has lost rank 1 of this run" in launch.text("err")
    with launched(arguments, processes=2) as launch:
        launch.succeed()
