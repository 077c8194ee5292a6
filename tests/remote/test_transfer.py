"""Transfers: complete and verified or not there, resumed, retried, and refused with a reason."""

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nrat_scale.remote.stores
import nrat_scale.remote.transfer
from nrat_scale.core.errors import UserError
from nrat_scale.remote.transfer import ATTEMPTS, download, fetch_bytes
from tests.support.contents import random_bytes, sha256_hex
from tests.support.http_server import Fault, HttpServer


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def get(server, tmp_path) -> Callable[[], bytes]:
    """`get()`: what a verified download of /a.tar brings."""
    content = server.files["/a.tar"]

    def get() -> bytes:
        path = tmp_path / "a.tar"
        download(f"{server.url}/a.tar", path, len(content), sha256_hex(content))
        assert _names(tmp_path) == ["a.tar"]
        return path.read_bytes()

    return get


def _refused(server: HttpServer, folder: Path, words: str) -> str:
    """The message of a failed download of /a.tar: it has the address, and no file is left."""
    content = server.files.get("/a.tar", b"x")
    with pytest.raises(UserError, match=words) as caught:
        download(f"{server.url}/a.tar", folder / "a.tar", len(content), sha256_hex(content))
    assert f"{server.url}/a.tar" in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "a.tar").exists()
    return str(caught.value)


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
    """A folder with a blank or an umlaut is found; quoted characters stay as they are."""
    server.files["/my%20d%C3%A4ta/index.json"] = b"{}"
    for name in ("my däta", "my%20d%C3%A4ta"):
        assert fetch_bytes(f"{server.url}/{name}/index.json", 100) == b"{}"


# ---- transient failures ---------------------------------------------------------------------------------------------


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
def test_transient_failures_are_retried(server, get, faults, ranges):
    """Server errors, cuts, refused or wrong ranges and damage end with the exact bytes; cuts are resumed."""
    server.faults["/a.tar"] = faults
    assert get() == server.files["/a.tar"]
    assert server.ranges("/a.tar") == ranges


def test_a_reset_connection_is_retried(server, get):
    """A middlebox kills connections, and an unknown number of bytes has arrived."""
    server.faults["/a.tar"] = [Fault(cut_after=30_000, reset=True)] * 3
    assert get() == server.files["/a.tar"]


@pytest.mark.parametrize("after", [-1, 0, 20_000])
def test_a_stall_times_out_and_is_resumed(server, get, monkeypatch, after):
    """Silence before or within the answer ends by timeout, and no byte that had arrived is fetched again."""
    monkeypatch.setattr(nrat_scale.remote.stores, "STALL_SECONDS", 2)
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
@pytest.mark.medium
def test_any_faults_below_the_limit_end_with_the_exact_bytes(faults, size):
    """Every byte is served once, except those that a fault makes necessary to fetch again."""
    content = random_bytes(size)
    with (
        HttpServer(files={"/a": content}, faults={"/a": list(faults)}) as server,
        tempfile.TemporaryDirectory() as name,
    ):
        download(f"{server.url}/a", Path(name) / "a", size, sha256_hex(content))
        assert (Path(name) / "a").read_bytes() == content
        assert _names(Path(name)) == ["a"]
        met = faults[: len(faults) - len(server.faults["/a"])]
        cost = sum(cost(size) for kind, cost in COSTS.items() for fault in met if getattr(fault, kind))
        assert server.bytes_served("/a") <= size + cost


def test_progress_resets_the_attempts(server, get, monkeypatch):
    """A large file over a bad line needs more attempts than a transfer without progress."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "_PROGRESS_BYTES", 1000)
    server.faults["/a.tar"] = [Fault(cut_after=2000)] * (2 * ATTEMPTS)
    assert get() == server.files["/a.tar"]
    assert server.bytes_served("/a.tar") == 50_000


def test_restarting_from_byte_0_is_not_progress(server, tmp_path, monkeypatch):
    """A server that cuts each transfer and refuses each range must not keep a run waiting forever."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "_PROGRESS_BYTES", 1000)
    server.always["/a.tar"] = Fault(cut_after=20_000, wrong_range=True)
    _refused(server, tmp_path, f"{ATTEMPTS} attempts")
    assert len(server.gets("/a.tar")) == ATTEMPTS


@pytest.mark.parametrize(("asked", "expected"), [("7", 7.0), ("100000", 300.0), ("soon", None)])
def test_retry_after_sets_the_pause(server, get, monkeypatch, asked, expected):
    """Up to five minutes; a value that is not a number is ignored."""
    pauses: list[float] = []
    monkeypatch.setattr(nrat_scale.remote.transfer, "sleep_unless", lambda stopped, seconds: pauses.append(seconds))
    server.faults["/a.tar"] = [Fault(status=429, headers=(("Retry-After", asked),))]
    get()
    assert len(pauses) == 1
    assert pauses[0] == expected if expected else pauses[0] <= 0.001


