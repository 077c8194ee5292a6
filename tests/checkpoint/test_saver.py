"""Saving in the background: copies, order, transient errors that a run survives, and those that end it."""

import errno
import json
import os
import resource
import signal
import stat
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.checkpoints import in_child, received, state_of, tensors_of
from nrat_scale.checkpoint import saver as saver_module
from nrat_scale.checkpoint.folder import checkpoint_folders, named_checkpoint
from nrat_scale.checkpoint.format import Checkpoint, save_checkpoint
from nrat_scale.checkpoint.saver import Saver
from nrat_scale.core.errors import UserError
from tests.support.checkpoints import failing, small_tensors


def give(saver: Saver, step: int, best: bool = False, **options: Any) -> None:
    """Pass the checkpoint of a step to the saver."""
    saver.save(small_tensors(step), state_of(step), best=best, **options)


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the saver."""
    sentences: list[str] = []
    monkeypatch.setattr(saver_module, "warn", sentences.append)
    return sentences


def steps_of(run: Path, *names: str) -> list[int]:
    """The steps that these pointers name."""
    return [named_checkpoint(run, name).step for name in names]


def test_the_saver_copies_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may change weights and state at once: the values at the call are written."""
    go = threading.Event()
    tensors, state = small_tensors(3), state_of(3)
    monkeypatch.setattr(saver_module, "save_checkpoint", lambda *given: (go.wait(10), save_checkpoint(*given))[1])
    with Saver(tmp_path, 2) as saver:
        saver.save(tensors, state, best=True, selected=False)
        tensors["model"]["w"].zero_()
        state["sums"].append(7.0)
        assert not checkpoint_folders(tmp_path), "it has returned before anything was written"
        go.set()
    found = named_checkpoint(tmp_path, "best")
    assert torch.equal(found.tensors("model")["w"], small_tensors(3)["model"]["w"])
    assert found.state["sums"] == [[0.5]]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["selected"] is False
    assert steps_of(tmp_path, "last") == [3]


def test_at_most_one_save_is_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save waits for the previous one, so that memory is bounded and the order kept."""
    order: list[tuple[str, int]] = []

    def write(run: Path, tensors: Any, state: Any) -> Checkpoint:
        order.append(("begin", state["step"]))
        saved = save_checkpoint(run, tensors, state)
        order.append(("end", state["step"]))
        return saved

    monkeypatch.setattr(saver_module, "save_checkpoint", write)
    with Saver(tmp_path, 2) as saver:
        for step in (1, 2, 3):
            give(saver, step)
            assert [entry for entry in order if entry[1] < step] == [
                (event, before) for before in range(1, step) for event in ("begin", "end")
            ]
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["3", "2"]


def test_other_errors_are_raised(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug or a lost permission is not a full disk: the next save or wait raises it, once."""
    saver = Saver(tmp_path, 2)
    with monkeypatch.context() as bug:
        bug.setattr(saver_module, "save_checkpoint", lambda *_: 1 / 0)
        give(saver, 1)
        with pytest.raises(ZeroDivisionError):
            give(saver, 2)
    saver.wait(final=True)
    saver = Saver(tmp_path, 2)
    with monkeypatch.context() as forbidden:
        forbidden.setattr(os, "fsync", failing(errno.EACCES))
        give(saver, 3)
        with pytest.raises(UserError, match="Permission denied"):
            saver.wait()
    with pytest.raises(ValueError, match="Out of range float"):
        saver.save(small_tensors(4), state_of(4) | {"sums": [float("nan")]}, best=False)
    assert warnings == []


