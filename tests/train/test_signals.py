"""Preemption: a run that receives a signal saves, prints the command that resumes it, and ends as if it was never stopped."""

import os
import signal
from pathlib import Path

import pytest

from nrat_scale.checkpoint.folder import named_checkpoint
from tests.support.launched import launched
from tests.support.runs import digest

LONGER = ["train.epochs=12", "data.validation.size=60"]


def arguments(recipe_path: Path, run: Path) -> list[str]:
    return [str(recipe_path), *LONGER, f"run_dir={run}"]


@pytest.fixture(scope="module")
def uninterrupted(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that receives no signal."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with launched(arguments(recipe_path, run)) as launch:
        launch.succeed()
    return run


@pytest.mark.parametrize(("signum", "status", "rows"), [(signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 6)])
@pytest.mark.medium
def test_a_stopped_run_resumes_bit_for_bit(
    recipe_path: Path, uninterrupted: Path, tmp_path: Path, signum: signal.Signals, status: int, rows: int
) -> None:
    """Stopped twice, in training or validation: exit status, the command that resumes, and in the end the same bits."""
    run = tmp_path / "run"
    for attempt in range(2):
        with launched(arguments(recipe_path, run)) as launch:
            launch.wait_for_rows(run, rows + 4 * attempt)
            os.kill(launch.pid(), signum)
            assert launch.wait() == [status], launch.text("err")
            last = launch.text("out").strip().splitlines()[-1]
        assert last == f"accelerate launch -m nrat_scale.train {recipe_path} {' '.join(LONGER)} run_dir={run}"
    with launched(arguments(recipe_path, run)) as launch:
        launch.succeed()
    assert digest(run) == digest(uninterrupted)


@pytest.mark.medium
def test_two_processes_stop_at_one_step(recipe_path: Path, tmp_path: Path) -> None:
    """A signal to one of two ranks stops both at the same step, and the run resumes."""
    run = tmp_path / "run"
    with launched(arguments(recipe_path, run), processes=2) as launch:
        launch.wait_for_rows(run, 2)
        os.kill(launch.pid(1), signal.SIGUSR1)
        assert launch.wait() == [143, 143], launch.text("err")
        last = launch.text("out").strip().splitlines()[-1]
    assert last.startswith("torchrun --nproc_per_node 2 -m nrat_scale.train")
    step = named_checkpoint(run, "last").step
    with launched(arguments(recipe_path, run), processes=2) as launch:
        assert f"resuming {run} from step {step}" in launch.succeed()


@pytest.mark.medium
def test_a_second_signal_ends_the_run_at_once(recipe_path: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """A second signal damages nothing: the resumed run ends with the same bits."""
    run = tmp_path / "run"
    with launched(arguments(recipe_path, run)) as launch:
        launch.wait_for_rows(run, 4)
        # Frozen, so that both signals arrive before it can end by the first.
        for signum in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            os.kill(launch.pid(), signum)
        assert launch.wait()[0] in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    with launched(arguments(recipe_path, run)) as launch:
        launch.succeed()
    assert digest(run) == digest(uninterrupted)
