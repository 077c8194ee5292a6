"""Files behind an address: complete and verified or not there, resumed and not fetched twice, with plain sentences."""

import hashlib
import json
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import nrat_scale.remote.stores
import nrat_scale.remote.transfer
from nrat_scale.core.errors import UserError
from nrat_scale.remote.address import expand, is_remote
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.transfer import ATTEMPTS, Cancelled, download, fetch_bytes
from tests.support.faulty_server import Fault, FaultyServer
from tests.support.processes import started, told

GB = 1e-9  # one byte, in the unit of a cache's limit


def _bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of a millisecond, and no proxy between the tests and their server."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """An honest server with /a.tar of 50,000 bytes."""
    with FaultyServer(files={"/a.tar": _bytes(50_000)}) as running:
        yield running


@pytest.fixture
def get(server, tmp_path) -> Callable[[], bytes]:
    """`get()`: what a verified download of /a.tar brings."""
    content = server.files["/a.tar"]

    def get() -> bytes:
        path = tmp_path / "a.tar"
        download(f"{server.url}/a.tar", path, len(content), _sha(content))
        assert _names(tmp_path) == ["a.tar"]
        return path.read_bytes()

    return get


def _refused(server: FaultyServer, folder: Path, words: str) -> str:
    """Why /a.tar cannot be had: one sentence or two with its address, and nothing at its place."""
    content = server.files.get("/a.tar", b"x")
    with pytest.raises(UserError, match=words) as caught:
        download(f"{server.url}/a.tar", folder / "a.tar", len(content), _sha(content))
    assert f"{server.url}/a.tar" in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "a.tar").exists()
    return str(caught.value)


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "folder", "names"),
    [
        ("/data/shards/", "/data/shards/", None),
        ("/data/shards/shard-00001.tar", "/data/shards", ["shard-00001.tar"]),
        ("shard-{00008..00010}.tar", ".", ["shard-00008.tar", "shard-00009.tar", "shard-00010.tar"]),
        ("/a.tar", "/", ["a.tar"]),
        ("https://host/data/", "https://host/data", None),
        ("s3://bucket/data/{a,b}.tar", "s3://bucket/data", ["a.tar", "b.tar"]),
        ("hf://datasets/user/repo@v1/x/shard-{0..1}.tar", "hf://datasets/user/repo@v1/x", ["shard-0.tar", "shard-1.tar"]),
    ],
)  # fmt: skip
def test_addresses_are_taken_apart(where, folder, names):
    """A folder, one tar or a brace list, here and behind an address."""
    assert expand(where) == (folder, names)
    assert is_remote(where) == ("://" in where)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("https://host/shard-{00000..00001.tar", "cannot be expanded"),
        ("https://host/shard-{0..99999999}.tar", "more than 1000000 shards"),
    ],
)
def test_an_address_that_means_nothing_is_refused(where, words):
    """Before anything is asked of the network, and without an endless list of names."""
    with pytest.raises(UserError, match=words):
        expand(where)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http:///a.tar", "cannot be fetched"),
        ("http://host:port/a.tar", "cannot be fetched"),
        ("http://[::1/a.tar", "cannot be fetched"),
        ("hf://datasets/a.tar", "expected hf://datasets/USER/REPO"),
        ("hf://datasets/user/repo", "expected hf://datasets/USER/REPO/FILE"),
        ("ftp://host/shards", "the scheme 'ftp' is not one of http, https, hf, s3"),
        ("file:///etc/shards", "the scheme 'file'"),
    ],
)
def test_a_malformed_address_fails_at_once(url, words):
    """A typing error ends in a sentence with the address, without a retry."""
    with pytest.raises(UserError, match=words) as caught:
        fetch_bytes(url, 100)
    assert url in str(caught.value) and "attempts" not in str(caught.value)


def test_unusual_characters_in_an_address_are_quoted(server):
    """A folder with a blank or an umlaut is found; what is quoted already stays."""
    server.files["/my%20d%C3%A4ta/index.json"] = b"{}"
    for name in ("my däta", "my%20d%C3%A4ta"):
        assert fetch_bytes(f"{server.url}/{name}/index.json", 100) == b"{}"


# ---- what passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([], [None]),
        ([Fault(status=500), Fault(status=503), Fault(status=408)], [None] * 4),
        ([Fault(status=429, headers=(("Retry-After", "0"),))], [None] * 2),
        ([Fault(status=503, headers=(("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),))], [None] * 2),
        ([Fault(cut_after=20_000)], [None, "bytes=20000-"]),
        ([Fault(cut_after=0), Fault(cut_after=49_999)], [None, None, "bytes=49999-"]),
        ([Fault(cut_after=20_000, chunked=True)], [None, "bytes=20000-"]),
        ([Fault(cut_after=20_000, bare=True)], [None, "bytes=20000-"]),
        ([Fault(chunked=True)], [None]),
        ([Fault(bare=True)], [None]),
        ([Fault(cut_after=20_000), Fault(chunked=True)], [None, "bytes=20000-"]),
        ([Fault(cut_after=20_000), Fault(ignore_range=True)], [None, "bytes=20000-"]),
        ([Fault(cut_after=20_000), Fault(wrong_range=True)], [None, "bytes=20000-", None]),
        ([Fault(cut_after=20_000), Fault(status=416)], [None, "bytes=20000-", None]),
        ([Fault(cut_after=20_000), Fault(status=502), Fault()], [None, "bytes=20000-", "bytes=20000-"]),
        ([Fault(corrupt=True), Fault(corrupt=True)], [None] * 3),
        ([Fault(cut_after=20_000), Fault(corrupt=True)], [None, "bytes=20000-", None]),
        ([Fault(pieces=50, pause=0.001)], [None]),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(server, get, faults, ranges):
    """Errors of the server, cuts, refused or wrong ranges and damage end with the exact bytes; cuts are resumed."""
    server.faults["/a.tar"] = faults
    assert get() == server.files["/a.tar"]
    assert server.ranges("/a.tar") == ranges


def test_a_reset_connection_is_tried_again(server, get):
    """A middlebox that kills connections, where it is unknown how many bytes arrived."""
    server.faults["/a.tar"] = [Fault(cut_after=30_000, reset=True)] * 3
    assert get() == server.files["/a.tar"]


@pytest.mark.parametrize("after", [-1, 0, 20_000])
def test_a_stall_is_noticed_and_resumed(server, get, monkeypatch, after):
    """Silence before or within the answer ends by itself, and not one byte that had arrived is fetched again."""
    monkeypatch.setattr(nrat_scale.remote.stores, "STALL_SECONDS", 0.5)
    server.faults["/a.tar"] = [Fault(stall_after=after)]
    assert get() == server.files["/a.tar"]
    assert server.ranges("/a.tar")[1] == ("bytes=20000-" if after == 20_000 else None)


COSTS: dict[str, Callable[[int], int]] = {"corrupt": lambda size: size, "ignore_range": lambda size: size, "wrong_range": lambda size: 2 * size}  # fmt: skip
ERRORS = st.sampled_from([408, 425, 429, 500, 502, 503, 504]).map(lambda status: Fault(status=status))
CUTS = st.builds(
    lambda after, **kind: Fault(cut_after=after, **kind),
    st.integers(0, 4000),
    chunked=st.booleans(),
    ignore_range=st.booleans(),
    wrong_range=st.booleans(),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    faults=st.lists(ERRORS | CUTS | st.just(Fault(corrupt=True)), max_size=ATTEMPTS - 1).filter(
        lambda faults: sum(fault.corrupt for fault in faults) < 3
    ),
    size=st.integers(1, 4000),
)
def test_any_faults_below_the_limit_end_with_the_exact_bytes(faults, size):
    """And they cost nothing beyond what must be fetched again: every other byte is served once."""
    content = _bytes(size)
    with (
        FaultyServer(files={"/a": content}, faults={"/a": list(faults)}) as server,
        tempfile.TemporaryDirectory() as name,
    ):
        download(f"{server.url}/a", Path(name) / "a", size, _sha(content))
        assert (Path(name) / "a").read_bytes() == content
        assert _names(Path(name)) == ["a"]
        met = faults[: len(faults) - len(server.faults["/a"])]
        cost = sum(cost(size) for kind, cost in COSTS.items() for fault in met if getattr(fault, kind))
        assert server.bytes_served("/a") <= size + cost


def test_progress_renews_the_patience(server, get, monkeypatch):
    """A large file over a bad line needs more attempts than one that brings nothing."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "_PROGRESS_BYTES", 1000)
    server.faults["/a.tar"] = [Fault(cut_after=2000)] * (2 * ATTEMPTS)
    assert get() == server.files["/a.tar"]
    assert server.bytes_served("/a.tar") == 50_000


