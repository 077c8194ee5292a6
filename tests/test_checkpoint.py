"""Checkpoints are whole or refused, fall back one by one, and give back every bit."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nrat_scale import checkpoint as checkpoints
from nrat_scale.checkpoint import (
    Checkpoint,
    Tensors,
    checkpoint_folders,
    load_optimizer_tensors,
    named_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    optimizer_tensors,
    prune,
    save_checkpoint,
    write_pointer,
)
from nrat_scale.errors import UserError

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
    return save_checkpoint(run, TENSORS, {"step": step, "epoch": step // 10, "loss": 0.1 + 0.2})


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
    assert save(tmp_path / "a", 1).sha256 == save(tmp_path / "b", 1).sha256


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


def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a save leaves no part of it, and what was there before."""
    good = save(tmp_path, 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 20)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [good.folder.name]
    assert open_checkpoint(good.folder).step == 10


def test_pointers_and_pruning(tmp_path: Path) -> None:
    """best and last survive pruning beside the newest; a pointer cannot lead out of the run."""
    for step in (10, 20, 30, 40, 50):
        saved = save(tmp_path, step)
        write_pointer(tmp_path, "last", saved)
        if step == 20:
            write_pointer(tmp_path, "best", saved)
    prune(tmp_path, keep=2)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["50", "40", "20"]
    assert (named_checkpoint(tmp_path, "best").step, named_checkpoint(tmp_path, "last").step) == (20, 50)
    (tmp_path / "checkpoints" / "best.json").write_text(json.dumps({"folder": "../../elsewhere"}))
    with pytest.raises(UserError, match="not there"):
        named_checkpoint(tmp_path, "best")
    with pytest.raises(UserError, match="no 'best' checkpoint"):
        named_checkpoint(tmp_path / "other", "best")


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
