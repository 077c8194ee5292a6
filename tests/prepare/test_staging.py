"""Output folders: whole or absent, never overwritten, one writer at a time; a killed writer leaves one hidden folder."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nrat_scale.prepare.readers
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import unfinished_sibling
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.staging import staged
from tests.support.preparation import random_source, small_shards, tree

FORK = multiprocessing.get_context("fork")  # nothing has to be imported again


class _Pausing:
    """Images whose third block waits until the test says so."""

    def __init__(self, reached, resume) -> None:
        self._images, self._calls = random_source().images, 0
        self._reached, self._resume = reached, resume
        self.shape = self._images.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self._calls += 1
        if self._calls == 3:
            self._reached.set()
            assert self._resume.wait(60)
        return self._images[rows]


@pytest.fixture
def paused(tmp_path):
    """(a process that has written one shard of tmp_path/out and waits, the event that lets it finish)."""
    reached, resume = FORK.Event(), FORK.Event()
    source = replace(random_source(), images=_Pausing(reached, resume))
    process = FORK.Process(target=small_shards, args=(tmp_path / "out", source))
    process.start()
    assert reached.wait(60)
    yield process, resume
    process.kill()
    process.join()


def test_a_killed_writer_leaves_one_hidden_folder(tmp_path, paused):
    """SIGKILL after the first shard: no --out; the same command removes the rest and gives the bytes of a quiet run."""
    process, _ = paused
    process.kill()
    process.join()
    hidden = unfinished_sibling(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [hidden] and (hidden / "whole" / "shard-00000.tar").exists()
    (hidden / "whole" / "index.json").write_text("left over")
    (hidden / "scratch" / "image").write_text("left over")
    small_shards(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert tree(tmp_path / "out") == tree(small_shards(tmp_path / "undisturbed"))


def test_two_writers_of_one_place(tmp_path, paused):
    """The second one ends with a sentence and does not disturb the first."""
    process, resume = paused
    with pytest.raises(UserError, match="Another process is writing"):
        small_shards(tmp_path / "out")
    resume.set()
    process.join(60)
    assert process.exitcode == 0
    open_shards(tmp_path / "out").verify()
    with pytest.raises(UserError, match="never overwritten"):
        small_shards(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_out_that_appears_meanwhile_is_not_overwritten(tmp_path):
    """A folder that somebody else makes at --out while the shards are written stays."""
    out = tmp_path / "out"

    def write_while_somebody_else_does() -> None:
        with staged(out) as staging:
            (staging.whole / "index.json").write_text("mine")
            out.mkdir()
            (out / "notes.txt").write_text("keep me")

    with pytest.raises(UserError, match="not empty"):
        write_while_somebody_else_does()
    assert tree(tmp_path) == {"out": None, "out/notes.txt": b"keep me"}


def test_scratch_files_are_removed(tmp_path):
    """Only what was written to `whole` remains."""
    with staged(tmp_path / "new" / "out") as staging:
        (staging.scratch / "large").write_text("temporary")
        (staging.whole / "sub").mkdir()
        (staging.whole / "sub" / "file").write_text("kept")
    assert tree(tmp_path) == {"new": None, "new/out": None, "new/out/sub": None, "new/out/sub/file": b"kept"}


def test_out_may_be_the_empty_current_folder(tmp_path, monkeypatch):
    """`--out .` has no name for a hidden sibling."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    small_shards(Path())
    open_shards(tmp_path / "here").verify()


@pytest.mark.parametrize("place", ["full folder", "file", "link", "below a file", "name too long", "no permission"])
def test_an_impossible_out_is_a_sentence(tmp_path, cli, monkeypatch, place):
    """--out is never overwritten, and is checked before gigabytes are read."""

    def never(*arguments: object) -> None:
        raise AssertionError("read before --out was checked")

    reader = nrat_scale.prepare.readers.READERS["npz"]
    monkeypatch.setitem(nrat_scale.prepare.readers.READERS, "npz", reader._replace(read=never))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out = {
        "full folder": tmp_path / "full",
        "file": tmp_path / "full" / "file",
        "link": tmp_path / "link",
        "below a file": tmp_path / "full" / "file" / "out",
        "name too long": tmp_path / "new" / ("x" * 300),
        "no permission": tmp_path / "new" / "out",
    }[place]
    if place == "no permission":
        monkeypatch.setattr("os.access", lambda *arguments: False)
    before = tree(tmp_path)
    result = cli("npz", tmp_path / "a.npz", "--out", out)
    assert result.status == 2 and result.err.startswith("error: ") and str(out.parent) in result.err
    assert result.err.count("\n") == 1 and tree(tmp_path) == before