def test_beginning_again_and_again_is_no_progress(server, tmp_path, monkeypatch):
    """A server that cuts each transfer and refuses each range must not hold a run for ever."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "_PROGRESS_BYTES", 1000)
    server.always["/a.tar"] = Fault(cut_after=20_000, wrong_range=True)
    _refused(server, tmp_path, f"{ATTEMPTS} attempts")
    assert len(server.gets("/a.tar")) == ATTEMPTS


@pytest.mark.parametrize(("asked", "expected"), [("7", 7.0), ("100000", 300.0), ("soon", None)])
def test_the_server_says_when_to_come_again(server, get, monkeypatch, asked, expected):
    """Retry-After is obeyed up to five minutes, and what is no number leaves the pause to us."""
    pauses: list[float] = []
    monkeypatch.setattr(nrat_scale.remote.transfer, "sleep_unless", lambda stopped, seconds: pauses.append(seconds))
    server.faults["/a.tar"] = [Fault(status=429, headers=(("Retry-After", asked),))]
    get()
    assert len(pauses) == 1
    assert pauses[0] == expected if expected else pauses[0] <= 0.001


def test_pauses_grow_to_a_limit_and_scatter(server, tmp_path, monkeypatch):
    """Many processes that lost one server must not come back at the same moments."""
    pauses: list[float] = []
    monkeypatch.setattr(nrat_scale.remote.transfer, "sleep_unless", lambda stopped, seconds: pauses.append(seconds))
    monkeypatch.setattr(nrat_scale.remote.transfer, "FIRST_PAUSE_SECONDS", 1.0)
    server.always["/a.tar"] = Fault(status=503)
    _refused(server, tmp_path, "HTTP 503")
    tops = [1, 2, 4, 8, 16, 32, 60]
    assert len(pauses) == len(tops)
    assert all(top / 2 <= pause <= top for pause, top in zip(pauses, tops, strict=True))
    assert len({pause / top for pause, top in zip(pauses, tops, strict=True)}) > 1


def test_a_redirect_is_followed_with_the_range(server, get):
    """Release pages send on to another host; the second half is asked for there too."""
    server.always["/a.tar"] = Fault(redirect=f"{server.other_name}/cdn")
    server.files["/cdn/a.tar"] = server.files["/a.tar"]
    server.faults["/cdn/a.tar"] = [Fault(cut_after=20_000)]
    assert get() == server.files["/a.tar"]
    assert [(request.host, request.range) for request in server.gets("/cdn/a.tar")] == [
        ("localhost", None),
        ("localhost", "bytes=20000-"),
    ]


# ---- what does not pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        (Fault(status=404), "HTTP 404", 1),
        (Fault(status=403), "HTTP 403", 1),
        (Fault(status=503), f"HTTP 503 .*{ATTEMPTS} attempts", ATTEMPTS),
        (Fault(cut_after=0), f"cut 50000 bytes before the end .{ATTEMPTS} attempts", ATTEMPTS),
        (Fault(cut_after=0, chunked=True), "the connection was cut", ATTEMPTS),
        (Fault(cut_after=0, bare=True), "0 of 50000 bytes arrived", ATTEMPTS),
        (Fault(corrupt=True), r"the expected sha256 [0-9a-f]{12}\.\.\. after 3 transfers", 3),
        (Fault(page=True), "a web page instead of the file", 1),
        (Fault(headers=(("Content-Encoding", "gzip"),)), r"compressed \(gzip\)", 1),
    ],
    ids=str,
)
def test_what_does_not_pass_is_a_sentence(server, tmp_path, fault, words, requests):
    """What cannot get better is asked for once, and nothing is left behind that could be taken for the file."""
    server.always["/a.tar"] = fault
    _refused(server, tmp_path, words)
    assert len(server.gets("/a.tar")) == requests
    assert _names(tmp_path) == []


def test_a_circle_of_redirects_ends(server, tmp_path):
    """In one line, though urllib's own message has several."""
    server.always["/a.tar"] = Fault(redirect=server.url)
    _refused(server, tmp_path, "HTTP 302")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [49_999, 50_001])
