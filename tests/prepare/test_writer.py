"""Writing shards: webdataset's bytes, each sample under its id, and nothing at all after an error."""

import os
import resource
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.writer import convert
from tests.support.preparation import FailingImages, holds, npy, random_source, small_shards, tree


def test_the_tars_are_those_of_webdataset(tmp_path):
    """Our own writer copies nothing, and its bytes are those of webdataset.TarWriter."""
    source, folder = random_source(), small_shards(tmp_path / "ours")
    rows = open_shards(folder).source_ids(np.arange(32))
    with open(tmp_path / "theirs.tar", "wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        for key, chosen in enumerate(np.split(rows, 2)):
            members = {"images.npy": npy(source.images[chosen]), "labels.npy": npy(source.labels[chosen])}
            writer.write({"__key__": f"{key:08d}", **members})
        writer.close()
    assert (folder / "shard-00000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_the_bytes_depend_on_the_arguments_only(tmp_path, monkeypatch):
    """Clock and folder do not change a byte; another seed does."""
    first = tree(small_shards(tmp_path / "one"))
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert tree(small_shards(tmp_path / "deeper" / "two")) == first
    assert list(first) == ["index.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    assert tree(small_shards(tmp_path / "three", seed=1)) != first


@settings(deadline=None, derandomize=True, max_examples=15)
@given(num_images=st.integers(1, 90), block_size=st.integers(1, 40), shard_size=st.integers(1, 100))
def test_every_layout_holds_every_sample(num_images, block_size, shard_size):
    """Any sizes: all samples, verified, with whole blocks in each shard; the same arguments give the same bytes."""
    source = random_source(num_images)
    with tempfile.TemporaryDirectory() as name:
        one, two = (
            small_shards(Path(name) / out, source, block_size=block_size, shard_size=shard_size) for out in "ab"
        )
        shards = open_shards(one)
        shards.verify(full=True)
        assert holds(shards, source.images, source.labels)
        per_shard = block_size * -(-shard_size // block_size)
        assert len(shards.names) == -(-num_images // per_shard)
        assert tree(one) == tree(two)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(num_images=st.integers(1, 90), block_size=st.integers(1, 40), seed=st.integers(0, 99), spare=st.integers(0, 9))
def test_given_ids_are_stored_and_found(num_images, block_size, seed, spare):
    """With `ids`, the order is the given one, each sample is found under its id, and unknown ids are not."""
    ids = np.random.default_rng(seed).permutation(300)[:num_images]
    source = random_source(num_images)
    with tempfile.TemporaryDirectory() as name:
        num_ids = int(ids.max()) + 1 + spare if spare else None
        shards = open_shards(small_shards(Path(name) / "out", source, block_size=block_size, ids=ids, num_ids=num_ids))
        positions = np.arange(num_images)
        assert shards.segments[0].seed is None and shards.num_ids == int(ids.max()) + 1 + spare
        assert np.array_equal(shards.images(positions), source.images)
        assert np.array_equal(shards.labels(positions), source.labels)
        assert np.array_equal(shards.source_ids(positions), ids)
        assert np.array_equal(shards.positions_of(ids), positions)
        assert (shards.positions_of(np.setdiff1d(np.arange(400), ids)) == -1).all()


@pytest.mark.parametrize(
    ("ids", "num_ids"),
    [([0] * 70, None), (range(69), None), (range(-1, 69), None), (range(70), 69), (range(71), None)],
)
def test_ids_that_name_no_sample_or_two_are_refused(tmp_path, ids, num_ids):
    """A duplicate, one too few or too many, negative, beyond the number of ids."""
    with pytest.raises(UserError, match="different numbers"):
        small_shards(tmp_path / "out", ids=np.array(ids), num_ids=num_ids)
    assert list(tmp_path.iterdir()) == []


def test_impossible_sizes_are_refused(tmp_path):
    """An empty block, an empty shard, and a block that no memory holds."""
    for sizes in ({"block_size": 0}, {"shard_size": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            small_shards(tmp_path / "out", **sizes)
    huge = np.broadcast_to(np.uint8(0), (70, 20_000, 20_000, 3))
    with pytest.raises(UserError, match="Lower --block-size"):
        small_shards(tmp_path / "out", replace(random_source(), images=huge))
    assert list(tmp_path.iterdir()) == []


def test_several_data_sets_become_subfolders(tmp_path):
    """One conversion, one rename: each data set is a complete folder of shards; one summary line each."""
    sources = {"train": random_source(40), "test": random_source(20, seed=1)}
    summary = convert(lambda scratch: sources, tmp_path / "out", block_size=16, progress=False)
    for name, source in sources.items():
        assert holds(open_shards(tmp_path / "out" / name), source.images, source.labels)
    assert summary.splitlines() == [
        f"{tmp_path}/out/train: 40 images of 3 classes (custom) in 1 shard, 0.0 MB",
        f"{tmp_path}/out/test: 20 images of 3 classes (custom) in 1 shard, 0.0 MB",
    ]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "error",
    [
        UserError("a sentence"),
        OSError(28, "No space left on device"),
        RuntimeError("a bug"),
        KeyboardInterrupt("Ctrl-C"),
    ],
)
def test_an_error_leaves_nothing(tmp_path, at, error):
    """In the first shard or a later one: no --out, no hidden sibling, no parents that were created for it."""
    source = replace(random_source(), images=FailingImages(error, at))
    with pytest.raises((UserError, RuntimeError, KeyboardInterrupt)) as caught:
        small_shards(tmp_path / "new" / "parents" / "out", source)
    assert error.args[-1] in str(caught.value)
    assert isinstance(caught.value, UserError) == isinstance(error, UserError | OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_a_sentence(tmp_path):
    """The kernel refuses the bytes (RLIMIT_FSIZE, as a full quota does); afterwards the same call succeeds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            small_shards(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
    open_shards(small_shards(tmp_path / "out")).verify()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_full_disk_at_any_step(tmp_path, monkeypatch, call, at):
    """ENOSPC from the n-th fsync or rename: a sentence and no --out; later the same call gives the right bytes."""
    real, calls = getattr(os, call), []

    def fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) > at:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(UserError, match="No space left on device"):
            small_shards(tmp_path / "out")
    assert len(calls) > at and list(tmp_path.iterdir()) == []
    assert tree(small_shards(tmp_path / "out")) == tree(small_shards(tmp_path / "undisturbed"))
