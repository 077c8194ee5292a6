"""Campaigns against whole runs, in processes started as users start them. Every run must end with the undisturbed one's bits."""

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

from faults_checkpoints import Row
from nrat_scale.checkpoint.folder import named_checkpoint, newest_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train

# Small steps, and between them validations and saves that take as long: a random moment meets each.
RECIPE = """
threat: {eps: 0.03, step: 0.01, num_steps: 2}
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
_STEPS = 90
_START_SECONDS = 120.0  # until a process takes its first step, at most
_END_SECONDS = 30.0  # until the launcher has ended, once one of its processes is gone
_LIMIT_BYTES = 200_000  # of a file, less than a checkpoint of the recipe needs


class _Bench:
    """A folder with shards and the recipe, and the undisturbed run's digest."""

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
        self.reference = digest(self.complete(folder / "undisturbed"))

    def start(self, run: Path, *more: str, preexec: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
        """Training as users start it; what it says goes to RUN.log."""
        launcher = (
            [] if self.processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
        )
        command = [sys.executable, *launcher, "-m", "nrat_scale.train", str(self.recipe), f"run_dir={run}"]
        with open(_log(run), "w") as log:
            return subprocess.Popen(
                [*command, *self.overrides, *more], stdout=log, stderr=subprocess.STDOUT, text=True, preexec_fn=preexec
            )

    def complete(self, run: Path) -> Path:
        """Start the run, and wait for its end."""
        status = self.start(run).wait(timeout=600)
        said = _log(run).read_text()
        assert status == 0, said
        assert self.processes == 1 or "2 process(es)" in said, "the launcher must really have started two"
        return run


def _log(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def digest(run: Path) -> dict[str, str]:
    """sha256 of the metrics, and of tensors and state of the last and the best checkpoint."""
    found = {"metrics": hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest()}
    for name in ("last", "best"):
        checkpoint = named_checkpoint(run, name)
        found |= {f"{name}/{file}": value for file, value in checkpoint.sha256.items() if file.endswith(".safetensors")}
        state = {key: value for key, value in checkpoint.state.items() if key != "pointer"}  # which save it was
        found[f"{name}/state"] = json.dumps(state, sort_keys=True)
    return found


def _differences(run: Path, reference: dict[str, str]) -> list[str]:
    found = digest(run)
    return [
        f"{key} is not that of the undisturbed run: {found.get(key)} and not {value}"
        for key, value in reference.items()
        if found.get(key) != value
    ]


def _steps(run: Path) -> int:
    """The last step that the run has told of; 0 for none."""
    told = re.findall(r"^step (\d+)/", _log(run).read_text(), re.MULTILINE)
    return int(told[-1]) if told else 0


def _resumed_from(run: Path) -> int:
    told = re.search(r"^resuming .* from step (\d+) of", _log(run).read_text(), re.MULTILINE)
    return int(told[1]) if told else 0


def _wait_for_steps(process: "subprocess.Popen[str]", run: Path) -> bool:
    """Until the run takes steps; false where it has ended before."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if _steps(run):
            return True
        time.sleep(0.005)
    assert process.poll() is not None, "the run never started"
    return False


def _survivors(run: Path) -> list[int]:
    """Processes that have `run` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"run_dir={run}\0".encode() in path.read_bytes() + b"\0":
                found.append(int(path.parent.name))
    return found


def runs(trials: int) -> Row:
    """SIGKILL and SIGTERM in turns at random moments of a run; the same command goes on, to the end."""
    moments, wrong, lost, done, began, moment = random.Random(0), [], [0], 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder))
        length = _seconds_of_steps(bench.folder / "undisturbed")
        while done < trials:
            began += 1
            run, reached, killed = bench.folder / f"run{began}", 0, False
            while True:
                process = bench.start(run)
                training = _wait_for_steps(process, run)
                came_back = _resumed_from(run)
                if killed or came_back < reached:
                    lost.append(reached - came_back)
                if not training or done == trials:
                    process.wait(timeout=600)
                    break
                moment = moments.uniform(0, min(length / 2, 1.5))  # the reference may have run on a busier machine
                time.sleep(moment)
                killed = done % 2 == 0
                process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
                status = process.wait(timeout=60)
                if status == 0:
                    break
                done += 1
                reached = _steps(run)
                complete = reached == _STEPS  # SIGTERM has met a process on its way out
                if not killed and status != 143 and not complete:
                    wrong.append(f"run {began}: status {status} after SIGTERM at {moment:.2f} s")
                if not killed and _newest(run) < reached:
                    wrong.append(f"run {began}: SIGTERM lost {reached - _newest(run)} steps")
            wrong += [f"run {began}: {sentence}" for sentence in _differences(run, bench.reference)]
            shutil.rmtree(run)
    return Row(
        "SIGKILL or SIGTERM at a random moment of a run",
        done,
        max(lost),
        wrong,
        f"{began} runs completed; epochs of 6 steps",
    )


def _newest(run: Path) -> int:
    checkpoint, _ = newest_checkpoint(run)
    return checkpoint.step if checkpoint is not None else 0


def _seconds_of_steps(run: Path) -> float:
    """How long the steps of a run took: between the files that it wrote first and last."""
    times = [path.stat().st_mtime for path in (run / "model.json", run / "metrics.jsonl")]
    return max(1.0, times[1] - times[0])