def test_a_file_of_another_size_is_refused(server, tmp_path, chunked, size):
    """The index and the file contradict each other; with Content-Length that is known before a byte is fetched."""
    server.always["/a.tar"] = Fault(chunked=chunked)
    with pytest.raises(UserError, match=r"there instead of|bytes there|bytes arrived|another range|416"):
        download(f"{server.url}/a.tar", tmp_path / "a.tar", size, "0" * 64)
    assert not (tmp_path / "a.tar").exists()
    if not chunked:
        assert _names(tmp_path) == [] and len(server.gets("/a.tar")) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_is_not_there_is_named(tmp_path, scheme):
    """No such name and nobody listening are told apart, after the usual attempts."""
    with socket.socket() as taken:  # bound but not listening: connections are refused and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, words in (
            (host, f"{host} refuses the connection"),
            ("no.such.invalid", "the name no.such.invalid cannot"),
        ):
            with pytest.raises(UserError, match=words) as caught:
                fetch_bytes(f"{scheme}://{name}/index.json", 100)
            assert str(caught.value).endswith("(4 attempts). Check address and network.")


def test_a_small_file_has_a_limit(server):
    """What is read into memory must not be whatever lies there, with or without a stated length."""
    assert fetch_bytes(f"{server.url}/a.tar", 50_000) == server.files["/a.tar"]
    for chunked in (False, True):
        server.always["/a.tar"] = Fault(chunked=chunked)
        with pytest.raises(UserError, match="more than 49999 bytes"):
            fetch_bytes(f"{server.url}/a.tar", 49_999)


