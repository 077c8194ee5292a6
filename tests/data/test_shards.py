"""Shards: exact at any position, readable by plain WebDataset, verified, and damage is named."""

import gc
import io
import os
import subprocess
import sys
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
from nrat_scale.prepare.writer import write_shards
from tests.support.small_shards import random_source, write_small


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    num_images=st.integers(1, 90),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3])),
    block_size=st.integers(1, 40),
    shard_size=st.integers(1, 100),
    seed=st.integers(0, 2**40),
)
def test_every_image_and_label_comes_back(num_images, shape, block_size, shard_size, seed):
    """Any size of data set, image, block and shard: source order and random access return the exact bytes."""
    source = random_source(num_images, shape, seed=seed % 1000)
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


def test_samples_are_permuted_when_written(tmp_path):
    """Published files are sorted by class: the stored order is the keyed permutation, another one for another seed."""
    source = replace(random_source(), labels=np.sort(random_source().labels))
    labels = []
    for seed in (0, 1):
        shards = open_shards(write_small(tmp_path / str(seed), source, seed=seed))
        labels.append(shards.labels(np.arange(70)))
        assert np.array_equal(labels[-1], source.labels[shards.source_ids(np.arange(70))])
        assert not np.array_equal(labels[-1], source.labels)
    assert not np.array_equal(*labels)


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the closing of files to the collector
def test_plain_webdataset_reads_the_same_samples(folder):
    """Stock WebDataset and numpy without pickle read the images in stored order."""
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


def test_positions_out_of_range_are_refused(folder):
    """A wrong position must not return the bytes of another sample."""
    shards = open_shards(folder)
    for wrong in (-1, 70):
        with pytest.raises(AssertionError, match="no such sample"):
            shards.images(np.array([wrong]))


def test_missing_shards_say_how_to_make_them(tmp_path):
    """The message has the commands of the recipe, or else names the command."""
    with pytest.raises(UserError, match=r"data\.real\.shards at .*nowhere.*\n  python -m nrat_scale\.prepare digits"):
        open_shards(tmp_path / "nowhere", "data.real.shards", commands=["python -m nrat_scale.prepare digits"])
    with pytest.raises(UserError, match=r"Prepare them with: python -m nrat_scale\.prepare"):
        open_shards(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.jpg").touch()
    with pytest.raises(UserError, match=rf"nrat_scale\.prepare folder {tmp_path / 'photos'} --out DIR"):
        open_shards(tmp_path / "photos")
    for name in ("train", "test"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "index.json").touch()
    with pytest.raises(UserError, match=r"both is not shards of --data, but .*Name one: .*/both/test, .*/both/train\."):
        open_shards(tmp_path / "both", "--data")


def test_a_shard_that_vanishes_after_verification_is_named(folder):
    """Files are opened at the first read; one that is missing by then is named."""
    shards = open_shards(folder)
    shards.verify()
    (folder / "shard-00002.tar").unlink()
    assert len(shards.images(np.arange(64))) == 64
    with pytest.raises(UserError, match=r"shard-00002\.tar"):
        shards.images(np.array([69]))


def test_reading_shards_needs_no_torch():
    """Data preparation imports these modules and must start in a fraction of a second."""
    script = "import sys, nrat_scale.data.shards; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- verification ---------------------------------------------------------------------------------------------------


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
    """Damaged data are found before training starts, after an earlier verification too."""
    open_shards(folder).verify()
    damage(folder / "shard-00001.tar")
    with pytest.raises(UserError, match=words) as caught:
        open_shards(folder, "data.real.shards").verify()
    assert str(folder / "shard-00001.tar") in str(caught.value) and "data.real.shards" in str(caught.value)
    assert "again" in str(caught.value)


def test_a_verified_shard_is_hashed_only_once(folder, monkeypatch):
    """Opening verified shards again hashes nothing; a touched file is hashed again, and `full` hashes every file."""
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


def test_full_verification_ignores_the_record(folder):
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


def test_verification_works_without_its_record(folder, monkeypatch):
    """Shards on a full or read-only disk can be verified."""

    def full_disk(path: Path, value: object) -> None:
        raise UserError("No space left on device")

    monkeypatch.setattr(nrat_scale.data.shards, "write_json", full_disk)
    open_shards(folder).verify()
    assert not (folder / ".verified.json").exists()


def test_an_unreadable_shard_is_named(folder, monkeypatch):
    """An I/O error while hashing ends in a message, not in a traceback."""

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(nrat_scale.data.shards, "sha256_of", broken)
    with pytest.raises(
        UserError, match=r"shard-00000\.tar of the data cannot be used: it cannot be opened \(Input/output error\)"
    ):
        open_shards(folder).verify()
