"""The cache: verified files by content, bounded in size, shared by processes."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

import nrat_scale.remote.transfer
from nrat_scale.core.errors import UserError
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.transfer import Cancelled
from tests.support.contents import GB, random_bytes, sha256_hex
from tests.support.http_server import Fault, HttpServer
from tests.support.processes import outputs, started


@pytest.fixture
def cache(tmp_path) -> Cache:
    """An empty cache for 150,000 bytes."""
    return Cache(tmp_path / "cache", 150_000 * GB)


@pytest.fixture
def many(server) -> Callable[..., Path]:
    """`many(cache, number, **)`: fetch /NUMBER.tar, of 50,000 bytes, which the server has for 0..9."""
    contents = [random_bytes(50_000, seed=number) for number in range(10)]
    server.files |= {f"/{number}.tar": content for number, content in enumerate(contents)}

    def fetch(cache: Cache, number: int, **arguments: object) -> Path:
        path = cache.fetch(f"{server.url}/{number}.tar", 50_000, sha256_hex(contents[number]), **arguments)
        assert path.read_bytes() == contents[number]
        return path

    return fetch


def _tars(cache: Cache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.tar")}


def test_a_file_is_fetched_once(server, many, cache):
    """The cache is keyed by content: another address of the same bytes is the same file."""
    assert many(cache, 0) == many(cache, 0) == many(Cache(cache.folder, 1.0), 0)
    server.files["/copy.tar"] = server.files["/0.tar"]
    cache.fetch(f"{server.url}/copy.tar", 50_000, sha256_hex(server.files["/0.tar"]))
    assert len(server.requests) == 1


def test_the_folder_comes_from_argument_variable_or_home(tmp_path, monkeypatch):
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


def test_the_least_recently_used_file_is_evicted(many, cache):
    """The limit holds after each file, and the time of use counts, not that of the transfer."""
    paths = [many(cache, number) for number in range(3)]
    for age, number in enumerate((1, 2, 0)):  # 1 was used last; no reliance on the clock between two calls
        os.utime(paths[number].with_suffix(".json"), (1e9 - age, 1e9 - age))
    many(cache, 0)  # now used last of all
    paths.append(many(cache, 3))
    assert _tars(cache) == {paths[number].stem for number in (0, 1, 3)}
    for number in range(4, 10):
        many(cache, number)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.limit_bytes


def test_an_evicted_file_stays_readable_through_its_map(many, cache):
    """An open mapping of a shard stays valid after eviction."""
    path = many(cache, 0)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    for number in range(1, 5):
        many(cache, number)
    assert not path.exists()
    assert bytes(mapped) == random_bytes(50_000, seed=0)


def test_only_files_of_the_cache_are_evicted(many, cache):
    """Other files in the folder are neither counted nor touched."""
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
def test_a_cached_file_that_changed_is_fetched_again(server, many, cache, damage):
    """The cache returns verified files only."""
    damage(many(cache, 0))
    many(cache, 0)
    assert len(server.requests) == 2


@pytest.mark.parametrize("stamp", [None, "", "{", "[1, 2, 3]", "null"])
def test_a_file_whose_stamp_is_lost_is_verified_again(server, many, cache, stamp):
    """After a kill between the file and its stamp the file is hashed, not fetched."""
    path = many(cache, 0).with_suffix(".json")
    if stamp is None:
        path.unlink()
    else:
        path.write_text(stamp)
    many(cache, 0)
    assert len(server.requests) == 1
    assert json.loads(path.read_text()) != stamp


def test_a_damaged_transfer_never_gets_the_final_name(server, many, cache, monkeypatch):
    """The final name appears with the right bytes or not at all."""
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


def test_a_file_larger_than_the_cache_is_refused(server, many, tmp_path):
    """Before any transfer or eviction."""
    with pytest.raises(UserError, match=r"too little for a shard.*data\.remote\.cache_gb"):
        many(Cache(tmp_path / "small", 49_999 * GB), 0)
    assert not server.requests


def test_a_disk_without_room_is_refused(server, many, cache, monkeypatch):
    """Before any transfer; bytes of a .part are not needed again."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=49_999))
    with pytest.raises(UserError, match=r"no room for a shard.*data\.remote\.cache"):
        many(cache, 0)
    assert not server.requests
    (cache.folder / f"{sha256_hex(server.files['/0.tar'])}.50000.part").write_bytes(server.files["/0.tar"][:1])
    many(cache, 0)


def test_a_part_file_counts_with_its_full_size(many, cache):
    """A .part of a killed run is evicted like any other file."""
    cache.folder.mkdir()
    left = cache.folder / f"{'a' * 64}.100000.part"
    left.write_bytes(b"x")
    os.utime(left, (1e9, 1e9))
    many(cache, 0)
    assert left.exists()
    many(cache, 1)
    assert not left.exists()


def test_room_reserved_by_another_transfer_is_awaited(many, cache):
    """Several processes with a small cache wait for each other; none fails, and the limit holds."""
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


