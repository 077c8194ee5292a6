"""Checkpoints are whole or refused, fall back one by one, give back every bit, and survive kills and full disks."""

import errno
import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nrat_scale.checkpoint.format
import nrat_scale.checkpoint.saver
from faults import CAMPAIGNS
from faults import main as faults_main
from faults_checkpoints import checkpoints, in_child, operations, state_of, tensors_of, told
from nrat_scale.checkpoint import format as module
from nrat_scale.checkpoint import state as state_module
from nrat_scale.checkpoint.folder import (
    checkpoint_folders,
    named_checkpoint,
    newest_checkpoint,
    prune,
    recover,
    write_pointer,
)
from nrat_scale.checkpoint.format import Checkpoint, open_checkpoint, save_checkpoint
from nrat_scale.checkpoint.saver import Saver
from nrat_scale.checkpoint.state import Tensors, load_optimizer_tensors, optimizer_tensors
from nrat_scale.core.errors import UserError

TENSORS: dict[str, Tensors] = {
    "model": {
        "w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "n": torch.tensor(7),
        "d": torch.full((2,), 1 / 3, dtype=torch.float64),
        "h": torch.full((5,), 1 / 3, dtype=torch.bfloat16),
    },
    "ema": {"w": torch.ones(3, 4).t()},  # not contiguous
    "objective": {},
}


def save(run: Path, step: int) -> Checkpoint:
    return save_checkpoint(run, TENSORS, {**state_of(step), "loss": 0.1 + 0.2})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """Every tensor, type and number comes back as it was; an empty part has no file."""
    save(tmp_path, 20)
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None
    assert damaged == []
    assert (found.step, found.state["loss"], found.evaluated) == (20, 0.1 + 0.2, "ema")
    for name, tensors in TENSORS.items():
        loaded = found.tensors(name)
        assert loaded.keys() == tensors.keys()
        for key, value in tensors.items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value)
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(["manifest.json", *found.sha256])


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    """The same state gives the same bytes, or bit-equality of runs could not be checked by hash."""
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "empty", "delete"])
def test_every_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    """A damaged file is named, nothing of it is used, and the checkpoint before is."""
    save(tmp_path, 10)
    path = save(tmp_path, 20).folder / name
    content = path.read_bytes()
    changed = {
        "flip": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        "truncate": content[: len(content) // 2],
        "zero": bytes(len(content)),
        "empty": b"",
        "delete": None,
    }[damage]
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(UserError, match=name):
        open_checkpoint(path.parent)
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert len(damaged) == 1
    assert name in damaged[0]


def test_nothing_whole_is_an_error(tmp_path: Path) -> None:
    """With every checkpoint damaged a run does not start from zero behind its owner's back."""
    (save(tmp_path, 10).folder / "state.json").unlink()
    with pytest.raises(UserError, match="is whole"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "empty") == (None, [])


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """Whatever byte of a manifest changes, the checkpoint is refused with a sentence: it has no hash of its own."""
    folder = save(tmp_path, 20).folder
    path = folder / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content) - 1):
        if not content[position : position + 1].isspace():
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            with pytest.raises(UserError, match="is damaged"):
                open_checkpoint(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"../../../etc/passwd": {"bytes": 1, "sha256": "0"}},
        {"/etc/passwd": {"bytes": 1, "sha256": "0"}},
        {"\udc80\0": {"bytes": 1, "sha256": "0"}},
        {"manifest.json": {"bytes": 1, "sha256": "0"}},
        {"state.json": None},
        {"state.json": {"bytes": "1", "sha256": 0}},
        {"state.json": []},
        {"model.safetensors": {}},
    ],
)
def test_manifests_of_wrong_kinds_are_refused(tmp_path: Path, manifest: Any) -> None:
    """A manifest that is valid JSON but no manifest ends in one printable sentence, and reads nothing outside."""
    folder = save(tmp_path, 20).folder
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged") as caught:
        open_checkpoint(folder)
    str(caught.value).encode()