def test_a_small_file_is_whole(server):
    """A cut is tried again also where nothing is written to disk."""
    server.faults["/a.tar"] = [Fault(cut_after=10), Fault(status=500), Fault(cut_after=10, chunked=True)]
    assert fetch_bytes(f"{server.url}/a.tar", 10**6) == server.files["/a.tar"]


def test_without_size_and_sha256_a_cut_is_still_noticed(server, tmp_path):
    """Files that nobody indexed: the length that the server states must arrive; a finished .part is no trap."""
    content = server.files["/a.tar"]
    server.faults["/a.tar"] = [Fault(cut_after=20_000)]
    download(f"{server.url}/a.tar", tmp_path / "a.tar", None, None)
    (tmp_path / "b.tar.part").write_bytes(content)  # a run that was killed before it could rename it
    download(f"{server.url}/a.tar", tmp_path / "b.tar", None, None)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes() == content


@pytest.mark.parametrize("there", [10_000, 50_000, 60_000])
@pytest.mark.parametrize("stale", [False, True])
def test_what_an_earlier_run_left_is_used_or_thrown_away(server, get, tmp_path, there, stale):
    """A .part goes on where it is; one that is too long or of an older file costs a second transfer, never the result."""
    content = server.files["/a.tar"]
    (tmp_path / "a.tar.part").write_bytes((_bytes(60_000, seed=1) if stale else content + bytes(10_000))[:there])
    assert get() == content
    if not stale:
        assert server.bytes_served("/a.tar") == {10_000: 40_000, 50_000: 0, 60_000: 50_000}[there]


def test_progress_is_told(server, tmp_path):
    """A bar can be drawn: the bytes that are there, also after a resumption."""
    server.faults["/a.tar"] = [Fault(cut_after=20_000)]
    told: list[int] = []
    content = server.files["/a.tar"]
    download(f"{server.url}/a.tar", tmp_path / "a", len(content), _sha(content), progress=told.append)
    assert told == sorted(told) and told[-1] == 50_000


def test_a_full_disk_is_a_sentence(server, tmp_path, monkeypatch):
    """With the file and a way out; what has arrived stays for the next attempt."""

    class _Full:
        def __init__(self, *arguments: object) -> None:
            self.file = open(*arguments)  # noqa: SIM115

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "_Full":
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(nrat_scale.remote.transfer, "open", _Full, raising=False)
    with pytest.raises(UserError, match=r"a\.tar cannot be written \(No space left on device\)\. Free some space"):
        download(f"{server.url}/a.tar", tmp_path / "a.tar", 50_000, None)
    assert _names(tmp_path) == []


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path) -> Cache:
    """An empty cache for 150,000 bytes."""
    return Cache(tmp_path / "cache", 150_000 * GB)