def test_an_error_of_the_block_takes_precedence(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the end does not hide why training failed, and is reported as a warning."""
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))

    def fails() -> None:
        with Saver(tmp_path, 2) as saver:
            give(saver, 1)
            raise KeyError("training")

    with pytest.raises(KeyError, match="training"):
        fails()
    assert "No space left" in warnings[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_run_survives_a_full_disk(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A warning; earlier checkpoints and pointers stay; only a final save makes it an error."""
    saver = Saver(tmp_path, 1)
    give(saver, 3, best=True, final=True)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(number))
        give(saver, 4)
        saver.wait()
        assert len(warnings) == 1 and os.strerror(number) in warnings[0] and "Training continues" in warnings[0]
        assert steps_of(tmp_path, "last", "best") == [3, 3]
        with pytest.raises(UserError, match="step-00000004"):
            saver.wait(final=True)
        with pytest.raises(UserError, match="step-00000005"):
            give(saver, 5, final=True)
    give(saver, 6, final=True)
    assert steps_of(tmp_path, "last") == [6]


def test_old_checkpoints_stay_until_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed to make room: a failed save leaves all earlier checkpoints."""
    saver = Saver(tmp_path, 3)
    for step in (1, 2, 3):
        give(saver, step, final=True)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    give(saver, 4)
    saver.wait()
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["3", "2", "1"]


def test_a_corrupting_disk_is_noticed(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that reads back differently is found before the checkpoint is committed and old ones are removed."""
    saver = Saver(tmp_path, 1)
    give(saver, 1, best=True, final=True)
    fsync = os.fsync

    def corrupt(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.pwrite(fd, b"\xff", 0)
        fsync(fd)

    with monkeypatch.context() as bad_disk:
        bad_disk.setattr(os, "fsync", corrupt)
        give(saver, 2)
        saver.wait()
    assert len(warnings) == 1 and "read back" in warnings[0]
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["1"]
    assert steps_of(tmp_path, "last") == [1]


def test_a_delayed_best_checkpoint_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A best checkpoint that is written after a newer one moves best.json; last.json does not go back."""
    refused = {2}

    def write(run: Path, tensors: Any, state: Any) -> Checkpoint:
        if state["step"] in refused:
            raise UserError("refused") from OSError(errno.ENOSPC, "full")
        return save_checkpoint(run, tensors, state)

    monkeypatch.setattr(saver_module, "save_checkpoint", write)
    saver = Saver(tmp_path, 2)
    for step in (1, 2, 3):
        give(saver, step, best=step < 3)
        saver.wait()
    assert steps_of(tmp_path, "last", "best") == [3, 1]
    refused = {4}
    give(saver, 4)
    saver.wait()
    assert steps_of(tmp_path, "last", "best") == [3, 2], "step 2 is written before step 4, which fails"


def _save_under_a_limit(run: Path, connection: Connection) -> None:
    """Save best step 1; under a limit on the size of files save best step 2 and step 3; without it save step 4."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    warnings: list[str] = []
    saver_module.warn = warnings.append

    def report() -> None:
        connection.send((steps_of(run, "last", "best"), len(warnings)))

    saver = Saver(run, 1)
    saver.save(tensors_of(1), state_of(1), best=True, final=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    for step in (2, 3):
        saver.save(tensors_of(step), state_of(step), best=step == 2)
        saver.wait()
        report()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    saver.save(tensors_of(4), state_of(4), best=False, final=True)
    report()
    connection.send(warnings)


@pytest.mark.medium
def test_a_best_checkpoint_is_written_when_the_disk_has_room_again(tmp_path: Path) -> None:
    """With real write errors the run keeps its previous checkpoint, and the best one is saved with a later save."""
    process, connection = in_child(_save_under_a_limit, tmp_path)
    process.join(60)
    process.kill()
    # The save of step 3 tries step 2 again and fails twice; the save of step 4 writes both.
    *steps, warnings = received(connection)
    assert steps == [([1, 1], 1), ([1, 1], 3), ([4, 2], 3)]
    assert all("File too large" in sentence and "Training continues" in sentence for sentence in warnings)
    assert process.exitcode == 0
    assert torch.equal(named_checkpoint(tmp_path, "best").tensors("ema")["w"], tensors_of(2)["ema"]["w"])
    assert not list((tmp_path / "checkpoints").glob(".*"))
