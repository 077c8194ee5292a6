"""Campaigns against saving: processes that do nothing else are killed at random moments and at every file operation."""

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

KEEP, BEST_EVERY = 2, 3
_MAX_OPERATIONS = 500
_WINDOW_SECONDS = 0.25  # several saves: the kill falls anywhere within one


@dataclass(frozen=True)
class Row:
    """What a campaign found. `note` says how often the fault really struck, `wrong` a sentence for each wrong trial."""

    fault: str
    trials: int
    lost_steps: int
    wrong: list[str]
    note: str


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def tensors_of(step: int) -> dict[str, Tensors]:
    """The tensors that a run has at `step`: no two steps share one. About 3 MB, so that writing them takes a while."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"model": 1 << 18, "ema": 1 << 18, "optimizer": 1 << 17}
    return {name: {"w": torch.rand(size, generator=generator)} for name, size in sizes.items()}


def state_of(step: int) -> dict[str, Any]:
    """A state that training could go on from."""
    return {
        "step": step, "epoch": step // 10, "best": None, "validation_due": False, "metrics_lines": step, "sums": [[0.5]],
        "guard": {}, "guard_sums": [[1.0]], "scaler": None,
    }  # fmt: skip


def in_child(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that runs `target(*arguments, connection)`, and what it tells. Forked from one that has torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults_checkpoints"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sending), daemon=True)
    process.start()
    sending.close()  # so that what the child tells ends with the child
    return process, receiving


def told(connection: Connection) -> list[Any]:
    """All that a process that has ended had told."""
    values = []
    try:
        while True:
            values.append(connection.recv())
    except (EOFError, OSError):  # OSError: killed in the middle of a message
        return values


def _save_for_ever(run: Path, step: int, connection: Connection) -> None:
    saver = Saver(run, KEEP)
    while True:
        step += 1
        connection.send(("begins", step))
        saver.save(tensors_of(step), state_of(step), best=step % BEST_EVERY == 0)
        connection.send(("handed over", step))


def whats_wrong(run: Path, oldest: int, newest: int) -> tuple[int, list[str]]:
    """Start anew as training does; the step that it goes on from, and a sentence for all that is not as it must be.

    Args:
        oldest, newest: the steps between which it may go on.
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
    best = found.step - found.step % BEST_EVERY
    for name, step in (("last", found.step), ("best", best)):
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
    wrong += [f"{path.name} is left" for path in (run / "checkpoints").glob(".*.tmp")]
    return found.step, wrong


def checkpoints(trials: int) -> Row:
    """SIGKILL a process that saves without a pause, at a random moment; the next one goes on in the same run."""
    moments = random.Random(0)
    lost, wrong, within, step = 0, [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for trial in range(trials):
            process, connection = in_child(_save_for_ever, run, step)
            messages = [connection.recv(), connection.recv()]
            time.sleep(moments.uniform(0, _WINDOW_SECONDS))
            process.kill()
            process.join()
            messages += told(connection)
            begun, handed = (max(s for kind, s in messages if kind == what) for what in ("begins", "handed over"))
            within += any((run / "checkpoints").glob(".*.tmp"))
            found, sentences = whats_wrong(run, max(step, handed - 1), begun)
            lost = max(lost, handed - found)
            wrong += [f"trial {trial}: {'; '.join(sentences)}"] if sentences else []
            step = found
    return Row("SIGKILL while saving", trials, lost, wrong, f"{within} left files of an unfinished save; {step} saves")


def _save_killed_at(run: Path, number: int, connection: Connection) -> None:
    """Save step 6, and once more, and die just before the file operation `number`."""
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
    """SIGKILL before the first file operation of a save, the second, ... until one gets through; `trials` is not used."""
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
            saved, status = len(told(connection)), process.exitcode
            found, sentences = whats_wrong(run, 6 if saved else 5, 6)
            lost = max(lost, 6 - found)
            wrong += [f"operation {number}: {'; '.join(sentences)}"] if sentences else []
            outcomes.add((saved, found))
            shutil.rmtree(run)
    assert status == 0, "the last one is not killed"
    note = "; ".join(f"after {saved} saves at step {found}" for saved, found in sorted(outcomes))
    return Row("SIGKILL before each file operation of a save", number - 1, lost, wrong, note)
