"""Campaigns against whole runs, started as users start them. Every run must end bit-identical to an undisturbed one."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState

from faults.checkpoints import Row
from nrat_scale.checkpoint.folder import named_checkpoint, newest_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train

# Steps are small, and validations and saves take as long as the steps between them: a random moment hits each of the three.
RECIPE = """
threat: {eps: 0.03, step: 0.015, num_steps: 2}
objective: {name: trades}
model: {name: cnn4, kwargs: {width: 16, hidden: 256}}
data:
  batch_size: 16
  epoch_samples: 96
  real: {shards: SHARDS, noise: {kind: symmetric, rate: 0.1}}
  validation: {size: 100}
  augment: {crop: 1, flip: false}
optim: {name: adamw, lr: 0.01, schedule: onecycle, pct_start: 0.5, per: step}
ema: {decay: 0.9, warmup_fraction: 0.25}
train: {epochs: 15, validation_attack: pgd5, keep: 2, log_every: 1}
"""
_STEPS, _SHORT = 90, ["train.epochs=4"]  # steps of RECIPE; overrides for 24 of them
_START_SECONDS = 120.0  # at most, until the first step
_END_SECONDS = 30.0  # at most, until the launcher has ended after one of its processes died
_LIMIT_BYTES = 200_000  # of one file; a checkpoint of RECIPE needs more


class _Case:
    """Shards, a recipe, and the digest of an undisturbed run, all in `folder`."""

    def __init__(self, folder: Path, *overrides: str, processes: int = 1) -> None:
        generator = np.random.default_rng(0)
        labels = np.arange(400) % 10
        images = generator.integers(0, 90, (400, 12, 12, 1))
        for i, label in enumerate(labels):
            images[i, label : label + 3] += 120
        source = LabelledArrays(images.astype(np.uint8), labels, "custom", tuple("0123456789"))
        write_shards(source, folder / "shards", block_size=32, progress=False)
        self.folder, self.processes, self.overrides = folder, processes, list(overrides)
        self.recipe = folder / "faults.yaml"
        self.recipe.write_text(RECIPE.replace("SHARDS", str(folder / "shards")))
        self.undisturbed = folder / "undisturbed"
        self.complete(self.undisturbed)
        self.reference = digest(self.undisturbed)

    def start(self, run: Path, *more: str, preexec: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
        """Start training as users do; its output goes to RUN.log."""
        launcher = (
            [] if self.processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
        )
        command = [sys.executable, *launcher, "-m", "nrat_scale.train", str(self.recipe), f"run_dir={run}"]
        with open(_log(run), "w") as log:
            return subprocess.Popen(
                [*command, *self.overrides, *more], stdout=log, stderr=subprocess.STDOUT, text=True, preexec_fn=preexec
            )

    def start_and_wait_for_a_step(self, run: Path, *more: str) -> "subprocess.Popen[str]":
        """Start training; return after its first step."""
        process = self.start(run, *more)
        assert _wait_for_steps(process, run), _log(run).read_text()
        return process

    def complete(self, run: Path, *more: str) -> None:
        """Train until the end."""
        status = self.start(run, *more).wait(timeout=600)
        output = _log(run).read_text()
        assert status == 0, output
        assert self.processes == 1 or "2 process(es)" in output, "the launcher must start two processes"

    def complete_after_fault(self, run: Path) -> tuple[int, list[str]]:
        """Train a disturbed run until the end; returns the steps lost, and how it differs from the undisturbed run."""
        reached = _steps(run)
        self.complete(run)
        return reached - _resumed_from(run), self.differences(run)

    def differences(self, run: Path) -> list[str]:
        """How a completed run differs from the undisturbed one."""
        found = digest(run)
        return [
            f"{key} is not that of the undisturbed run: {found.get(key)} and not {value}"
            for key, value in self.reference.items()
            if found.get(key) != value
        ]


def digest(run: Path) -> dict[str, str]:
    """sha256 of the metrics, and of tensors and state of the last and the best checkpoint."""
    found = {"metrics": hashlib.sha256(RunFolder(run).metrics.read_bytes()).hexdigest()}
    for name in ("last", "best"):
        checkpoint = named_checkpoint(run, name)
        found |= {f"{name}/{file}": value for file, value in checkpoint.sha256.items() if file.endswith(".safetensors")}
        # "pointer" depends on when the checkpoint was saved
        state = {key: value for key, value in checkpoint.state.items() if key != "pointer"}
        found[f"{name}/state"] = json.dumps(state, sort_keys=True)
    return found


# ---- what a run has printed -----------------------------------------------------------------------------------------


def _log(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def _steps(run: Path) -> int:
    """The last step that the run has printed, 0 if none."""
    steps = re.findall(r"^step (\d+)/", _log(run).read_text(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def _resumed_from(run: Path) -> int:
    resumed = re.search(r"^resuming .* from step (\d+) of", _log(run).read_text(), re.MULTILINE)
    return int(resumed[1]) if resumed else 0


def _wait_for_steps(process: "subprocess.Popen[str]", run: Path) -> bool:
    """Wait for the first step; false if the run ended before."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if _steps(run):
            return True
        time.sleep(0.005)
    assert process.poll() is not None, "the run did not start"
    return False


