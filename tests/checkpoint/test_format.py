"""One checkpoint folder: exact, reproducible, refused after any damage, atomic."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nrat_scale.checkpoint.folder import checkpoint_folders, newest_checkpoint
from nrat_scale.checkpoint.format import open_checkpoint
from nrat_scale.core.errors import UserError
from tests.support.checkpoints import edit_manifest, failing, save, small_tensors


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """Every tensor, type and number is restored exactly; an empty group has no file."""
    found = open_checkpoint(save(tmp_path, 20).folder)
    assert (found.step, found.state["loss"], found.evaluated) == (20, 0.1 + 0.2, "ema")
    for name, tensors in small_tensors(20).items():
        loaded = found.tensors(name)
        assert loaded.keys() == tensors.keys()
        for key, value in tensors.items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value)
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(["manifest.json", *found.sha256])


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    """Equal values give equal bytes, so that hashes can prove bit-equality of runs."""
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "empty", "delete"])
def test_every_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    """A damaged file is named, and training resumes from the previous checkpoint."""
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
    found, refused = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert len(refused) == 1
    assert name in refused[0]


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """A manifest has no hash of its own; even so, any changed byte of it makes the checkpoint damaged."""
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
    """A JSON object that is not a manifest ends in one printable sentence, and nothing outside the folder is read."""
    folder = save(tmp_path, 20).folder
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged") as caught:
        open_checkpoint(folder)
    str(caught.value).encode()


def test_a_file_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    """A manifest that lost an entry does not make a checkpoint without a model."""
    folder = save(tmp_path, 20).folder
    edit_manifest(folder, lambda manifest: manifest.pop("model.safetensors"))
    with pytest.raises(UserError, match=r"does not name model\.safetensors"):
        open_checkpoint(folder)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    """A folder that was renamed by hand is not taken for another step."""
    folder = save(tmp_path, 20).folder
    with pytest.raises(UserError, match="that of step 20"):
        open_checkpoint(folder.rename(folder.with_name("step-00000030")))


def test_saving_a_step_again(tmp_path: Path) -> None:
    """The new checkpoint takes the place; an intact old one is removed, a damaged one is kept under another name."""
    save(tmp_path, 20)
    folder = save(tmp_path, 20).folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / "state.json").write_text("")
    save(tmp_path, 20)
    assert open_checkpoint(folder).step == 20
    assert len(list(folder.parent.glob(".step-00000020.replaced-*"))) == 1


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up during a save leaves no temporary file, and the earlier checkpoint intact."""
    good = save(tmp_path, 10)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 20)
    assert checkpoint_folders(tmp_path) == list((tmp_path / "checkpoints").iterdir()) == [good.folder]
    assert open_checkpoint(good.folder).step == 10


def test_free_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the tensors and 1 MB are compared with the free space, before anything is written."""
    needed = (1 << 20) + sum(t.nbytes for tensors in small_tensors(1).values() for t in tensors.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match="are free"):
        save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    save(tmp_path, 2)
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["2"]