def test_a_file_that_the_manifest_leaves_out(tmp_path: Path) -> None:
    """A manifest that lost an entry does not make a checkpoint without a model."""
    folder = save(tmp_path, 20).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"does not name model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epoch", None), ("epoch", -1), ("sums", None), ("sums", ["1"]), ("scaler", 3), ("best", {}), ("metrics_lines", True),
     ("validation_due", 0), ("guard", None), ("guard_sums", {})],
)  # fmt: skip
def test_a_state_of_wrong_kinds_is_damage(
    tmp_path: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are missing or of another kind are named though every hash is right, and the one before is used."""
    save(tmp_path, 10)
    monkeypatch.setattr(
        nrat_scale.checkpoint.format, "NAMED", {"step": state_module.NAMED["step"]}
    )  # else it would not even be written
    for state in (state_of(20) | {key: value}, {k: v for k, v in state_of(30).items() if k != key}):
        save_checkpoint(tmp_path, TENSORS, state)
    monkeypatch.undo()
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert [f"'{key}'" in sentence for sentence in damaged] == [True, True]


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    """A folder that was renamed by hand does not pass for another step."""
    folder = save(tmp_path, 20).folder
    with pytest.raises(UserError, match="that of step 20"):
        open_checkpoint(folder.rename(folder.with_name("step-00000030")))


def test_saving_a_step_again(tmp_path: Path) -> None:
    """The new one takes its place; what was whole goes, what was damaged is kept aside."""
    save(tmp_path, 20)
    folder = save(tmp_path, 20).folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / "state.json").write_text("")
    save(tmp_path, 20)
    assert open_checkpoint(folder).step == 20
    assert len(list(folder.parent.glob(".step-00000020.replaced-*"))) == 1


def broken(number: int) -> Callable[..., Any]:
    """What stands for a system call that fails."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a save leaves no part of it, and what was there before."""
    good = save(tmp_path, 10)
    monkeypatch.setattr(os, "fsync", broken(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 20)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [good.folder.name]
    assert open_checkpoint(good.folder).step == 10


def test_what_a_disk_garbles_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that reads back otherwise is found before the checkpoint takes its place, and before old ones go."""
    warnings: list[str] = []
    saver = Saver(tmp_path, 1, warnings.append)
    saver.save(tensors_of(1), state_of(1), best=True)
    saver.wait()
    # The hash is that of what was meant; a disk that garbles is played by the reading.
    monkeypatch.setattr(nrat_scale.checkpoint.format, "sha256_of", lambda path: "0" * 64)
    saver.save(tensors_of(2), state_of(2), best=False)
    saver.wait()
    monkeypatch.undo()
    assert len(warnings) == 1 and "read back" in warnings[0]
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["1"]
    assert named_checkpoint(tmp_path, "last").step == 1


def test_pointers_and_pruning(tmp_path: Path) -> None:
    """best and last survive pruning beside the newest; a pointer cannot lead out of the run."""
    for step in (10, 20, 30, 40, 50):
        saved = save(tmp_path, step)
        write_pointer(tmp_path, "last", saved)
        if step == 20:
            write_pointer(tmp_path, "best", saved)
    assert prune(tmp_path, keep=2) == []
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["50", "40", "20"]
    assert (named_checkpoint(tmp_path, "best").step, named_checkpoint(tmp_path, "last").step) == (20, 50)
    prune(tmp_path, keep=0)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["50", "20"]
    with pytest.raises(UserError, match="no 'best' checkpoint"):
        named_checkpoint(tmp_path / "other", "best")


def test_pruning_after_going_back(tmp_path: Path) -> None:
    """A damaged newer checkpoint, from which the run went back, takes no place among the newest and is not removed."""
    for step in (10, 20, 50):
        saved = save(tmp_path, step)
    (saved.folder / "state.json").unlink()
    write_pointer(tmp_path, "last", save(tmp_path, 30))
    prune(tmp_path, keep=2)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["50", "30", "20"]


DAMAGED_POINTERS = [
    b"", b"\0" * 70, b"[]", b'{"step": 20, "epo',
    b'{"step": 20, "epoch": 2, "folder": "../../elsewhere"}', b'{"step": 20, "epoch": 2, "folder": 20}',
    b'{"step": 30, "epoch": 2, "folder": "step-00000020"}', b'{"step": "20", "epoch": 2, "folder": "step-00000020"}',
    b'{"step": 20, "epoch": 3, "folder": "step-00000020"}', b'{"step": 20, "epoch": 2}',
    b'{"step": 20, "epoch": 2, "folder": "step-00000020", "selectee": false}',
    b'{"step": 20, "epoch": 2, "folder": "step-00000020", "selected": null}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED_POINTERS)
def test_damaged_pointers_are_noticed(tmp_path: Path, content: bytes) -> None:
    """A damaged pointer is named, leads nowhere else, and protects everything: what it named is not known."""
    for step in (20, 30, 40):
        write_pointer(tmp_path, "last", save(tmp_path, step))
    path = tmp_path / "checkpoints" / "best.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"best\.json"):
        named_checkpoint(tmp_path, "best")
    if b'"epoch": 3' not in content:  # told only by the checkpoint itself
        assert "No old checkpoint is removed" in prune(tmp_path, keep=1)[0]
        assert len(checkpoint_folders(tmp_path)) == 3
    path.unlink()
    (tmp_path / "checkpoints" / "last.json").write_bytes(content)
    recover(tmp_path)
    if b'"epoch": 3' not in content:
        assert named_checkpoint(tmp_path, "last").step == 40, "a damaged last.json is written anew"


def test_a_pointer_to_damage_is_one_sentence(tmp_path: Path) -> None:
    """Evaluating a damaged best checkpoint says which, where and what."""
    saved = save(tmp_path, 20)
    write_pointer(tmp_path, "best", saved)
    (saved.folder / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        named_checkpoint(tmp_path, "best")
    assert str(caught.value) == (
        f"The 'best' checkpoint of {tmp_path}, step-00000020, is damaged: ema.safetensors does not match its size and sha256."
    )
    shutil.rmtree(saved.folder)
    with pytest.raises(UserError, match="which is not there"):
        named_checkpoint(tmp_path, "best")


def test_recover_removes_only_our_leftovers(tmp_path: Path) -> None:
    """What a killed save left goes; whatever else lies there, however alike, stays."""
    folder = save(tmp_path, 10).folder.parent
    ours = [".step-00000020.0123456789ab.tmp", ".best.json.0123456789ab.tmp"]
    others = [".step-00000020.0123456789ab", "step-00000020.0123456789ab.tmp", ".mine.tmp", ".step-20.0123456789ab.tmp",
              ".other.json.0123456789ab.tmp", "notes.txt", ".step-00000005.collapsed-01234567"]  # fmt: skip
    (folder / ours[0]).mkdir()
    (folder / ours[0] / "model.safetensors").write_text("part")
    for name in (ours[1], *others):
        (folder / name).write_text("")
    recover(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["last.json", "step-00000010", *others])
    recover(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- saving beside training -----------------------------------------------------------------------------------------


def test_saver_copies_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may go on changing weights and state at once: what is written is what was given."""
    go = threading.Event()
    write = module.save_checkpoint
    monkeypatch.setattr(nrat_scale.checkpoint.saver, "save_checkpoint", lambda *given: go.wait(10) and write(*given))
    tensors, state = tensors_of(3), state_of(3)
    with Saver(tmp_path, 2) as saver:
        saver.save(tensors, state, best=True, selected=False)
        tensors["model"]["w"].zero_()
        state["sums"].append(7.0)
        assert not checkpoint_folders(tmp_path), "it has returned before anything was written"
        go.set()
    found = named_checkpoint(tmp_path, "best")
    assert torch.equal(found.tensors("model")["w"], tensors_of(3)["model"]["w"])
    assert found.state["sums"] == [[0.5]]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["selected"] is False
    assert named_checkpoint(tmp_path, "last").step == 3


def test_at_most_one_save_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, so memory is bounded and order kept; without it a slow disk would fill the RAM."""
    write, order = module.save_checkpoint, []

    def slow(run: Path, tensors: Any, state: Any) -> Checkpoint:
        order.append(("begin", state["step"]))
        saved = write(run, tensors, state)
        order.append(("end", state["step"]))
        return saved

    monkeypatch.setattr(nrat_scale.checkpoint.saver, "save_checkpoint", slow)
    with Saver(tmp_path, 2) as saver:
        for step in (1, 2, 3):
            saver.save(tensors_of(step), state_of(step), best=False)
            assert [entry for entry in order if entry[1] < step] == [
                (w, s) for s in range(1, step) for w in ("begin", "end")
            ]
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["3", "2"]


def test_other_errors_surface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug or a lost folder is not a full disk: the next save or wait raises it, once."""
    warnings: list[str] = []
    saver = Saver(tmp_path, 2, warnings.append)
    monkeypatch.setattr(nrat_scale.checkpoint.saver, "save_checkpoint", lambda *_: 1 / 0)
    saver.save(tensors_of(1), state_of(1), best=False)
    with pytest.raises(ZeroDivisionError):
        saver.save(tensors_of(2), state_of(2), best=False)
    monkeypatch.undo()
    saver.wait(final=True)
    monkeypatch.setattr(os, "fsync", broken(errno.EACCES))
    saver.save(tensors_of(3), state_of(3), best=False)
    with pytest.raises(UserError, match="Permission denied"):
        saver.wait()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Out of range float"):
        saver.save(tensors_of(4), state_of(4) | {"sums": [float("nan")]}, best=False)
    assert warnings == []


def test_an_error_of_the_block_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the end does not hide why training ended, nor is it hidden."""
    warnings: list[str] = []
    monkeypatch.setattr(os, "fsync", broken(errno.ENOSPC))

    def train() -> None:
        with Saver(tmp_path, 2, warnings.append) as saver:
            saver.save(tensors_of(1), state_of(1), best=False)
            raise KeyError("training")

    with pytest.raises(KeyError, match="training"):
        train()
    assert "No space left" in warnings[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_run_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is told, the checkpoints and pointers from before stay, and only a final save makes it an error."""
    warnings: list[str] = []
    saver = Saver(tmp_path, 1, warnings.append)
    saver.save(tensors_of(3), state_of(3), best=True)
    saver.wait()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", broken(number))
        saver.save(tensors_of(4), state_of(4), best=False)
        saver.wait()
        assert len(warnings) == 1 and os.strerror(number) in warnings[0] and "goes on" in warnings[0]
        assert (named_checkpoint(tmp_path, "last").step, named_checkpoint(tmp_path, "best").step) == (3, 3)
        for end in (lambda: saver.wait(final=True), saver.close):
            with pytest.raises(UserError, match="step-00000004"):
                end()
        with pytest.raises(UserError, match="step-00000005"):
            saver.save(tensors_of(5), state_of(5), best=False, final=True)
    saver.save(tensors_of(6), state_of(6), best=False, final=True)
    assert named_checkpoint(tmp_path, "last").step == 6


def test_old_ones_stay_until_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed to make room: with a save that fails all that was there is there."""
    saver = Saver(tmp_path, 3, lambda _: None)
    for step in (1, 2, 3):
        saver.save(tensors_of(step), state_of(step), best=False, final=True)
    monkeypatch.setattr(os, "fsync", broken(errno.ENOSPC))
    saver.save(tensors_of(4), state_of(4), best=False)
    saver.wait()
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["3", "2", "1"]


def test_a_late_best_one_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A best one that is written after a newer one moves best.json, and last.json does not go back."""
    write, refused = module.save_checkpoint, {2}

    def choosy(run: Path, tensors: Any, state: Any) -> Checkpoint:
        if state["step"] in refused:
            raise UserError("refused") from OSError(errno.ENOSPC, "full")
        return write(run, tensors, state)

    monkeypatch.setattr(nrat_scale.checkpoint.saver, "save_checkpoint", choosy)
    saver = Saver(tmp_path, 2, lambda _: None)
    for step in (1, 2, 3):
        saver.save(tensors_of(step), state_of(step), best=step < 3)
        saver.wait()
    assert (named_checkpoint(tmp_path, "last").step, named_checkpoint(tmp_path, "best").step) == (3, 1)
    refused = {4}
    saver.save(tensors_of(4), state_of(4), best=False)
    saver.wait()
    assert (named_checkpoint(tmp_path, "last").step, named_checkpoint(tmp_path, "best").step) == (3, 2)


def test_too_little_room_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real size of the tensors is compared with what is free, before anything is written."""
    size = sum(value["w"].nbytes for value in tensors_of(1).values())
    warnings: list[str] = []
    saver = Saver(tmp_path, 1, warnings.append)
    for free, step in ((size + (1 << 20) - 1, 1), (size + (1 << 20), 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        saver.save(tensors_of(step), state_of(step), best=False)
        saver.wait()
    assert len(warnings) == 1 and "are free" in warnings[0] and "step 1." in warnings[0]
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["2"]


def _save_under_a_limit(run: Path, connection: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    warnings: list[str] = []

    def tell() -> None:
        connection.send(([named_checkpoint(run, name).step for name in ("last", "best")], len(warnings)))

    saver = Saver(run, 1, warnings.append)
    saver.save(tensors_of(1), state_of(1), best=True, final=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    for step in (2, 3):
        saver.save(tensors_of(step), state_of(step), best=step == 2)
        saver.wait()
        tell()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    saver.save(tensors_of(4), state_of(4), best=False, final=True)
    tell()
    connection.send(warnings)


def test_writes_that_the_system_refuses(tmp_path: Path) -> None:
    """With real errors of the system the run goes on with its last good checkpoint, and a best one is made up for."""
    process, connection = in_child(_save_under_a_limit, tmp_path)
    process.join(60)
    process.kill()
    # With step 3, step 2 is refused once more; then there is room for both.
    *steps, warnings = told(connection)
    assert steps == [([1, 1], 1), ([1, 1], 3), ([4, 2], 3)]
    assert all("File too large" in sentence and "goes on" in sentence for sentence in warnings)
    assert process.exitcode == 0
    assert torch.equal(named_checkpoint(tmp_path, "best").tensors("ema")["w"], tensors_of(2)["ema"]["w"])
    assert not list((tmp_path / "checkpoints").glob(".*"))


# ---- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_before_every_file_operation() -> None:
    """Not only at random moments: whichever operation of a save is its last, the run goes on from a whole checkpoint."""
    row = operations(0)
    assert row.wrong == []
    assert row.lost_steps == 1
    assert row.trials > 40, "reading, writing, renaming, pointers and removal of two saves are more"


def test_killed_at_random_moments() -> None:
    """A process that saves without a pause is killed; what is found is the last checkpoint or the one before, exactly."""
    row = checkpoints(12)
    assert row.wrong == []
    assert row.lost_steps <= 1


def test_the_table_of_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One command prints a row for each campaign, and a wrong result is told and ends with status 1."""
    row = SimpleNamespace(fault="Made up", lost_steps=4, wrong=["trial 2: nothing is left"], note="")
    monkeypatch.setitem(CAMPAIGNS, "checkpoints", (lambda trials: SimpleNamespace(trials=trials, **vars(row)), 9))
    with pytest.raises(SystemExit, match="1"):
        faults_main(["checkpoints", "--trials", "3"])
    printed = capsys.readouterr()
    assert "| Made up | 3 | 4 | 1 |" in printed.out
    assert "nothing is left" in printed.err
    with pytest.raises(UserError, match="no campaign 'chekpoints'"):
        faults_main(["chekpoints"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_continues_exactly(kind: type, tmp_path: Path) -> None:
    """Five steps equal three steps, a save, a load into a new optimizer and two more, bit for bit."""

    def run(steps: range, model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()

    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.01, **options)

    whole, optimizer = make()
    run(range(5), whole, optimizer)
    first, optimizer = make()
    run(range(3), first, optimizer)
    tensors = {"model": dict(first.state_dict()), "optimizer": optimizer_tensors(optimizer, first)}
    saved = open_checkpoint(save_checkpoint(tmp_path, tensors, {"step": 3, "epoch": 1}).folder)
    second, optimizer = make()
    second.load_state_dict(saved.tensors("model"))
    load_optimizer_tensors(optimizer, second, saved.tensors("optimizer"))
    run(range(3, 5), second, optimizer)
    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)
    with pytest.raises(UserError, match="does not fit"):
        load_optimizer_tensors(optimizer, second, {"weight/momentum_buffer": torch.zeros(2, 2)})
