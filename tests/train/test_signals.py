"""Preemption: a run that receives a signal saves, prints the command that resumes it, and ends as if it was never stopped."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.train.signals import SIGNALS
from tests.support.launched import TIMEOUT_SECONDS, launched
from tests.support.runs import ROOT, digest

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
        assert last == f"python -m nrat_scale.train {recipe_path} {' '.join(LONGER)} run_dir={run}"
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
        assert launch.wait() == [138, 138], launch.text("err")
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


@pytest.mark.medium
@pytest.mark.parametrize("signum", [s for s in SIGNALS if s != signal.SIGTERM], ids=lambda signum: signum.name)
def test_every_signal_saves(recipe_path: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """What shells, terminals, schedulers and limits of CPU time send: the run says which, saves, and ends with 128 + number."""
    run = tmp_path / "run"
    with launched(arguments(recipe_path, run)) as launch:
        launch.wait_for_rows(run, 1)
        for _ in range(2):  # torchrun forwards what a terminal or Slurm has already sent to each rank
            os.kill(launch.pid(), signum)
        assert launch.wait() == [128 + signum], launch.text("err")
        assert f"{signum.name}: stopping after this step and saving" in launch.text("err")
        assert f"stopped by {signum.name}; the run is saved. Resume with:" in launch.text("out")
    with launched([*arguments(recipe_path, run), "train.max_steps=1"]) as launch:
        assert f"from step {named_checkpoint(run, 'last').step}" in launch.succeed()


IGNORING = """
import signal
from nrat_scale.core.errors import run_cli
from nrat_scale.train.__main__ import main
for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    signal.signal(signum, signal.SIG_IGN)
run_cli(main)
"""


@pytest.mark.medium
def test_signals_that_are_ignored_at_the_start_stay_ignored(recipe_path: Path, tmp_path: Path) -> None:
    """nohup ignores SIGHUP, a shell's `&` SIGINT and SIGQUIT; SIGTERM still stops the run."""
    run = tmp_path / "run"
    with launched([str(recipe_path), "train.epochs=400", f"run_dir={run}"], script=IGNORING) as launch:
        launch.wait_for_rows(run, 1)
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            os.kill(launch.pid(), signum)
        launch.wait_for_rows(run, 8)
        assert "stopping" not in launch.text("err")
        os.kill(launch.pid(), signal.SIGTERM)
        assert launch.wait() == [143]


def started(command: list[str], **options: object) -> "subprocess.Popen[str]":
    """A process group of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command, text=True, env=environment, cwd=ROOT, start_new_session=True, **given)  # type: ignore[call-overload, no-any-return]


def wait_for_rows(process: "subprocess.Popen[str]", run: Path, count: int) -> None:
    path, end = run / "metrics.jsonl", time.monotonic() + TIMEOUT_SECONDS
    while not path.is_file() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def killed_group(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_lost_terminal(recipe_path: Path, tmp_path: Path) -> None:
    """The ssh session ends: SIGHUP comes, and every write to the terminal fails; the run is saved all the same."""
    run = tmp_path / "run"
    master, terminal = os.openpty()

    def on_terminal() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "nrat_scale.train", str(recipe_path), "train.epochs=4000", "train.log_every=1"]
    process = started(
        [*command, f"run_dir={run}"], stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=on_terminal
    )
    os.close(terminal)
    try:
        while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
            os.read(master, 1 << 16)
        os.close(master)
        assert process.wait(TIMEOUT_SECONDS) == 128 + signal.SIGHUP
    finally:
        killed_group(process)
    assert named_checkpoint(run, "last").step >= 4


FORWARDING = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--signals-to-handle", FORWARDING]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "signum", "everybody", "status"),
    [
        (["sh", "-c", 'exec "$0" "$@"', sys.executable], signal.SIGTERM, False, 143),  # a container's entry point
        (["sh", "-c", 'exec "$0" "$@"', *TORCHRUN], signal.SIGTERM, False, 1),
        (TORCHRUN, signal.SIGUSR1, True, 1),  # Slurm's --signal goes to every process of a step
        (TORCHRUN, signal.SIGHUP, True, 1),
        (ACCELERATE, signal.SIGTERM, True, -signal.SIGTERM),
    ],
    ids=["python", "torchrun", "torchrun by Slurm", "torchrun, lost session", "accelerate, whole group"],
)
def test_launchers(
    recipe_path: Path, tmp_path: Path, launcher: list[str], signum: signal.Signals, everybody: bool, status: int
) -> None:
    """The ways that docs/training.md names: a signal to the launcher, or to all of its processes, saves the run."""
    run = tmp_path / "run"
    process = started([*launcher, "-m", "nrat_scale.train", str(recipe_path), "train.epochs=4000", f"run_dir={run}"])
    try:
        wait_for_rows(process, run, 2)
        (os.killpg if everybody else os.kill)(process.pid, signum)
        out, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        killed_group(process)
    assert process.returncode == status, out
    assert f"stopped by {signum.name}; the run is saved. Resume with:" in out
    assert named_checkpoint(run, "last").step >= 4
