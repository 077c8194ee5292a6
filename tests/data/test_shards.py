"""Shards: exact, byte-stable, readable by plain WebDataset, verified, and never half there."""

import gc
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

import nrat_scale.data.shards
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards


def _source(
    num_images: int = 70, shape: tuple[int, int, int] = (8, 6, 3), num_classes: int = 7, seed: int = 0
) -> LabelledArrays:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    labels = generator.integers(0, num_classes, num_images)
    return LabelledArrays(
        images, labels, "custom", tuple(f"class {i}" for i in range(num_classes)), ({"name": "made.npz"},)
    )


def _write(folder: Path, source: LabelledArrays | None = None, *, seed: int = 0) -> Path:
    """70 images: three shards of 32, 32 and 6, in blocks of 16."""
    return write_shards(source or _source(), folder, block_size=16, shard_size=32, seed=seed, progress=False)


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """Freshly written shards."""
    return _write(tmp_path / "shards")


# ---- what is written is what is read --------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    num_images=st.integers(1, 90),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3])),
    block_size=st.integers(1, 40),
    shard_size=st.integers(1, 100),
    seed=st.integers(0, 2**40),
)
def test_every_image_and_label_comes_back(num_images, shape, block_size, shard_size, seed):
    """Any size of data set, image, block and shard: source order and random access give the exact bytes."""
    source = _source(num_images, shape, seed=seed % 1000)
    with tempfile.TemporaryDirectory() as name:
        out = write_shards(
            source, Path(name) / "out", block_size=block_size, shard_size=shard_size, seed=seed, progress=False
        )
        shards = open_shards(out)
        shards.verify()
        per_shard = -(-shard_size // block_size) * block_size
        assert len(list(out.glob("*.tar"))) == -(-num_images // per_shard)
        assert len(shards) == num_images and shards.image_shape == shape
        assert np.array_equal(shards.images(shards.in_source_order()), source.images)
        assert np.array_equal(shards.labels(shards.in_source_order()), source.labels)
        positions = np.random.default_rng(seed).integers(0, num_images, 50)  # with repetitions, in no order
        ids = shards.source_ids(positions)
        assert np.array_equal(shards.images(positions), source.images[ids])
        assert np.array_equal(shards.labels(positions), source.labels[ids])
        assert shards.images(np.zeros(0, np.int64)).shape == (0, *shape)


def test_index_describes_the_data(folder):
    """Class names, histogram, source and shapes are known without reading an image."""
    source, shards = _source(), open_shards(folder)
    assert shards.class_names == source.class_names and shards.num_classes == 7
    assert shards.class_counts == tuple(np.bincount(source.labels, minlength=7))
    assert shards.dataset == "custom" and shards.source_files == [{"name": "made.npz"}]
    index = json.loads((folder / "index.json").read_text())
    assert [shard["bytes"] for shard in index["shards"]] == [p.stat().st_size for p in sorted(folder.glob("*.tar"))]
    assert [shard["sha256"] for shard in index["shards"]] == [sha256_of(p) for p in sorted(folder.glob("*.tar"))]
    assert [len(shard["blocks"]) for shard in index["shards"]] == [2, 2, 1]


def test_samples_are_permuted_when_written(tmp_path):
    """Published files are sorted by class: stored order must be the keyed permutation, another for another seed."""
    source = replace(_source(), labels=np.sort(_source().labels))
    labels = []
    for seed in (0, 1):
        shards = open_shards(_write(tmp_path / str(seed), source, seed=seed))
        labels.append(shards.labels(np.arange(70)))
        assert np.array_equal(labels[-1], source.labels[shards.source_ids(np.arange(70))])
        assert not np.array_equal(labels[-1], source.labels)
    assert not np.array_equal(*labels)


def test_same_arguments_give_the_same_bytes(tmp_path, monkeypatch):
    """Shards can be made again and compared: no clock, host or folder leaks into them."""
    first = _listing(_write(tmp_path / "one"))
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert _listing(_write(tmp_path / "deeper" / "two")) == first
    assert list(first) == ["index.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    assert _listing(_write(tmp_path / "other seed", seed=1)) != first


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the closing of files to the collector
def test_plain_webdataset_reads_the_same_samples(folder):
    """Another tool needs nothing of ours: stock WebDataset and numpy without pickle see the images in stored order."""
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(5)]
    images, labels = (
        np.concatenate([np.load(io.BytesIO(sample[member]), allow_pickle=False) for sample in samples])
        for member in ("images.npy", "labels.npy")
    )
    shards = open_shards(folder)
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(images, shards.images(np.arange(70)))
    assert np.array_equal(labels, shards.labels(np.arange(70)))
    with tarfile.open(paths[0]) as tar:
        assert {member.mtime for member in tar} == {0}


def test_a_copy_for_a_worker_process_reads_the_same(folder):
    """Data loader workers receive the shards by pickle: neither maps nor the permutation may get lost."""
    shards = open_shards(folder)
    expected = shards.images(shards.in_source_order())  # maps and permutation are in use
    copy = pickle.loads(pickle.dumps(shards))  # noqa: S301
    assert np.array_equal(copy.images(copy.in_source_order()), expected)


def test_positions_out_of_range_are_refused(folder):
    """A wrong position must not be answered with some other sample's bytes."""
    shards = open_shards(folder)
    for wrong in (-1, 70):
        with pytest.raises(AssertionError, match="no such sample"):
            shards.images(np.array([wrong]))


def test_fingerprint_names_the_data_and_not_the_folder(tmp_path, folder):
    """A checkpoint that records it can be resumed after the shards were moved, but not with other shards."""
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "moved")
    assert open_shards(moved).fingerprint == open_shards(folder).fingerprint
    other = _write(tmp_path / "other", _source(seed=1))
    assert open_shards(other).fingerprint != open_shards(folder).fingerprint
    assert open_shards(_write(tmp_path / "seed", seed=1)).fingerprint != open_shards(folder).fingerprint


# ---- writing ends whole or not at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["shards", "a stray file", "a file in its place", "a dangling link"])
def test_nothing_is_ever_overwritten(tmp_path, there):
    """Whatever lies at --out stays as it is."""
    out = tmp_path / "out"
    if there == "shards":
        _write(out)
    elif there == "a stray file":
        out.mkdir()
        (out / "notes.txt").write_text("keep me")
    elif there == "a file in its place":
        out.write_text("keep me")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = _listing(tmp_path)
    with pytest.raises(UserError, match="never overwritten"):
        _write(out, _source(seed=1))
    assert _listing(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_may_be_filled(tmp_path):
    """`mkdir` beforehand is no mistake."""
    (tmp_path / "out").mkdir()
    open_shards(_write(tmp_path / "out")).verify()
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
    source = replace(_source(), images=_BreaksInTheMiddle(error))
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if expected is UserError else None):
        _write(tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_is_a_plain_sentence(tmp_path):
    """A file where a folder is needed, or a name too long: the message names the place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        _write(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="File name too long"):
        _write(tmp_path / ("x" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_impossible_sizes_are_refused(tmp_path):
    """Block and shard sizes below 1, and a block whose tar member would need another header."""
    for sizes in ({"block_size": 0}, {"shard_size": -5}):
        with pytest.raises(UserError, match="at least 1"):
            write_shards(_source(), tmp_path / "out", **sizes)
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
        replace(_source(), **change)


# ---- damage is noticed and named ------------------------------------------------------------------------------------


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "cannot be opened"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes instead of"),
        (lambda path: path.write_bytes(b""), "0 bytes instead of"),
        (_flip_a_bit, "sha256"),
    ],
    ids=["missing", "truncated", "too long", "empty", "bit flipped"],
)
def test_verify_names_the_damaged_shard(folder, damage, words):
    """Training never starts on damaged data, and the user learns which file to copy again; also after a good check."""
    open_shards(folder).verify()
    damage(folder / "shard-00001.tar")
    with pytest.raises(UserError, match=words) as caught:
        open_shards(folder, "data.real.shards").verify()
    assert str(folder / "shard-00001.tar") in str(caught.value) and "data.real.shards" in str(caught.value)
    assert "again" in str(caught.value)


def test_a_verified_shard_is_hashed_only_once(folder, monkeypatch):
    """Opening 100 GB again is quick, but a file that was touched is hashed anew, and so is every one with `full`."""
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(nrat_scale.data.shards, "sha256_of", counted)
    names = sorted(path.name for path in folder.glob("*.tar"))
    open_shards(folder).verify()
    assert hashed == names
    open_shards(folder).verify()
    assert hashed == names
    os.utime(folder / names[1], ns=(1, 1))
    open_shards(folder).verify()
    assert hashed == [*names, names[1]]
    open_shards(folder).verify(full=True)
    assert hashed == [*names, names[1], *names]
    (folder / ".verified.json").write_text("{ not JSON")  # the record is only a memory aid
    open_shards(folder).verify()
    assert hashed == [*names, names[1], *names, *names]


def test_full_verification_trusts_no_record(folder):
    """A bit that flipped on disk changes neither size nor time; `full` finds it."""
    open_shards(folder).verify()
    path = folder / "shard-00002.tar"
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(700)
        byte = file.read(1)
        file.seek(700)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"shard-00002\.tar.*sha256"):
        open_shards(folder).verify(full=True)


def test_a_record_that_cannot_be_written_does_no_harm(folder, monkeypatch):
    """Shards on a full or read-only disk can still be verified."""

    def full_disk(path: Path, value: object) -> None:
        raise UserError("No space left on device")

    monkeypatch.setattr(nrat_scale.data.shards, "write_json", full_disk)
    open_shards(folder).verify()
    assert not (folder / ".verified.json").exists()


def test_an_unreadable_shard_is_named(folder, monkeypatch):
    """An I/O error while hashing ends in a sentence, not in a traceback."""

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(nrat_scale.data.shards, "sha256_of", broken)
    with pytest.raises(UserError, match=r"shard-00000\.tar of the data cannot be opened \(Input/output error\)"):
        open_shards(folder).verify()


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
    """Everything trusts the index, so it is whole or it is not used."""
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
def test_an_index_that_is_no_index_is_refused(folder, content):
    """Empty, cut short, another JSON type, no text, nested without end."""
    (folder / "index.json").write_bytes(content.encode("utf-16" if content == "\ud800" else "utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"index\.json"):
        open_shards(folder)


def test_missing_shards_say_how_to_make_them(tmp_path):
    """The recipe knows the command; without one, the tool is named."""
    with pytest.raises(UserError, match=r"data\.real\.shards at .*nowhere.*\n  python tools/shard_dataset\.py digits"):
        open_shards(tmp_path / "nowhere", "data.real.shards", commands=["python tools/shard_dataset.py digits"])
    with pytest.raises(UserError, match=r"tools/shard_dataset\.py"):
        open_shards(tmp_path)


def test_a_shard_that_vanishes_after_verification_is_named(folder):
    """Reading opens the files late; one that is gone by then is a sentence with its name."""
    shards = open_shards(folder)
    shards.verify()
    (folder / "shard-00002.tar").unlink()
    assert len(shards.images(np.arange(64))) == 64
    with pytest.raises(UserError, match=r"shard-00002\.tar"):
        shards.images(np.array([69]))
