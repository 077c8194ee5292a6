"""Damaged shards and wrong indexes: every one of hundreds is refused with one sentence before the first batch."""

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, ValidationSpec
from nrat_scale.data.training_data import open_training_data
from tests.support.numbered_shards import numbered_shards

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_shards(tmp_path_factory.mktemp("whole"), 40, size=4)


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(kind, content) of damaged versions of a shard."""
    for place in range(512):  # the first member's header
        yield "a byte of the tar header", content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :]
    for end in range(0, len(content), 512):
        yield "cut at a block", content[:end]
    for place in range(513, len(content), 997):
        yield "a bit of the content", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield "empty", b""
    yield "HTML", HTML
    yield "HTML of the right size", HTML.ljust(len(content))
    yield "gzip", gzip.compress(content)
    yield "too long", content + bytes(512)


def test_every_damaged_shard_is_refused(whole: Path, tmp_path: Path) -> None:
    """A shard with any wrong byte is named, and training does not start."""
    folder = shutil.copytree(whole, tmp_path / "data")
    spec = DataSpec(batch_size=4, real=RealSpec(str(folder)), validation=ValidationSpec(size=10))
    path = folder / "shard-00000.tar"
    content = path.read_bytes()
    counts: Counter[str] = Counter()
    for kind, wrong in damages(content):
        (folder / ".verified.json").unlink(missing_ok=True)
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"shard-00000\.tar of data\.real\.shards cannot be used"):
            open_training_data(spec, 0)
        counts[kind] += 1
    assert counts["a byte of the tar header"] == 512
    assert counts["cut at a block"] == len(content) // 512
    assert sum(counts.values()) > 530
    path.write_bytes(content)
    open_training_data(spec, 0)  # the undamaged shard is accepted


def relabel(folder: Path, value: int) -> None:
    """Set the first label to `value`; the index has the hash of the changed shard, so that only the content is wrong."""
    index = json.loads((folder / "index.json").read_text())
    path, at = folder / "shard-00000.tar", index["shards"][0]["blocks"][0][1]
    content = bytearray(path.read_bytes())
    content[at : at + 8] = value.to_bytes(8, "little", signed=True)
    path.write_bytes(content)
    index["shards"][0]["sha256"] = sha256_of(path)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("value", [-1, 10, 2**40])
def test_labels_outside_the_classes_are_refused(whole: Path, tmp_path: Path, value: int) -> None:
    """A label outside the classes is refused even if the shard agrees with its index."""
    folder = shutil.copytree(whole, tmp_path / "data")
    relabel(folder, value)
    spec = DataSpec(batch_size=4, real=RealSpec(str(folder)), validation=ValidationSpec(size=10))
    with pytest.raises(UserError, match="label"):
        open_training_data(spec, 0)
    generated = replace(
        spec,
        real=RealSpec(),
        generated=GeneratedSpec(str(folder), 1.0),
        validation=ValidationSpec(source="generated", size=10),
    )
    with pytest.raises(UserError, match="label"):
        list(open_training_data(generated, 0).batches(0, 20))
