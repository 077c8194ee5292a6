"""Shards behind an address, all or some of them, are the same data as on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import ShardSet, ShardUnusable, open_shards
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.transfer import Cancelled
from tests.support.http_server import Fault, HttpServer

NUM_IMAGES = 150  # five shards of 32 images, the last of 22, in blocks of 16


def _write(folder: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (NUM_IMAGES, 8, 6, 3), dtype=np.uint8)
    source = LabelledArrays(images, generator.integers(0, 7, NUM_IMAGES), "custom", tuple("abcdefg"))
    return write_shards(source, folder, block_size=16, shard_size=32, seed=seed, progress=False)


def _same(one: ShardSet, other: ShardSet) -> bool:
    """Whether both hold the same samples under the same positions and ids."""
    everywhere = np.arange(NUM_IMAGES)
    return one.fingerprint == other.fingerprint and all(
        np.array_equal(getattr(one, what)(everywhere), getattr(other, what)(everywhere))
        for what in ("images", "labels", "source_ids", "positions_of", "shards_of")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Freshly written shards."""
    return _write(tmp_path_factory.mktemp("made") / "shards")


@pytest.fixture
def local(folder) -> ShardSet:
    """The shards on disk."""
    return open_shards(folder)


@pytest.fixture
def server(folder) -> Iterator[HttpServer]:
    """The shards at /data."""
    with HttpServer(files={f"/data/{path.name}": path.read_bytes() for path in folder.iterdir()}) as running:
        yield running


@pytest.fixture
def opened(server, tmp_path) -> Callable[..., ShardSet]:
    """`opened(rest="")`: the shards behind the address /data + `rest`, with a cache."""
    return lambda rest="": open_shards(
        f"{server.url}/data{rest}", "data.real.shards", cache=Cache(tmp_path / "cache", 1.0)
    )


# ---- the same data --------------------------------------------------------------------------------------------------


def test_shards_behind_an_address_are_the_same_data(server, opened, local):
    """Images, labels and ids; each shard is fetched once, when it is needed, and not again by a second run."""
    remote = opened("/")
    assert remote.is_remote and not local.is_remote
    assert len(server.requests) == 1  # the index
    remote.labels(np.array([40]))
    assert {request.path for request in server.requests} == {"/data/index.json", "/data/shard-00001.tar"}
    assert _same(remote, local)
    assert _same(opened(), local)
    assert [len(server.gets(f"/data/{name}")) for name in local.names] == [1] * 5
    remote.verify()
    assert remote.class_counts == local.class_counts and remote.names == local.names


def test_transfer_faults_do_not_change_the_data(server, opened, local):
    """Index and shards arrive intact over a bad line."""
    server.faults["/data/index.json"] = [Fault(status=503), Fault(cut_after=100)]
    for number, fault in enumerate((Fault(cut_after=99), Fault(corrupt=True), Fault(status=429), Fault(chunked=True))):
        server.faults[f"/data/shard-{number:05d}.tar"] = [fault]
    assert _same(opened(), local)


def test_a_cache_for_a_single_shard_is_enough(server, local, tmp_path):
    """Slow, but the maps of evicted shards stay valid."""
    remote = open_shards(f"{server.url}/data", cache=Cache(tmp_path, max(local.shard_bytes) * 1e-9))
    assert _same(remote, local) and _same(remote, local)
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_a_shard_evicted_before_it_is_opened_is_fetched_again(opened, local, monkeypatch):
    """Another process may evict it between fetch and open; a cache that evicts every time is an error."""
    fetch, left = Cache.fetch, 3

    def removed(self: Cache, *arguments: object, **more: object) -> Path:
        nonlocal left
        path = fetch(self, *arguments, **more)
        if left > 0:
            left -= 1
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "fetch", removed)
    assert _same(opened(), local)
    left = 1000
    with pytest.raises(ShardUnusable, match="No such file"):
        opened().images(np.arange(3))


def test_fetch_returns_the_verified_file_and_can_be_cancelled(server, opened, local):
    """As the prefetching thread uses it."""
    remote = opened()
    path = remote.fetch(3)
    assert path.read_bytes() == (Path(local.folder) / local.names[3]).read_bytes()
    assert local.fetch(3) == Path(local.folder) / local.names[3]
    server.always["/data/shard-00004.tar"] = Fault(status=503)
    with pytest.raises(Cancelled):
        remote.fetch(4, stopped=lambda: bool(server.gets("/data/shard-00004.tar")))


# ---- some of the shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_a_brace_list_restricts_to_its_shards(server, opened, local, remote):
    """Positions are renumbered, ids stay those of the whole set, and no other shard is read."""
    shards = (
        opened("/shard-{00001..00002}.tar") if remote else open_shards(f"{local.folder}/shard-{{00001..00002}}.tar")
    )
    assert shards.names == ["shard-00001.tar", "shard-00002.tar"] and len(shards) == 64
    here, whole = np.arange(64), np.arange(32, 96)
    assert np.array_equal(shards.images(here), local.images(whole))
    assert np.array_equal(shards.labels(here), local.labels(whole))
    assert np.array_equal(shards.source_ids(here), local.source_ids(whole))
    assert shards.class_counts == tuple(np.bincount(local.labels(whole), minlength=7))
    assert shards.fingerprint != local.fingerprint
    if remote:
        assert not server.gets("/data/shard-00000.tar") and not server.gets("/data/shard-00004.tar")


