"""Campaigns against saving: kill processes that do nothing but save, at random moments and before every file operation."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nrat_scale.checkpoint.folder import checkpoint_folders, named_checkpoint, newest_checkpoint, recover
from nrat_scale.checkpoint.format import open_checkpoint
from nrat_scale.checkpoint.saver import Saver
from nrat_scale.checkpoint.state import Tensors
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder

KEEP, BEST_EVERY = 2, 3
_MAX_OPERATIONS = 500
_KILL_WITHIN_SECONDS = 0.25  # long enough for several saves, so the kill hits any part of one


@dataclass(frozen=True)
class Row:
    """Result of a campaign. `wrong` has a sentence per violated expectation, `note` says how often the fault took effect."""

    fault: str
    trials: int
    lost_steps: int
    wrong: list[str]
    note: str


def tensors_of(step: int) -> dict[str, Tensors]:
    """Tensors that differ between any two steps; about 3 MB, so that writing them takes a while."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"model": 1 << 18, "ema": 1 << 18, "optimizer": 1 << 17}
    return {name: {"w": torch.rand(size, generator=generator)} for name, size in sizes.items()}


def state_of(step: int) -> dict[str, Any]:
    """A state that training could resume from."""
    return {
        "step": step, "epoch": step // 10, "best": None, "validation_due": False, "metrics_lines": step, "sums": [[0.5]],
        "guard": {}, "guard_sums": [[1.0]], "scaler": None,
    }  # fmt: skip


def in_child(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start `target(*arguments, connection)` in a process; returns it and the connection that it sends to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nrat_scale.checkpoint.saver"])  # import torch once, not in every child
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sending), daemon=True)
    process.start()
    sending.close()  # the child must hold the only sending end, or its death would not close the pipe
    return process, receiving


def received(connection: Connection) -> list[Any]:
    """All messages of a process that has ended."""
    values = []
    try:
        while True:
            values.append(connection.recv())
    except (EOFError, OSError):  # OSError: killed within a message
        return values


def problems_after_restart(run: Path, oldest: int, newest: int) -> tuple[int, list[str]]:
    """Recover as training does; returns the step to resume from, and a sentence for everything that is wrong.

    Args:
        oldest, newest: the range of steps that the run may resume from.
    """
    recover(run)
    found, wrong = newest_checkpoint(run)
    if found is None:
        return 0, ["there is no checkpoint"] if oldest > 0 else []
    if not oldest <= found.step <= newest:
        wrong.append(f"step {found.step} is not within {oldest} and {newest}")
    for name, tensors in tensors_of(found.step).items():
        if not torch.equal(found.tensors(name)["w"], tensors["w"]):
            wrong.append(f"{name} is not that of step {found.step}")
    if found.state["metrics_lines"] != found.step:
        wrong.append("the state is that of another step")
    for name, step in (("last", found.step), ("best", found.step - found.step % BEST_EVERY)):
        try:
            if step and named_checkpoint(run, name).step != step:
                wrong.append(f"{name}.json does not name step {step}")
        except UserError as error:
            wrong.append(str(error))
    for folder in checkpoint_folders(run):
        try:
            open_checkpoint(folder)
        except UserError as error:
            wrong.append(str(error))
    return found.step, wrong + [f"{path.name} was not removed" for path in _temporary_files(run)]


def _temporary_files(run: Path) -> list[Path]:
    return list(RunFolder(run).checkpoints.glob(".*.tmp"))


# ---- random moments -------------------------------------------------------------------------------------------------


def _save_forever(run: Path, step: int, connection: Connection) -> None:
    saver = Saver(run, KEEP)
    while True:
        step += 1
        connection.send(("begun", step))
        saver.save(tensors_of(step), state_of(step), best=step % BEST_EVERY == 0)
        connection.send(("handed over", step))


def checkpoints(trials: int) -> Row:
    """SIGKILL a process that saves without pause, at a random moment; the next process resumes the same run."""
    moments = random.Random(0)
    lost, wrong, interrupted, step = 0, [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for trial in range(trials):
            process, connection = in_child(_save_forever, run, step)
            messages = [connection.recv(), connection.recv()]
            time.sleep(moments.uniform(0, _KILL_WITHIN_SECONDS))
            process.kill()
            process.join()
            messages += received(connection)
            begun, handed = (max(s for kind, s in messages if kind == what) for what in ("begun", "handed over"))
            interrupted += bool(_temporary_files(run))
            found, sentences = problems_after_restart(run, max(step, handed - 1), begun)
            lost = max(lost, handed - found)
            wrong += [f"trial {trial}: {'; '.join(sentences)}"] if sentences else []
            step = found
    note = f"{interrupted} kills left temporary files; {step} saves"
    return Row("SIGKILL while saving", trials, lost, wrong, note)


# ---- every file operation -------------------------------------------------------------------------------------------


def _save_killed_at(run: Path, number: int, connection: Connection) -> None:
    """Save step 6 twice; SIGKILL this process just before file operation `number`."""
    left = [number]

    def hook(event: str, _: object) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    saver = Saver(run, KEEP)
    sys.addaudithook(hook)
    for _ in range(2):
        saver.save(tensors_of(6), state_of(6), best=True)
        saver.wait()
        connection.send("saved")


def operations(trials: int) -> Row:
    """SIGKILL before the first file operation of two saves, then the second, ... until both complete; ignores `trials`."""
    lost, wrong, number, status, outcomes = 0, [], 0, None, set()
    with tempfile.TemporaryDirectory() as folder:
        before, run = Path(folder) / "before", Path(folder) / "run"
        with Saver(before, KEEP) as saver:
            for step in (3, 4, 5):
                saver.save(tensors_of(step), state_of(step), best=step == 3)
        while status != 0 and number < _MAX_OPERATIONS:
            number += 1
            shutil.copytree(before, run)
            process, connection = in_child(_save_killed_at, run, number)
            process.join()
            saved, status = len(received(connection)), process.exitcode
            found, sentences = problems_after_restart(run, 6 if saved else 5, 6)
            lost = max(lost, 6 - found)
            wrong += [f"operation {number}: {'; '.join(sentences)}"] if sentences else []
            outcomes.add((saved, found))
            shutil.rmtree(run)
    assert status == 0, "the last process must complete both saves"
    note = "; ".join(f"after {saved} saves at step {found}" for saved, found in sorted(outcomes))
    return Row("SIGKILL before each file operation of a save", number - 1, lost, wrong, note)