@pytest.fixture
def many(server) -> Callable[..., Path]:
    """`many(cache, number, **)`: fetch /NUMBER.tar, of 50,000 bytes, which the server has for 0..9."""
    contents = [_bytes(50_000, seed=number) for number in range(10)]
    server.files |= {f"/{number}.tar": content for number, content in enumerate(contents)}

    def fetch(cache: Cache, number: int, **arguments: object) -> Path:
        path = cache.fetch(f"{server.url}/{number}.tar", 50_000, _sha(contents[number]), **arguments)
        assert path.read_bytes() == contents[number]
        return path

    return fetch


def _tars(cache: Cache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.tar")}


def test_a_file_is_fetched_once(server, many, cache):
    """By content: another address of the same bytes is the same file."""
    assert many(cache, 0) == many(cache, 0) == many(Cache(cache.folder, 1.0), 0)
    server.files["/copy.tar"] = server.files["/0.tar"]
    cache.fetch(f"{server.url}/copy.tar", 50_000, _sha(server.files["/0.tar"]))
    assert len(server.requests) == 1


def test_the_folder_is_chosen_by_argument_variable_or_home(tmp_path, monkeypatch):
    """In this order; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("NRAT_SCALE_CACHE", raising=False)
    assert Cache().folder == tmp_path / ".cache" / "nrat_scale"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().folder == tmp_path / "xdg" / "nrat_scale"
    monkeypatch.setenv("NRAT_SCALE_CACHE", "~/mine")
    assert Cache().folder == tmp_path / "mine"
    assert Cache("~/given").folder == tmp_path / "given"


def test_what_was_used_longest_ago_goes_first(many, cache):
    """The limit holds after each file, and use counts, not age."""
    paths = [many(cache, number) for number in range(3)]
    for age, number in enumerate((1, 2, 0)):  # 1 was used last; no reliance on the clock between two calls
        os.utime(paths[number].with_suffix(".json"), (1e9 - age, 1e9 - age))
    many(cache, 0)  # now used last of all
    paths.append(many(cache, 3))
    assert _tars(cache) == {paths[number].stem for number in (0, 1, 3)}
    for number in range(4, 10):
        many(cache, number)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.limit_bytes


def test_a_file_that_is_removed_stays_readable_where_it_is_mapped(many, cache):
    """A loader that maps a shard never reads anything else through it."""
    path = many(cache, 0)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    for number in range(1, 5):
        many(cache, number)
    assert not path.exists()
    assert bytes(mapped) == _bytes(50_000, seed=0)


def test_only_the_caches_own_files_are_removed(many, cache):
    """Somebody's shards in the same folder are neither counted nor touched."""
    cache.folder.mkdir()
    foreign = {"shard-00000.tar": bytes(10**6), "notes.part": b"mine", f"{'0' * 64}.x.part": b"mine", "a.json": b"{}"}
    for name, content in foreign.items():
        (cache.folder / name).write_bytes(content)
    for number in range(5):
        many(cache, number)
    assert {name: (cache.folder / name).read_bytes() for name in foreign} == foreign


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["a byte edited", "truncated", "emptied", "removed"],
)
def test_a_file_that_was_changed_in_the_cache_is_fetched_again(server, many, cache, damage):
    """Nothing that was not verified is ever given out."""
    damage(many(cache, 0))
    many(cache, 0)
    assert len(server.requests) == 2


@pytest.mark.parametrize("stamp", [None, "", "{", "[1, 2, 3]", "null"])
def test_a_file_whose_stamp_is_lost_is_verified_again(server, many, cache, stamp):
    """Killed between the file and its stamp: the file is hashed and not fetched."""
    path = many(cache, 0).with_suffix(".json")
    if stamp is None:
        path.unlink()
    else:
        path.write_text(stamp)
    many(cache, 0)
    assert len(server.requests) == 1
    assert json.loads(path.read_text()) != stamp


def test_a_damaged_transfer_never_reaches_its_place(server, many, cache, monkeypatch):
    """Watched while it is verified and tried again: the final name appears with the right bytes or not at all."""
    server.faults["/0.tar"] = [Fault(corrupt=True), Fault(cut_after=9), Fault(corrupt=True)]
    seen: list[set[str]] = []
    original = nrat_scale.remote.transfer.sha256_of

    def watched(path: Path) -> str:
        seen.append(_tars(cache))
        return original(path)

    monkeypatch.setattr(nrat_scale.remote.transfer, "sha256_of", watched)
    many(cache, 0)
    assert seen == [set()] * 3
    server.always["/1.tar"] = Fault(corrupt=True)
    with pytest.raises(UserError, match="sha256"):
        many(cache, 1)
    assert len(_tars(cache)) == 1 and not list(cache.folder.glob("*.part"))