def test_a_single_shard_may_be_named(opened, local):
    """The address of a tar is that tar, not a folder."""
    shards = opened("/shard-00004.tar")
    assert len(shards) == 22
    assert np.array_equal(shards.source_ids(np.arange(22)), local.source_ids(np.arange(128, 150)))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(kept=st.sets(st.integers(0, 4), min_size=1), shuffled=st.randoms(use_true_random=False))
def test_ids_and_positions_are_inverse_on_any_subset(folder, kept, shuffled):
    """For any shards in any order: ids and positions are inverse, and ids of other shards are not found."""
    names = [f"{number:05d}" for number in kept]
    shuffled.shuffle(names)
    local = open_shards(folder)
    braces = f"{{{','.join(names)}}}" if len(names) > 1 else names[0]
    shards = open_shards(f"{folder}/shard-{braces}.tar")
    whole = np.flatnonzero(np.isin(local.shards_of(np.arange(NUM_IMAGES)), sorted(kept)))
    positions = np.arange(len(shards))
    ids = shards.source_ids(positions)
    assert np.array_equal(ids, local.source_ids(whole))
    assert np.array_equal(shards.positions_of(ids), positions)
    everything = np.arange(-3, NUM_IMAGES + 3)
    found = shards.positions_of(everything)
    assert np.array_equal(np.sort(everything[found >= 0]), np.sort(ids))
    assert np.array_equal(shards.source_ids(found[found >= 0]), everything[found >= 0])
    assert np.array_equal(shards.source_ids(shards.in_source_order()), np.sort(ids))
    assert np.array_equal(shards.images(positions), local.images(whole))


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_the_index_does_not_list_is_named(opened, folder, remote):
    """A brace list beyond the last shard is a mistake, not a smaller data set."""
    with pytest.raises(UserError, match=r"lists no shard shard-00005\.tar"):
        opened("/shard-{00003..00005}.tar") if remote else open_shards(f"{folder}/shard-{{00003..00005}}.tar")


# ---- damage ---------------------------------------------------------------------------------------------------------


def _edited(server: HttpServer, edit: Callable[[dict], object]) -> None:
    index = json.loads(server.files["/data/index.json"])
    edit(index)
    server.files["/data/index.json"] = json.dumps(index).encode()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda entry: entry.update(sha256="0" * 64),
            "does not have the expected sha256 000000000000... after 3 transfers",
        ),
        (lambda entry: entry.update(bytes=entry["bytes"] + 512), "bytes there instead of"),
        (lambda entry: entry.update(bytes=entry["bytes"] - 512), "bytes there instead of"),
        (lambda entry: entry.update(sha256="none"), "has no valid sha256"),
        (lambda entry: entry.update(name="shard-00009.tar"), "HTTP 404"),
    ],
    ids=["sha256", "too short", "too long", "no sha256", "missing"],
)
def test_a_shard_that_contradicts_the_index_is_named(server, opened, local, tmp_path, edit, words):
    """By its name in the index, with the reason; the other shards can be used, and the cache holds only verified files."""
    _edited(server, lambda index: edit(index["shards"][1]))
    remote = opened()
    with pytest.raises(ShardUnusable) as caught:
        remote.images(np.array([40]))
    assert caught.value.name == remote.names[1] and words in caught.value.reason
    assert f"{remote.names[1]} of data.real.shards cannot be used: " in str(caught.value)
    assert np.array_equal(remote.images(np.arange(32)), local.images(np.arange(32)))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>Please log in.</html>", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"format": "something"}', "not an index of shards"),
        (b'{"format": "nrat_scale.shards", "version": 99}', "version 99; .* Update nrat_scale"),
        (b'{"format": "nrat_scale.shards", "version": 2}', "is damaged"),
        (None, "HTTP 404"),
    ],
    ids=["web page", "empty", "another JSON", "another format", "newer", "incomplete", "missing"],
)
def test_a_file_that_is_not_an_index_is_refused(server, opened, content, words):
    """The message has its address; no shard is requested."""
    if content is None:
        del server.files["/data/index.json"]
    else:
        server.files["/data/index.json"] = content
    with pytest.raises(UserError, match=words) as caught:
        opened()
    assert f"{server.url}/data/index.json" in str(caught.value)
    assert {request.path for request in server.requests} == {"/data/index.json"}


def test_a_web_page_is_not_an_index(server, opened):
    """A login portal answers every request with its own page."""
    server.always["/data/index.json"] = Fault(page=True)
    with pytest.raises(UserError, match="a web page instead of the file"):
        opened()


def test_an_index_that_names_files_elsewhere_is_refused(server, opened):
    """A hostile index must not lead to other addresses than its own."""
    for name in ("../other/shard.tar", "https://elsewhere/shard.tar", "//elsewhere/shard.tar"):
        _edited(server, lambda index, name=name: index["shards"][1].update(name=name))
        with pytest.raises(UserError, match="is not the name of a shard"):
            opened()


def test_new_shards_at_the_same_address_are_new_data(server, opened, local, tmp_path):
    """The cache is keyed by content and never mixes the two."""
    assert _same(opened(), local)
    other = _write(tmp_path / "other", seed=1)
    server.files |= {f"/data/{path.name}": path.read_bytes() for path in other.iterdir()}
    assert _same(opened(), open_shards(other))
