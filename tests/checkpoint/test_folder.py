"""The checkpoints of a run: pointers, pruning, recovery after a kill."""

from pathlib import Path

import pytest

from nrat_scale.checkpoint.folder import (
    checkpoint_folders,
    named_checkpoint,
    newest_checkpoint,
    prune,
    queue_release,
    recover,
    write_pointer,
)
from nrat_scale.core.errors import UserError
from tests.support.checkpoints import save


def test_a_run_without_an_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    """If every checkpoint is damaged, the run does not silently start from step 0."""
    (save(tmp_path, 10).folder / "state.json").unlink()
    with pytest.raises(
        UserError, match=r"cannot be resumed from any checkpoint.*step-00000010 is damaged: state\.json"
    ):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "empty") == (None, [])


def test_pointers_and_pruning(tmp_path: Path) -> None:
    """Pruning keeps the newest, best and last; without a pointer there is a sentence."""
    for step in (10, 20, 30, 40, 50):
        saved = save(tmp_path, step)
        write_pointer(tmp_path, "last", saved)
        if step == 20:
            write_pointer(tmp_path, "best", saved)
    prune(tmp_path, keep=2)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["50", "40", "20"]
    assert (named_checkpoint(tmp_path, "best").step, named_checkpoint(tmp_path, "last").step) == (20, 50)
    prune(tmp_path, keep=0)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["50", "20"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no 'best' checkpoint"):
        named_checkpoint(tmp_path / "other", "best")
    with pytest.raises(UserError, match=r"There is no folder .*/othr\. Did you mean .*/other\?"):
        named_checkpoint(tmp_path / "othr", "best")


def test_pruning_keeps_what_a_rewind_needs(tmp_path: Path) -> None:
    """The newest checkpoint that is known to be good, and the initial weights in case its successors collapse too."""
    for step in (0, 10, 20, 30, 40):
        write_pointer(tmp_path, "last", save(tmp_path, step))
    prune(tmp_path, keep=1, good_until=25)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["40", "20", "00"]
    prune(tmp_path, keep=1, good_until=40)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["40", "00"]
    prune(tmp_path, keep=1)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["40"]


def test_pruning_ignores_checkpoints_newer_than_last(tmp_path: Path) -> None:
    """A damaged newer checkpoint, which the run did not resume from, is not counted and not removed."""
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
def test_damaged_pointers_are_noticed(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged pointer is named, cannot lead outside the run, and stops pruning; `recover` rewrites last.json."""
    for step in (20, 30, 40):
        write_pointer(tmp_path, "last", save(tmp_path, step))
    path = tmp_path / "checkpoints" / "best.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"best\.json"):
        named_checkpoint(tmp_path, "best")
    seen_by_itself = b'"epoch": 3' not in content  # a wrong epoch is only seen by comparison with the checkpoint
    if seen_by_itself:
        prune(tmp_path, keep=1)
        assert "No old checkpoint is removed" in capsys.readouterr().err
        assert len(checkpoint_folders(tmp_path)) == 3
    path.unlink()
    (tmp_path / "checkpoints" / "last.json").write_bytes(content)
    recover(tmp_path)
    if seen_by_itself:
        assert named_checkpoint(tmp_path, "last").step == 40


def test_a_pointer_to_a_damaged_checkpoint(tmp_path: Path) -> None:
    """Evaluating a damaged best checkpoint says which folder, which file and what is wrong."""
    saved = save(tmp_path, 20)
    write_pointer(tmp_path, "best", saved)
    (saved.folder / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        named_checkpoint(tmp_path, "best")
    assert str(caught.value) == (
        f"The checkpoint {saved.folder} is damaged: ema.safetensors does not match its size and sha256."
    )
    saved.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which does not exist"):
        named_checkpoint(tmp_path, "best")


def test_recover_removes_only_temporary_files_of_saves(tmp_path: Path) -> None:
    """Files of a killed save are removed; everything else stays, however similar its name."""
    folder = save(tmp_path, 10).folder.parent
    temporary = [".step-00000020.0123456789ab.tmp", ".best.json.0123456789ab.tmp"]
    others = [".step-00000020.0123456789ab", "step-00000020.0123456789ab.tmp", ".mine.tmp", ".step-20.0123456789ab.tmp",
              ".other.json.0123456789ab.tmp", "notes.txt", ".step-00000005.collapsed-01234567"]  # fmt: skip
    (folder / temporary[0]).mkdir()
    (folder / temporary[0] / "model.safetensors").write_text("part")
    for name in (temporary[1], *others):
        (folder / name).write_text("")
    recover(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["last.json", "step-00000010", *others])
    recover(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_recover_restores_a_replaced_checkpoint(tmp_path: Path) -> None:
    """A save of the same step that was killed between its two renames loses nothing."""
    folder = save(tmp_path, 10).folder
    folder.rename(folder.with_name(f".{folder.name}.replaced-01234567"))
    recover(tmp_path)
    assert named_checkpoint(tmp_path, "last").folder == folder


def test_weights_are_queued_once(tmp_path: Path) -> None:
    """The EMA is copied with its facts; an existing folder is not changed; a copy that differs is refused."""
    checkpoint = save(tmp_path, 20)
    folder = queue_release(tmp_path, checkpoint)
    assert (folder / "model.safetensors").read_bytes() == (checkpoint.folder / "ema.safetensors").read_bytes()
    (folder / "queued.json").write_text("mine")
    assert queue_release(tmp_path, checkpoint) == folder == tmp_path / "releases" / "epoch-0002"
    assert (folder / "queued.json").read_text() == "mine"
    other = save(tmp_path, 30)
    (other.folder / "ema.safetensors").write_bytes(b"damaged after it was verified")
    with pytest.raises(UserError, match="has another sha256"):
        queue_release(tmp_path, other)
    assert list(folder.parent.iterdir()) == [folder]
