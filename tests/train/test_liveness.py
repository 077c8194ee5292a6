"""Liveness: the surviving rank names the one that died or froze."""

import os
import signal
from pathlib import Path

import pytest

from nrat_scale.checkpoint.folder import named_checkpoint
from tests.support.launched import launched


@pytest.mark.medium
@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_run(recipe_path: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """One of two processes is killed or freezes: the other names it and ends instead of waiting for ever; the run resumes."""
    run = tmp_path / "run"
    arguments = [str(recipe_path), "train.epochs=12", f"run_dir={run}"]
    with launched([*arguments, "train.timeout_minutes=0.5"], processes=2) as launch:
        launch.wait_for_rows(run, 4)
        os.kill(launch.pid(1), signum)
        assert launch.wait(0) == [1]
        assert "rank 0 has lost rank 1 of this run" in launch.text("err")
    step = named_checkpoint(run, "last").step
    with launched([*arguments, f"train.max_steps={step + 2}"], processes=2) as launch:
        assert f"from step {step}" in launch.succeed()
