"""Verification of shards: every damage is found, and so is every contradiction to the index."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.verify import verify
from tests.support.preparation import flip_bit, is_one_sentence, random_source, small_shards, tree


def test_whole_shards_pass(tmp_path, cli):
    """One line and exit status 0, with stored ids and merged too, and for some of the shards."""
    small_shards(tmp_path / "all" / "a")
    small_shards(tmp_path / "all" / "b", ids=np.arange(70)[::-1])
    assert cli("merge", tmp_path / "all/a", tmp_path / "all/b", "--out", tmp_path / "all/index.json").status == 0
    for where, shards in (("a", 3), ("b", 3), ("", 6), ("a/shard-{00000..00001}.tar", 2)):
        result = cli("verify", f"{tmp_path}/all/{where}")
        assert result.status == 0 and f"all {shards} shards" in result.out and result.out.count("\n") == 1
        assert result.err == ""


def test_every_unusable_shard_is_named(tmp_path, cli):
    """Not only the first: one message lists up to ten shards that have to be copied again."""
    folder = small_shards(tmp_path / "a", block_size=4, shard_size=4)  # 18 shards
    (folder / "shard-00003.tar").unlink()
    (folder / "shard-00005.tar").write_bytes(b"short")
    flip_bit(folder / "shard-00007.tar", 900)
    result = cli("verify", folder)
    assert is_one_sentence(result, "has 3 problems")
    for words in (
        "shard-00003.tar: it cannot be opened (No such file",
        "shard-00005.tar: it has 5 bytes",
        "shard-00007.tar: its sha256",
    ):
        assert words in result.err
    for path in folder.glob("*.tar"):
        path.unlink()
    result = cli("verify", folder)
    assert (
        is_one_sentence(result, "has 18 problems") and result.err.count("No such file") == 10 and "8 more" in result.err
    )


def _rehashed(folder: Path, shard: int, data: bytes) -> None:
    """Replace a shard by `data` and update size and hash in the index: only the content can betray it."""
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][shard]
    (folder / entry["name"]).write_bytes(data)
    entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def _block(folder: Path, shard: int, number: int) -> list[int]:
    return json.loads((folder / "index.json").read_text())["shards"][shard]["blocks"][number]


CONTENTS = {
    "tar header": (lambda d, b: d.__setitem__(slice(0, 8), b"xxxxxxxx"), "no tar header at byte 0"),
    "npy magic": (lambda d, b: d.__setitem__(slice(512, 514), b"xx"), "no readable .npy header"),
    "dtype": (lambda d, b: d.__setitem__(slice(0, b[0]), bytes(d[: b[0]]).replace(b"|u1", b"|i1")), "is not the array"),
    "shape": (lambda d, b: d.__setitem__(slice(0, b[0]), bytes(d[: b[0]]).replace(b"(16, 8, 6", b"(16, 6, 8")), "is not the array"),
    "label too high": (lambda d, b: d.__setitem__(slice(b[1], b[1] + 8), (3).to_bytes(8, "little")), "labels outside 0..2"),
    "negative label": (lambda d, b: d.__setitem__(slice(b[1], b[1] + 8), b"\xff" * 8), "labels outside 0..2"),
    "other label": (lambda d, b: d.__setitem__(b[1], (d[b[1]] + 1) % 3), "class counts of the index"),
    "id too high": (lambda d, b: d.__setitem__(slice(b[3], b[3] + 8), (70).to_bytes(8, "little")), "ids outside 0..69"),
    "negative id": (lambda d, b: d.__setitem__(slice(b[3], b[3] + 8), b"\xff" * 8), "ids outside 0..69"),
    "same id twice": (lambda d, b: d.__setitem__(slice(b[3], b[3] + 8), d[b[3] + 8 : b[3] + 16]), "name two samples"),
    "something behind": (lambda d, b: d.__setitem__(-1, 1), "does not end where"),
    "cut end": (lambda d, b: d.__delitem__(slice(-9728, None)), "does not end where"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_content_that_contradicts_the_index_is_found(tmp_path, cli, name):
    """A hash proves that a shard is the indexed one; its members are still compared with the index one by one."""
    damage, words = CONTENTS[name]
    folder = small_shards(tmp_path / "a", ids=np.arange(70))
    data = bytearray((folder / "shard-00001.tar").read_bytes())
    damage(data, _block(folder, 1, 0))
    assert data != (folder / "shard-00001.tar").read_bytes()
    _rehashed(folder, 1, bytes(data))
    result = cli("verify", folder)
    assert is_one_sentence(result, words) and (name == "same id twice" or "shard-00001.tar: " in result.err)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_a_changed_tar_that_passes_is_the_same_data(data):
    """Any changed byte, with an updated hash in the index, is found, unless it is a pixel or changes no label."""
    with tempfile.TemporaryDirectory() as name:
        folder = small_shards(Path(name) / "a", random_source(20, (4, 4, 1)))
        whole = (folder / "shard-00000.tar").read_bytes()
        block = _block(folder, 0, 0)
        place = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(0, block[0] - 1)))
        changed = bytearray(whole)
        changed[place] ^= data.draw(st.integers(1, 255))
        _rehashed(folder, 0, bytes(changed))
        try:
            verify(str(folder))
        except UserError:
            return
        assert any(at <= place < at + 16 * n for b in (block, _block(folder, 0, 1)) for at, n in ((b[0], b[2]),)) or (
            np.array_equal(open_shards(folder).labels(np.arange(20)), _labels(whole, folder))
        )


def _labels(whole: bytes, folder: Path) -> np.ndarray:
    """The labels in the undamaged bytes of the first shard."""
    blocks = [_block(folder, 0, number) for number in range(2)]
    return np.concatenate([np.frombuffer(whole, "<i8", count, offset) for _, offset, count in blocks])


def test_verify_reads_an_address(tmp_path, cli, server, monkeypatch):
    """Remote shards are fetched and checked; one that is missing is named."""
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    server.files |= {f"/a/{name}": content for name, content in tree(small_shards(tmp_path / "a")).items()}
    result = cli("verify", f"{server.url}/a")
    assert result.status == 0 and "all 3 shards (70 images" in result.out
    shutil.rmtree(tmp_path / "cache")
    del server.files["/a/shard-00001.tar"]
    assert is_one_sentence(cli("verify", f"{server.url}/a"), "shard-00001.tar: ")