# ---- interrupted runs -----------------------------------------------------------------------------------------------


def runs(trials: int) -> Row:
    """SIGKILL and SIGTERM in turns, at random moments of a run; the same command resumes it, until the end."""
    moments, wrong, lost, done, begun = random.Random(0), [], [0], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(Path(folder))
        # At most 1.5 s, because the undisturbed run may have shared the machine.
        longest = min(_seconds_of_steps(case.undisturbed) / 2, 1.5)
        while done < trials:
            begun += 1
            run, reached, killed = case.folder / f"run{begun}", 0, False
            while True:
                process = case.start(run)
                training = _wait_for_steps(process, run)
                resumed = _resumed_from(run)
                if killed or resumed < reached:
                    lost.append(reached - resumed)
                if not training or done == trials:
                    process.wait(timeout=600)
                    break
                time.sleep(moments.uniform(0, longest))
                killed = done % 2 == 0
                process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
                status = process.wait(timeout=60)
                if status == 0:
                    break
                done += 1
                reached = _steps(run)
                if not killed:
                    wrong += [f"run {begun}: {sentence}" for sentence in _problems_after_sigterm(run, status, reached)]
            wrong += [f"run {begun}: {sentence}" for sentence in case.differences(run)]
            shutil.rmtree(run)
    note = f"{begun} runs completed; epochs of 6 steps"
    return Row("SIGKILL or SIGTERM at a random moment of a run", done, max(lost), wrong, note)


def _problems_after_sigterm(run: Path, status: int, reached: int) -> list[str]:
    problems = []
    if status != 143 and reached != _STEPS:  # after the last step SIGTERM may hit a process that is exiting
        problems.append(f"status {status} after SIGTERM at step {reached}")
    checkpoint, _ = newest_checkpoint(run)
    saved = checkpoint.step if checkpoint is not None else 0
    if saved < reached:
        problems.append(f"SIGTERM lost {reached - saved} steps")
    return problems


def _seconds_of_steps(run: Path) -> float:
    """How long the steps of a run took: from its first file to its last."""
    first, last = (path.stat().st_mtime for path in (RunFolder(run).model, RunFolder(run).metrics))
    return max(1.0, last - first)


# ---- one of two processes -------------------------------------------------------------------------------------------


def ranks(trials: int) -> Row:
    """SIGKILL one of two processes at a random moment; the other must end, and the same command completes the run."""
    moments, wrong, lost, slowest = random.Random(1), [], [0], 0.0
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(Path(folder), processes=2)
        for trial in range(trials):
            run, victim = case.folder / f"run{trial}", trial % 2
            launcher = case.start_and_wait_for_a_step(run)
            time.sleep(moments.uniform(0, 3))
            os.kill(_process_of_rank(launcher, victim), signal.SIGKILL)
            begun = time.monotonic()
            problems = _problems_of_end(launcher, run)
            slowest = max(slowest, time.monotonic() - begun)
            if not re.search(rf"rank\s*:?\s*{victim}\b", _log(run).read_text()):
                problems.append(f"rank {victim} is not named")
            steps, differences = case.complete_after_fault(run)
            lost.append(steps)
            wrong += [f"trial {trial}: {sentence}" for sentence in problems + differences]
            shutil.rmtree(run)
    note = f"all processes had ended after at most {slowest:.1f} s"
    return Row("SIGKILL of one of two processes", trials, max(lost), wrong, note)


