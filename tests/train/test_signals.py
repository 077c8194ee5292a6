"""Preemption: a run that is asked to stop saves, says how to go on, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from tests.support.runs import RECIPE, ROOT, digest, make_shards

LONGER = ["train.epochs=12", "data.validation.size=60"]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stops")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    command = arguments(recipe_path, tmp_path_factory.mktemp("whole") / "run")
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=300)
    return Path(command[-1].partition("=")[2])


def arguments(recipe_path: Path, run: Path, processes: int = 1) -> list[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "-m", "nrat_scale.train", str(recipe_path), *LONGER, f"run_dir={run}"]


def wait_for(run: Path, lines: int) -> None:
    """Until the run has logged so much."""
    path, end = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end:
        if path.is_file() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.005)
    raise AssertionError("the run never got there")


@pytest.mark.parametrize(("signum", "status", "lines"), [(signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 6)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    recipe_path: Path, undisturbed: Path, tmp_path: Path, signum: signal.Signals, status: int, lines: int
) -> None:
    """Whether it was training or validating: exit status, the command that resumes, and in the end the same bits."""
    run = tmp_path / "run"
    stops = 0
    for attempt in range(30):
        process = subprocess.Popen(
            arguments(recipe_path, run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if attempt < 2:
            wait_for(run, lines + 4 * attempt)
            process.send_signal(signum)
        out, err = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == status, err
        stops += 1
        last = out.strip().splitlines()[-1]
        assert last == f"accelerate launch -m nrat_scale.train {recipe_path} {' '.join(LONGER)} run_dir={run}"
    assert stops == 2
    assert digest(run) == digest(undisturbed)


def test_a_stop_during_validation(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation is given up, saved as due, and done first when the run goes on: metrics and checkpoints are the same."""
    import nrat_scale.train.validate as validation
    from nrat_scale.train.signals import Stopped

    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}"]))
    real, calls = validation._both_labels, []

    def signalled(name, *rest):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == 4:  # the attack of the second validation
            os.kill(os.getpid(), signal.SIGTERM)
        return real(name, *rest)

    monkeypatch.setattr(validation, "_both_labels", signalled)
    recipe = load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(Stopped):
        train(recipe)
    rows = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == ["train", "validation", "train"]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert digest(train(recipe)) == digest(whole)


def test_two_processes_agree_on_the_step(recipe_path: Path, tmp_path: Path) -> None:
    """A signal to one of two ranks stops both at one step, and the run can be taken up again."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        arguments(recipe_path, run, 2), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(run, 2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "2 process(es)" in out
    assert "torchrun --nproc_per_node 2 -m nrat_scale.train" in out.strip().splitlines()[-1]
    assert "exitcode: 143" in err.replace(" : ", ": ") or "143" in err
    last = json.loads((run / "checkpoints" / "last.json").read_text())
    finished = subprocess.run(arguments(recipe_path, run, 2), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert f"resuming {run} from step {last['step']}" in finished.stdout


def test_a_second_signal_ends_at_once(recipe_path: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Nothing is damaged: the next start goes on and ends with the same bits."""
    run = tmp_path / "run"
    process = subprocess.Popen(arguments(recipe_path, run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(run, 4)
    process.send_signal(signal.SIGSTOP)  # so that both signals are there before it can end by the first
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    subprocess.run(arguments(recipe_path, run), check=True, cwd=ROOT, capture_output=True, timeout=300)
    assert digest(run) == digest(undisturbed)


def test_a_stop_during_the_last_validation(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are done, but the run is not: the next start does what was given up."""
    import nrat_scale.train.validate as validation
    from nrat_scale.train.signals import Stopped

    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}"]))
    real, calls = validation._both_labels, []

    def signalled(name, *rest):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == 6:  # the attack of the third and last validation
            os.kill(os.getpid(), signal.SIGTERM)
        return real(name, *rest)

    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(validation, "_both_labels", signalled)
    recipe = load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(Stopped):
        train(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert digest(train(recipe)) == digest(whole)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_run(recipe_path: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """One of two processes is killed, or stands still: the other ends with a sentence instead of waiting for ever."""
    run = tmp_path / "run"
    command = [*arguments(recipe_path, run, 2), "train.timeout_minutes=0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(run, 4)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    lost = int(found.stdout.split()[-1])
    environment = Path(f"/proc/{lost}/environ").read_bytes().split(b"\0")
    rank = next(entry.removeprefix(b"RANK=").decode() for entry in environment if entry.startswith(b"RANK="))
    os.kill(lost, signum)
    if signum == signal.SIGSTOP:
        time.sleep(
            20
        )  # more than the timeout and the look at who is silent; then let it go, so that the launcher need not wait to kill it
        os.kill(lost, signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    if signum == signal.SIGSTOP:
        assert f"has lost rank {rank} of this run" in err
    finished = subprocess.run(arguments(recipe_path, run, 2), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
