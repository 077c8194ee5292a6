"""Atomic writes, JSON files, manifests."""

import errno
import os
from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import (
    make_folder,
    manifest_entry,
    manifest_mismatch,
    parse_json,
    read_json,
    write_atomically,
    write_json,
)
from tests.support.checkpoints import failing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The old content stays, no temporary file is left, and the sentence names the file and the reason."""
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"a\.json cannot be written \(No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip(tmp_path: Path) -> None:
    """A JSON object comes back; NaN is refused before anything is written."""
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 0.1, None]})
    assert read_json(path, "file") == {"a": [1, 0.1, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert read_json(path, "file") == {"a": [1, 0.1, None]}


def test_unreadable_json_is_a_sentence(tmp_path: Path) -> None:
    """A missing file, a folder, and content that is not a JSON object are named with what they should be."""
    with pytest.raises(UserError, match=r"There is no index at .*a\.json"):
        read_json(tmp_path / "a.json", "index")
    with pytest.raises(UserError, match=r"The index .* cannot be read \(Is a directory\)"):
        read_json(tmp_path, "index")
    for content in (b"", b"\xff", b"{", b"[" * 100_000):
        with pytest.raises(UserError, match="The index here is damaged: it is not valid JSON"):
            parse_json(content, "index", "here")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        parse_json(b"[]", "index", "here")


def test_manifest_entries(tmp_path: Path) -> None:
    """The entry of bytes and of a file agree, and match the file until its content, size or entry changes."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    entry = manifest_entry(path)
    assert entry == manifest_entry(b"content") and entry["bytes"] == 7
    assert manifest_mismatch(path, entry) is None
    for wrong in (None, [], {}, {**entry, "bytes": 8}, {**entry, "sha256": "0" * 64}, {"sha256": entry["sha256"]}):
        assert manifest_mismatch(path, wrong) == "a.bin does not match its size and sha256"
    path.write_bytes(b"Content")
    assert manifest_mismatch(path, entry) == "a.bin does not match its size and sha256"
    path.unlink()
    assert manifest_mismatch(path, entry) == "a.bin is missing"


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the way and a read-only folder are sentences."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        make_folder(tmp_path / "file" / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written to"):
        make_folder(tmp_path / "b")