def stopped(trials: int) -> Row:
    """SIGSTOP one of two processes; the other must end after train.timeout_minutes, here 18 s."""
    wrong, lost, slowest = [], [0], 0.0
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(Path(folder), processes=2)
        for trial in range(trials):
            run, victim = case.folder / f"run{trial}", 1 - trial % 2
            launcher = case.start_and_wait_for_a_step(run, "train.timeout_minutes=0.3")
            rank = _process_of_rank(launcher, victim)
            os.kill(rank, signal.SIGSTOP)
            begun = time.monotonic()
            named = False
            while not named and time.monotonic() < begun + 180:
                time.sleep(0.1)
                named = re.search(rf"error: .*rank {victim}\b", _log(run).read_text()) is not None
            slowest = max(slowest, time.monotonic() - begun)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGCONT)  # or the launcher waits 30 s before it kills the frozen process
            problems = _problems_of_end(launcher, run) + ([] if named else [f"rank {victim} is not named"])
            steps, differences = case.complete_after_fault(run)
            lost.append(steps)
            wrong += [f"trial {trial}: {sentence}" for sentence in problems + differences]
            shutil.rmtree(run)
    note = f"noticed after at most {slowest:.1f} s"
    return Row("SIGSTOP of one of two processes", trials, max(lost), wrong, note)


def _process_of_rank(launcher: "subprocess.Popen[str]", rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = (path.parent / "environ").read_bytes().split(b"\0")
            if parent == launcher.pid and f"RANK={rank}".encode() in environment:
                return int(path.parent.name)
    raise AssertionError(f"the process of rank {rank} has ended already")


def _problems_of_end(launcher: "subprocess.Popen[str]", run: Path) -> list[str]:
    """Wait for the end of a launcher that lost a process; what is wrong with that end."""
    try:
        status = launcher.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()
        return [f"the launcher has not ended within {_END_SECONDS:.0f} s"]
    survivors = _survivors(run)
    for process in survivors:
        os.kill(process, signal.SIGKILL)
    return ([] if status else ["the launcher ended with status 0"]) + [f"process {p} has survived" for p in survivors]


def _survivors(run: Path) -> list[int]:
    """Processes that have `run` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"run_dir={run}\0".encode() in path.read_bytes() + b"\0":
                found.append(int(path.parent.name))
    return found


# ---- damaged files --------------------------------------------------------------------------------------------------


def files(trials: int) -> Row:
    """Flip, truncate, zero and delete each file of the newest checkpoint: it is named, and the previous one is used."""
    wrong, lost, count = [], [0], 0
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(Path(folder), *_SHORT)
        before, run = case.folder / "before", case.folder / "run"
        case.complete(before, "train.max_steps=16")
        newest = named_checkpoint(before, "last").folder
        for name in sorted(path.name for path in newest.iterdir()):
            for damage in (_flip, _truncate, _zero, Path.unlink):
                count += 1
                shutil.copytree(before, run)
                damage(RunFolder(run).checkpoints / newest.name / name)
                output = _train_here(case, run)
                what = f"{name}, {damage.__name__.strip('_')}"
                if newest.name not in output or "is damaged" not in output:
                    wrong.append(f"{what}: not named")
                resumed = re.search(r"^resuming .* from step (\d+) of", output, re.MULTILINE)
                lost.append(16 - int(resumed[1]) if resumed else 16)
                wrong += [f"{what}: {sentence}" for sentence in case.differences(run)]
                shutil.rmtree(run)
    note = "damaged at step 16; the previous checkpoint is of step 12"
    return Row("a file of the newest checkpoint damaged or deleted", count, max(lost), wrong, note)


def _train_here(case: _Case, run: Path) -> str:
    """Train in this process, which saves its start-up time; returns the output."""
    output = io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        train(load_recipe(case.recipe, [f"run_dir={run}", *case.overrides]))
    return output.getvalue()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


# ---- full disk ------------------------------------------------------------------------------------------------------


def full_disk(trials: int) -> Row:
    """Limit the size of files: the run warns and trains to its end, fails there, and earlier checkpoints are intact."""
    wrong, lost, warnings = [], [0], 0
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(Path(folder), *_SHORT)
        for trial in range(trials):
            run, before = case.folder / f"run{trial}", 2 + 5 * trial
            case.complete(run, f"train.max_steps={before}")
            status = case.start(run, preexec=_limit_file_size).wait(timeout=600)
            output = _log(run).read_text()
            warnings += output.count("Training continues without")
            if status != 2 or "cannot be written" not in output or _steps(run) != 24:
                wrong.append(f"trial {trial}: status {status} after step {_steps(run)}")
            with contextlib.suppress(UserError):
                lost.append(before - named_checkpoint(run, "last").step)
            case.complete(run)
            wrong += [f"trial {trial}: {sentence}" for sentence in case.differences(run)]
    note = f"{warnings} saves failed with a warning; training went to its last step"
    return Row("no room for a checkpoint (RLIMIT_FSIZE)", trials, max(lost), wrong, note)


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES))