def test_a_cache_that_is_too_small_says_so(server, many, tmp_path):
    """Before anything is fetched or removed."""
    with pytest.raises(UserError, match=r"too little for a shard.*data\.remote\.cache_gb"):
        many(Cache(tmp_path / "small", 49_999 * GB), 0)
    assert not server.requests


def test_a_disk_that_is_too_small_says_so(server, many, cache, monkeypatch):
    """Before gigabytes are fetched in vain; what is there already of this file is not needed again."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=49_999))
    with pytest.raises(UserError, match=r"no room for a shard.*data\.remote\.cache"):
        many(cache, 0)
    assert not server.requests
    (cache.folder / f"{_sha(server.files['/0.tar'])}.50000.part").write_bytes(server.files["/0.tar"][:1])
    many(cache, 0)


def test_an_unfinished_file_counts_whole_until_it_is_the_oldest(many, cache):
    """What killed runs left is no leak: it is removed like anything else."""
    cache.folder.mkdir()
    left = cache.folder / f"{'a' * 64}.100000.part"
    left.write_bytes(b"x")
    os.utime(left, (1e9, 1e9))
    many(cache, 0)
    assert left.exists()
    many(cache, 1)
    assert not left.exists()


def test_room_that_others_are_filling_is_waited_for(many, cache):
    """Several processes with a small cache slow each other down; none of them fails, and the limit holds."""
    cache.folder.mkdir()
    busy = cache.folder / f"{'a' * 64}.120000.part"
    busy.touch()
    lock = FileLock(cache.folder / f"{'a' * 64}.lock")
    lock.acquire()
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            assert busy.exists() and not _tars(cache)
            lock.release()
        return False

    many(cache, 0, stopped=stopped)
    assert not busy.exists()


def test_two_limits_on_one_folder(many, cache):
    """Each process holds its own: the smaller one makes room for itself, and both go on."""
    large, small = Cache(cache.folder, 500_000 * GB), Cache(cache.folder, 50_000 * GB)
    for number in range(6):
        many(large, number)
    path = many(small, 6)
    assert _tars(cache) == {path.stem}
    many(large, 0)
    assert len(_tars(cache)) == 2


def test_a_filled_cache_may_be_read_only(server, many, cache, monkeypatch):
    """Only what is missing needs a folder that can be written to."""

    def read_only(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    many(cache, 0)
    monkeypatch.setattr("os.utime", read_only)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    many(cache, 0)
    assert len(server.requests) == 1
    with pytest.raises(UserError, match="cannot be written to"):
        many(cache, 1)


def test_a_folder_that_cannot_be_one_is_a_sentence(many, tmp_path):
    """A file in its place, or a lock that cannot be made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        many(Cache(tmp_path / "file"), 0)
    cache = Cache(tmp_path / "cache")
    cache.folder.mkdir()
    (cache.folder / f"{_sha(_bytes(50_000, seed=0))}.lock").mkdir()
    with pytest.raises(UserError, match=r"The cache .* cannot be used \(Is a directory\)"):
        many(cache, 0)


@pytest.mark.parametrize("sha256", ["", "abc", "../../etc/passwd", "A" * 64])
def test_an_index_without_sha256_names_no_file(cache, sha256):
    """The name in the cache comes from the index, which lies in a foreign place."""
    with pytest.raises(UserError, match="no sha256"):
        cache.fetch("http://127.0.0.1:9/a.tar", 1, sha256)
    assert not cache.folder.exists()


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_a_transfer_that_is_given_up_goes_on_later(server, many, cache, error):
    """Ctrl-C or the end of a run: the lock is free at once and the bytes that had arrived are kept."""
    server.faults["/0.tar"] = [Fault(pieces=10, pause=0.05)]

    def stopped() -> bool:
        if any(path.stat().st_size for path in cache.folder.glob("*.part")):
            if error is Cancelled:
                return True
            raise error
        return False

    with pytest.raises(error):
        many(cache, 0, stopped=stopped)
    many(cache, 0)
    first, second = server.ranges("/0.tar")
    assert first is None and second is not None