def test_processes_may_have_different_limits(many, cache):
    """Each process enforces its own limit; the smaller one evicts more."""
    large, small = Cache(cache.folder, 500_000 * GB), Cache(cache.folder, 50_000 * GB)
    for number in range(6):
        many(large, number)
    path = many(small, 6)
    assert _tars(cache) == {path.stem}
    many(large, 0)
    assert len(_tars(cache)) == 2


def test_a_filled_cache_may_be_read_only(server, many, cache, monkeypatch):
    """Only a missing file needs a writable folder."""

    def read_only(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    many(cache, 0)
    monkeypatch.setattr("os.utime", read_only)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    many(cache, 0)
    assert len(server.requests) == 1
    with pytest.raises(UserError, match="cannot be written to"):
        many(cache, 1)


def test_an_unusable_folder_is_a_user_error(many, tmp_path):
    """A file in its place, or a lock that cannot be created."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        many(Cache(tmp_path / "file"), 0)
    cache = Cache(tmp_path / "cache")
    cache.folder.mkdir()
    (cache.folder / f"{sha256_hex(random_bytes(50_000, seed=0))}.lock").mkdir()
    with pytest.raises(UserError, match=r"The cache .* cannot be used \(Is a directory\)"):
        many(cache, 0)


@pytest.mark.parametrize("sha256", ["", "abc", "../../etc/passwd", "A" * 64])
def test_a_malformed_sha256_is_refused(cache, sha256):
    """The file name in the cache comes from the index, which is not trusted."""
    with pytest.raises(UserError, match="no valid sha256"):
        cache.fetch("http://127.0.0.1:9/a.tar", 1, sha256)
    assert not cache.folder.exists()


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_a_cancelled_transfer_is_resumed_later(server, many, cache, error):
    """Ctrl-C or the end of a run frees the lock at once and keeps the bytes that had arrived."""
    server.faults["/0.tar"] = [Fault(pieces=10, pause=0.5)]

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


def test_waiting_for_another_process_can_be_cancelled(many, cache):
    """A loader that ends does not wait for the transfer of another process."""
    cache.folder.mkdir()
    asked = iter([False, True])
    with FileLock(cache.folder / f"{sha256_hex(random_bytes(50_000, seed=0))}.lock"), pytest.raises(Cancelled):
        many(cache, 0, stopped=lambda: next(asked))


def test_pauses_can_be_cancelled(server, many, cache, monkeypatch):
    """Even if the server asked for five minutes."""
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
    output([url, hashlib.sha256(content).hexdigest()])
"""


def _wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def _files(server: HttpServer, count: int, size: int) -> list[tuple[str, int, str]]:
    contents = [random_bytes(size, seed=100 + number) for number in range(count)]
    server.files |= {f"/shard-{number}.tar": content for number, content in enumerate(contents)}
    return [(f"{server.url}/shard-{number}.tar", size, sha256_hex(content)) for number, content in enumerate(contents)]


def test_processes_of_a_node_share_one_transfer(server, tmp_path):
    """Two processes need the same 20 shards at once: the server sends each of them once."""
    files = _files(server, 20, 100_000)
    for number in range(20):
        server.always[f"/shard-{number}.tar"] = Fault(pieces=5, pause=0.005)
    given = {"cache": str(tmp_path), "limit": 1}
    orders = files, files[10:] + files[:10]
    processes = [started(FETCH, {**given, "files": order}) for order in orders]
    for process, order in zip(processes, orders, strict=True):
        assert outputs(process) == [[url, sha256] for url, _, sha256 in order]
    assert sorted(request.path for request in server.requests) == sorted(f"/shard-{number}.tar" for number in range(20))
    assert all(server.bytes_served(f"/shard-{number}.tar") == 100_000 for number in range(20))


@pytest.mark.medium
def test_two_processes_share_a_too_small_cache(server, tmp_path):
    """Each evicts files of the other; all bytes are right, neither fails and the limit holds in the end."""
    files = _files(server, 6, 100_000)
    given = {"cache": str(tmp_path), "limit": 150_000 * GB}
    processes = [started(FETCH, {**given, "files": order * 3}) for order in (files, files[::-1])]
    for process, order in zip(processes, (files, files[::-1]), strict=True):
        assert outputs(process) == [[url, sha256] for url, _, sha256 in order * 3]
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".tar", ".part")) <= 150_000


def test_a_killed_transfer_is_resumed_by_another_process(server, tmp_path):
    """SIGKILL during a transfer frees the lock, and another process resumes at that byte."""
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


def test_a_failing_write_is_a_user_error(server, tmp_path):
    """A real failing write (RLIMIT_FSIZE) in its own process."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    Cache(given["cache"]).fetch(*given["file"])
except UserError as error:
    output(str(error))
"""
    (file,) = _files(server, 1, 100_000)
    (message,) = outputs(started(script, {"cache": str(tmp_path), "file": file}))
    assert f"{file[2]}.tar cannot be written (File too large). Free some space" in message
    assert not list(tmp_path.glob("*.tar"))