def ranks(trials: int) -> Row:
    """SIGKILL one of two processes at a random moment; the other must end, and the same command completes the run."""
    moments, wrong, lost, slowest = random.Random(1), [], [0], 0.0
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), processes=2)
        for trial in range(trials):
            run = bench.folder / f"run{trial}"
            process = bench.start(run)
            assert _wait_for_steps(process, run), _log(run).read_text()
            time.sleep(moments.uniform(0, 3))
            os.kill(_rank(process, trial % 2), signal.SIGKILL)
            begun = time.monotonic()
            sentences = _ends(process, run, _END_SECONDS)
            slowest = max(slowest, time.monotonic() - begun)
            if f"rank {trial % 2}" not in re.sub(r"rank\s*:\s*", "rank ", _log(run).read_text()):
                sentences.append(f"rank {trial % 2} is not named")
            reached = _steps(run)
            bench.complete(run)
            lost.append(reached - _resumed_from(run))
            wrong += [f"trial {trial}: {sentence}" for sentence in sentences + _differences(run, bench.reference)]
            shutil.rmtree(run)
    return Row(
        "SIGKILL of one of two processes", trials, max(lost), wrong, f"all had ended after at most {slowest:.1f} s"
    )


def stopped(trials: int) -> Row:
    """SIGSTOP one of two processes; the other must end after train.timeout_minutes, here 6 s."""
    wrong, lost, slowest = [], [0], 0.0
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), processes=2)
        for trial in range(trials):
            run = bench.folder / f"run{trial}"
            process = bench.start(run, "train.timeout_minutes=0.1")
            assert _wait_for_steps(process, run), _log(run).read_text()
            rank = _rank(process, 1 - trial % 2)
            os.kill(rank, signal.SIGSTOP)
            begun = time.monotonic()
            while time.monotonic() < begun + 60 and "has lost" not in _log(run).read_text():
                time.sleep(0.1)
            slowest = max(slowest, time.monotonic() - begun)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGCONT)  # else the launcher waits 30 s before it kills what does not end
            sentences = _ends(process, run, _END_SECONDS)
            if f"rank {1 - trial % 2}" not in _log(run).read_text():
                sentences.append(f"rank {1 - trial % 2} is not named")
            reached = _steps(run)
            bench.complete(run)
            lost.append(reached - _resumed_from(run))
            wrong += [f"trial {trial}: {sentence}" for sentence in sentences + _differences(run, bench.reference)]
            shutil.rmtree(run)
    return Row("SIGSTOP of one of two processes", trials, max(lost), wrong, f"noticed after at most {slowest:.1f} s")


def _rank(launcher: "subprocess.Popen[str]", number: int) -> int:
    """The process of a rank."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = (path.parent / "environ").read_bytes().split(b"\0")
            if parent == launcher.pid and f"RANK={number}".encode() in environment:
                return int(path.parent.name)
    raise AssertionError(f"rank {number} has gone already")


def _ends(process: "subprocess.Popen[str]", run: Path, seconds: float) -> list[str]:
    """What is wrong with the end of a launcher one of whose processes was lost."""
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return [f"the launcher has not ended within {seconds:.0f} s"]
    left = _survivors(run)
    for number in left:
        os.kill(number, signal.SIGKILL)
    return ([] if status else ["the launcher ended with status 0"]) + [f"process {number} is left" for number in left]


def files(trials: int) -> Row:
    """Each file of the newest checkpoint flipped, truncated, zeroed, deleted: named, and the one before is used."""
    wrong, lost, count = [], [0], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), "train.epochs=4")
        before = bench.folder / "before"
        status = bench.start(before, "train.max_steps=16").wait(timeout=600)
        assert status == 0, _log(before).read_text()
        newest = named_checkpoint(before, "last").folder
        for name in sorted(path.name for path in newest.iterdir()):
            for damage in (_flip, _truncate, _zero, Path.unlink):
                count += 1
                run = bench.folder / "run"
                shutil.copytree(before, run)
                damage(run / "checkpoints" / newest.name / name)
                said = _train_here(bench, run)
                what = f"{name}, {damage.__name__.strip('_')}"
                if newest.name not in said or "is damaged" not in said:
                    wrong.append(f"{what}: not named")
                back = re.search(r"^resuming .* from step (\d+) of", said, re.MULTILINE)
                lost.append(16 - int(back[1]) if back else 16)
                wrong += [f"{what}: {sentence}" for sentence in _differences(run, bench.reference)]
                shutil.rmtree(run)
    return Row(
        "a file of the newest checkpoint damaged or deleted",
        count,
        max(lost),
        wrong,
        "at step 16, the one before is of step 12",
    )


def _train_here(bench: _Bench, run: Path) -> str:
    """Train in this process, and return what was said."""
    said = io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        train(load_recipe(bench.recipe, [f"run_dir={run}", *bench.overrides]))
    return said.getvalue()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def full_disk(trials: int) -> Row:
    """No file may grow beyond a limit: the run goes on and says so, ends loudly, and what was saved before stays whole."""
    wrong, lost, warned = [], [0], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), "train.epochs=4")
        for trial in range(trials):
            run = bench.folder / f"run{trial}"
            before = 2 + 5 * trial
            assert bench.start(run, f"train.max_steps={before}").wait(timeout=600) == 0, _log(run).read_text()
            status = bench.start(run, preexec=_limit).wait(timeout=600)
            said = _log(run).read_text()
            warned += said.count("The run goes on")
            if status != 2 or "cannot be written" not in said or _steps(run) != 24:
                wrong.append(f"trial {trial}: status {status} after step {_steps(run)}")
            with contextlib.suppress(UserError):
                lost.append(24 - named_checkpoint(run, "last").step - (24 - before))
            bench.complete(run)
            wrong += [f"trial {trial}: {sentence}" for sentence in _differences(run, bench.reference)]
    return Row(
        "no room for a checkpoint (RLIMIT_FSIZE)",
        trials,
        max(lost),
        wrong,
        f"{warned} saves were missed and told; the run trained to its end",
    )


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES))
