"""The index: complete, consistent, and hostile values refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of
from nrat_scale.data.index import FORMAT, VERSION
from nrat_scale.data.shards import ShardSet, open_shards
from tests.support.small_shards import random_source, write_small


def test_index_describes_the_data(folder):
    """Class names, histogram, source files and shapes are known without reading an image."""
    source, shards = random_source(), open_shards(folder)
    assert shards.class_names == source.class_names and shards.num_classes == 7
    assert shards.class_counts == tuple(np.bincount(source.labels, minlength=7))
    assert shards.dataset == "custom" and shards.source_files == [{"name": "made.npz"}]
    index = json.loads((folder / "index.json").read_text())
    assert [shard["bytes"] for shard in index["shards"]] == [p.stat().st_size for p in sorted(folder.glob("*.tar"))]
    assert [shard["sha256"] for shard in index["shards"]] == [sha256_of(p) for p in sorted(folder.glob("*.tar"))]
    assert [len(shard["blocks"]) for shard in index["shards"]] == [2, 2, 1]


def test_the_fingerprint_identifies_the_data(tmp_path, folder):
    """A run can be resumed after its shards were moved, but not with other shards."""
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "moved")
    assert open_shards(moved).fingerprint == open_shards(folder).fingerprint
    other = write_small(tmp_path / "other", random_source(seed=1))
    assert open_shards(other).fingerprint != open_shards(folder).fingerprint
    assert open_shards(write_small(tmp_path / "seed", seed=1)).fingerprint != open_shards(folder).fingerprint


FIELDS = [
    "format", "version", "dataset", "class_names", "image_shape", "num_images", "class_counts", "parts", "source", "shards",
]  # fmt: skip
REMOVED = [(field,) for field in FIELDS]

REMOVED += [("parts", 0), *(("parts", 0, field) for field in ("num_images", "first_id", "num_ids", "seed"))]

REMOVED += [("shards", 1, field) for field in ("name", "bytes", "sha256", "class_counts", "blocks")]

REMOVED += [("shards", 1), ("shards", 1, "blocks", 0), ("shards", 1, "blocks", 0, 2)]
ALTERED = [
    ("format", "something else"), ("version", 3), ("version", 1), ("version", "2"), ("class_names", ["a", "b"]), ("class_names", 7),
    ("class_names", []), ("image_shape", [8, 6]), ("image_shape", [8, 6, 1]), ("image_shape", [16, 16, 3]),
    ("image_shape", [-8, -6, 3]), ("image_shape", [0, 6, 3]), ("image_shape", [2**40, 2**40, 3]), ("image_shape", "8x6"),
    ("num_images", 71), ("num_images", 0), ("num_images", -70), ("num_images", "many"), ("num_images", float("inf")),
    ("num_images", None), ("class_counts", [70]), ("class_counts", [1] * 7), ("class_counts", [-1, 71, 0, 0, 0, 0, 0]),
    ("parts", []), ("parts", 0, "num_images", 69), ("parts", 0, "seed", None), ("parts", 0, "num_ids", 71), ("source", None),
    ("parts", 0, "first_id", -1), ("shards", []), ("shards", 1, "class_counts", [32]), ("shards", 1, "name", "shard-00000.tar"),
    ("shards", {}), ("shards", 1, "bytes", 10), ("shards", 1, "bytes", 2**80), ("shards", 1, "bytes", "many"),
    ("shards", 1, "blocks", []), ("shards", 1, "blocks", "none"), ("shards", 1, "blocks", [[1, 2]]),
    ("shards", 1, "blocks", 0, 0, -1), ("shards", 1, "blocks", 0, 0, 10**9), ("shards", 1, "blocks", 0, 0, 10**30),
    ("shards", 1, "blocks", 0, 1, -1), ("shards", 1, "blocks", 0, 1, 640), ("shards", 1, "blocks", 0, 1, 10**9),
    ("shards", 1, "blocks", 0, 2, 15), ("shards", 1, "blocks", 0, 2, 2**61), ("shards", 1, "blocks", 0, 2, -16),
    ("shards", 1, "blocks", 1, [640, 3200, 16, 32]), ("shards", 1, "blocks", 1, [640, 3200, 16, -1, 0]),
]  # fmt: skip
HOSTILE = [
    "../x.tar",
    "/etc/passwd",
    "a/../b.tar",
    "a//b.tar",
    "a/.b/c.tar",
    "shard\0.tar",
    ".hidden.tar",
    "shard.zip",
    "pipe:ls|x.tar",
    "x.tar\n",
    "",
]
ALTERED += [("shards", 0, "name", name) for name in HOSTILE]


def _refused(folder: Path, index: dict) -> bool:
    path = folder / "index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        open_shards(folder, "data.real.shards")
    return str(path) in str(caught.value)


@pytest.mark.parametrize("keys", REMOVED, ids=str)
def test_an_index_that_lacks_a_field_is_refused(folder, keys):
    """Readers trust the index, so every field must be present."""
    index = part = json.loads((folder / "index.json").read_text())
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    assert _refused(folder, index)


@pytest.mark.parametrize("keys_and_value", ALTERED, ids=str)
def test_an_index_with_an_impossible_value_is_refused(folder, keys_and_value):
    """Wrong types, numbers that contradict each other or overflow, and names that lead out of the folder."""
    *keys, value = keys_and_value
    index = part = json.loads((folder / "index.json").read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    assert _refused(folder, index)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\ud800", "[" * 100_000, '{"format": "nrat_scale.shards"}'])
def test_a_file_that_is_not_an_index_is_refused(folder, content):
    """Empty, truncated, another JSON type, not text, nested too deeply."""
    (folder / "index.json").write_bytes(content.encode("utf-16" if content == "\ud800" else "utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"index\.json"):
        open_shards(folder)


def test_an_index_of_50_million_images():
    """Ids and positions of a huge set need no memory that grows with it, and no file."""
    num_shards, per_shard = 977, 51_200
    n = num_shards * per_shard
    block = [640, 640 + 512 * 64 + 600, 512]
    shard = {"bytes": 157_000_000, "sha256": "0" * 64, "class_counts": [5120] * 10, "blocks": [block] * 100}
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": "custom",
        "class_names": list("0123456789"),
        "image_shape": [8, 8, 1],
        "num_images": n,
        "class_counts": [n // 10] * 10,
        "source": [],
        "parts": [{"num_images": n, "first_id": 0, "num_ids": n, "seed": 0}],
        "shards": [{"name": f"shard-{i:05d}.tar", **shard} for i in range(num_shards)],
    }
    found = ShardSet("nowhere", index, "the data")
    assert len(found) == 50_022_400
    positions = np.random.default_rng(0).integers(0, n, 1000)
    assert np.array_equal(found.positions_of(found.source_ids(positions)), positions)