def test_waiting_for_another_process_can_be_given_up(many, cache):
    """A loader that ends must not wait for somebody else's transfer."""
    cache.folder.mkdir()
    asked = iter([False, True])
    with FileLock(cache.folder / f"{_sha(_bytes(50_000, seed=0))}.lock"), pytest.raises(Cancelled):
        many(cache, 0, stopped=lambda: next(asked))


def test_pauses_can_be_given_up(server, many, cache, monkeypatch):
    """Also when a server asked for five minutes."""
    server.always["/0.tar"] = Fault(status=429, headers=(("Retry-After", "300"),))
    with pytest.raises(Cancelled):
        many(cache, 0, stopped=lambda: len(server.requests) > 0)


# ---- real processes -------------------------------------------------------------------------------------------------

FETCH = """
import hashlib
cache = Cache(given["cache"], given["limit"])
for url, size, sha256 in given["files"]:
    for _ in range(20):
        path = cache.fetch(url, size, sha256)
        try:
            content = path.read_bytes()
            break
        except FileNotFoundError:
            pass  # removed by the other process in between
    tell([url, hashlib.sha256(content).hexdigest()])
"""


def _files(server: FaultyServer, count: int, size: int) -> list[tuple[str, int, str]]:
    contents = [_bytes(size, seed=100 + number) for number in range(count)]
    server.files |= {f"/shard-{number}.tar": content for number, content in enumerate(contents)}
    return [(f"{server.url}/shard-{number}.tar", size, _sha(content)) for number, content in enumerate(contents)]


def test_processes_of_a_node_share_one_transfer(server, tmp_path):
    """Two processes want the same 20 shards at once: the server gives out each of them once."""
    files = _files(server, 20, 100_000)
    for number in range(20):
        server.always[f"/shard-{number}.tar"] = Fault(pieces=5, pause=0.005)
    given = {"cache": str(tmp_path), "limit": 1}
    orders = files, files[10:] + files[:10]
    processes = [started(FETCH, {**given, "files": order}) for order in orders]
    for process, order in zip(processes, orders, strict=True):
        assert told(process) == [[url, sha256] for url, _, sha256 in order]
    assert sorted(request.path for request in server.requests) == sorted(f"/shard-{number}.tar" for number in range(20))
    assert all(server.bytes_served(f"/shard-{number}.tar") == 100_000 for number in range(20))


def test_processes_with_a_cache_that_is_too_small_for_both_go_on(server, tmp_path):
    """Each removes what the other fetched; all bytes are right, nobody fails and the limit holds in the end."""
    files = _files(server, 6, 100_000)
    given = {"cache": str(tmp_path), "limit": 150_000 * GB}
    processes = [started(FETCH, {**given, "files": order * 3}) for order in (files, files[::-1])]
    for process, order in zip(processes, (files, files[::-1]), strict=True):
        assert told(process) == [[url, sha256] for url, _, sha256 in order * 3]
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".tar", ".part")) <= 150_000


def test_a_killed_process_leaves_what_it_had(server, tmp_path):
    """SIGKILL in the middle of a transfer: the lock is free and another process goes on at that byte."""
    (url, size, sha256), = _files(server, 1, 100_000)  # fmt: skip
    server.faults["/shard-0.tar"] = [Fault(stall_after=60_000)]
    process = started(FETCH, {"cache": str(tmp_path), "limit": 1, "files": [(url, size, sha256)]})
    part = tmp_path / f"{sha256}.{size}.part"
    _wait_until(lambda: part.exists() and part.stat().st_size == 60_000)
    assert not (tmp_path / f"{sha256}.tar").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Cache(tmp_path).fetch(url, size, sha256).read_bytes() == server.files["/shard-0.tar"]
    assert server.ranges("/shard-0.tar") == [None, "bytes=60000-"]
    assert server.bytes_served("/shard-0.tar") == size


def test_a_limit_of_the_system_on_files_is_a_sentence(server, tmp_path):
    """A real failing write, in a process of its own."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    Cache(given["cache"]).fetch(*given["file"])
except UserError as error:
    tell(str(error))
"""
    (file,) = _files(server, 1, 100_000)
    (message,) = told(started(script, {"cache": str(tmp_path), "file": file}))
    assert f"{file[2]}.tar cannot be written (File too large). Free some space" in message
    assert not list(tmp_path.glob("*.tar"))
