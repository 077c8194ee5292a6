"""Writing shards: byte-stable, complete or not there, never over other files."""

from dataclasses import replace

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.small_shards import listing, random_source, write_small


def test_same_arguments_give_the_same_bytes(tmp_path, monkeypatch):
    """Shards are reproducible: clock, host and folder do not change a byte."""
    first = listing(write_small(tmp_path / "one"))
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert listing(write_small(tmp_path / "deeper" / "two")) == first
    assert list(first) == ["index.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    assert listing(write_small(tmp_path / "other seed", seed=1)) != first


@pytest.mark.parametrize("there", ["shards", "a stray file", "a file in its place", "a dangling link"])
def test_nothing_is_ever_overwritten(tmp_path, there):
    """Whatever is at --out stays as it is."""
    out = tmp_path / "out"
    if there == "shards":
        write_small(out)
    elif there == "a stray file":
        out.mkdir()
        (out / "notes.txt").write_text("keep me")
    elif there == "a file in its place":
        out.write_text("keep me")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    with pytest.raises(UserError, match="never overwritten"):
        write_small(out, random_source(seed=1))
    assert listing(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_may_be_filled(tmp_path):
    """`mkdir` beforehand is allowed."""
    (tmp_path / "out").mkdir()
    open_shards(write_small(tmp_path / "out")).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class _BreaksInTheMiddle:
    shape = (70, 8, 6, 3)

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __getitem__(self, ids):
        self.calls += 1
        if self.calls == 4:  # in the second shard
            raise self.error
        return np.zeros((len(ids), 8, 6, 3), np.uint8)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, error):
    """No folder that looks like shards, and no temporary one, after a bug, Ctrl-C or a full disk."""
    source = replace(random_source(), images=_BreaksInTheMiddle(error))
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if expected is UserError else None):
        write_small(tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_a_user_error(tmp_path):
    """A file in place of a folder, or a name too long: the message names the place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_small(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="File name too long"):
        write_small(tmp_path / ("x" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_impossible_sizes_are_refused(tmp_path):
    """Block and shard sizes below 1, and a block too large for a ustar header."""
    for sizes in ({"block_size": 0}, {"shard_size": -5}):
        with pytest.raises(UserError, match="at least 1"):
            write_shards(random_source(), tmp_path / "out", **sizes)
    huge = np.broadcast_to(np.uint8(0), (3_000_000, 32, 32, 3))  # no memory behind it
    source = LabelledArrays(huge, np.zeros(3_000_000, np.int64), "custom", ("0",))
    with pytest.raises(UserError, match="Lower --block-size"):
        write_shards(source, tmp_path / "out", block_size=2_000_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.zeros((70, 8, 6), np.uint8)}, r"\[N, H, W, C\]"),
        ({"images": np.zeros((70, 8, 6, 4), np.uint8)}, "1 or 3 channels"),
        ({"images": np.zeros((0, 8, 6, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "N > 0"),
        ({"images": np.zeros((69, 8, 6, 3), np.uint8)}, "69 images but 70 labels"),
        ({"class_names": ("only", "three", "classes")}, "--dataset"),
        ({"labels": np.full(70, -1)}, "-1"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(change, words):
    """Shapes, lengths and labels are checked before anything is written."""
    with pytest.raises(UserError, match=words):
        replace(random_source(), **change)