def test_pauses_back_off_with_jitter(server, tmp_path, monkeypatch):
    """Many processes that lost one server must not retry at the same moments."""
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
    """Release pages redirect to another host; the second half is requested there too."""
    server.always["/a.tar"] = Fault(redirect=f"{server.other_name}/cdn")
    server.files["/cdn/a.tar"] = server.files["/a.tar"]
    server.faults["/cdn/a.tar"] = [Fault(cut_after=20_000)]
    assert get() == server.files["/a.tar"]
    assert [(request.host, request.range) for request in server.gets("/cdn/a.tar")] == [
        ("localhost", None),
        ("localhost", "bytes=20000-"),
    ]


# ---- permanent failures ---------------------------------------------------------------------------------------------


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
def test_permanent_failures_end_with_a_reason(server, tmp_path, fault, words, requests):
    """They are requested once, retried ones up to the limit, and no partial file remains."""
    server.always["/a.tar"] = fault
    _refused(server, tmp_path, words)
    assert len(server.gets("/a.tar")) == requests
    assert _names(tmp_path) == []


def test_a_redirect_loop_ends(server, tmp_path):
    """In one line, though urllib's message has several."""
    server.always["/a.tar"] = Fault(redirect=server.url)
    _refused(server, tmp_path, "HTTP 302")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [49_999, 50_001])
def test_a_file_of_another_size_is_refused(server, tmp_path, chunked, size):
    """The index and the file disagree; with Content-Length no byte is fetched."""
    server.always["/a.tar"] = Fault(chunked=chunked)
    with pytest.raises(UserError, match=r"there instead of|bytes there|bytes arrived|another range|416"):
        download(f"{server.url}/a.tar", tmp_path / "a.tar", size, "0" * 64)
    assert not (tmp_path / "a.tar").exists()
    if not chunked:
        assert _names(tmp_path) == [] and len(server.gets("/a.tar")) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_unreachable_host_is_named(tmp_path, scheme):
    """An unknown name and a refused connection have different messages, after the usual attempts."""
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


# ---- small files, files without a hash, local files -----------------------------------------------------------------


def test_fetch_bytes_has_a_limit(server):
    """A file is not read into memory beyond the limit, with or without a stated length."""
    assert fetch_bytes(f"{server.url}/a.tar", 50_000) == server.files["/a.tar"]
    for chunked in (False, True):
        server.always["/a.tar"] = Fault(chunked=chunked)
        with pytest.raises(UserError, match="more than 49999 bytes"):
            fetch_bytes(f"{server.url}/a.tar", 49_999)


def test_fetch_bytes_retries_cuts(server):
    """A cut is retried without a file on disk too."""
    server.faults["/a.tar"] = [Fault(cut_after=10), Fault(status=500), Fault(cut_after=10, chunked=True)]
    assert fetch_bytes(f"{server.url}/a.tar", 10**6) == server.files["/a.tar"]


def test_without_size_and_sha256_a_cut_is_still_detected(server, tmp_path):
    """The length that the server states must arrive; a finished .part is used."""
    content = server.files["/a.tar"]
    server.faults["/a.tar"] = [Fault(cut_after=20_000)]
    download(f"{server.url}/a.tar", tmp_path / "a.tar", None, None)
    (tmp_path / "b.tar.part").write_bytes(content)  # a run that was killed before it could rename it
    download(f"{server.url}/a.tar", tmp_path / "b.tar", None, None)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes() == content


@pytest.mark.parametrize("there", [10_000, 50_000, 60_000])
@pytest.mark.parametrize("stale", [False, True])
def test_a_part_of_an_earlier_run_is_resumed_or_dropped(server, get, tmp_path, there, stale):
    """A .part is resumed; one that is too long or of another file costs a second transfer, never the result."""
    content = server.files["/a.tar"]
    (tmp_path / "a.tar.part").write_bytes((random_bytes(60_000, seed=1) if stale else content + bytes(10_000))[:there])
    assert get() == content
    if not stale:
        assert server.bytes_served("/a.tar") == {10_000: 40_000, 50_000: 0, 60_000: 50_000}[there]


def test_progress_is_reported(server, tmp_path):
    """The bytes so far, after a resumption too."""
    server.faults["/a.tar"] = [Fault(cut_after=20_000)]
    reported: list[int] = []
    content = server.files["/a.tar"]
    download(f"{server.url}/a.tar", tmp_path / "a", len(content), sha256_hex(content), progress=reported.append)
    assert reported == sorted(reported) and reported[-1] == 50_000


def test_a_full_disk_is_a_user_error(server, tmp_path, monkeypatch):
    """The message names the file and a way out."""

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
