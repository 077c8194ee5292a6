"""Stores: a new one in one entry; s3:// and hf:// against an object store and a Hub on loopback, in real processes."""

import hashlib
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.stores import OPENERS, PermanentError, RemoteFile, TransientError
from nrat_scale.remote.transfer import fetch_bytes
from tests.support.contents import random_bytes, sha256_hex
from tests.support.http_server import HUB_COMMIT, Fault, HttpServer
from tests.support.numbered_shards import numbered_shards
from tests.support.processes import outputs, started

# ---- a store from outside -------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A store of the scheme mem://, whose first connection to each file is cut after 1000 bytes."""
    files: dict[str, bytes] = {}
    opened: set[str] = set()

    @contextmanager
    def open_memory(url: str, start: int) -> Iterator[RemoteFile]:
        if url not in files:
            raise PermanentError("there is no such file")

        def chunks() -> Iterator[bytes]:
            if url in opened:
                yield files[url][start:]
                return
            opened.add(url)
            yield files[url][:1000]
            raise TransientError("cut")

        yield RemoteFile(chunks(), start, len(files[url]))

    monkeypatch.setitem(OPENERS, "mem", open_memory)
    return files


def test_a_new_store_is_one_entry(memory: dict[str, bytes], tmp_path: Path) -> None:
    """Retries, resumption, cache and shards work with a scheme that is only an entry in `OPENERS`."""
    content = random_bytes(5000)
    memory["mem://a.bin"] = content
    path = Cache(tmp_path / "cache").fetch("mem://a.bin", 5000, sha256_hex(content))
    assert path.read_bytes() == content
    folder = numbered_shards(tmp_path / "shards", 70)
    memory |= {f"mem://data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    remote, local = open_shards("mem://data/", cache=Cache(tmp_path / "cache")), open_shards(folder)
    assert np.array_equal(remote.images(np.arange(70)), local.images(np.arange(70)))
    with pytest.raises(UserError, match="mem://none cannot be fetched: there is no such file"):
        fetch_bytes("mem://none", 1)


# ---- s3 -------------------------------------------------------------------------------------------------------------

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
# `FETCH` answers [url, sha256 or the error, requested byte ranges] of each file.
SPY = """
import hashlib, s3fs
asked, cat_file = [], s3fs.S3FileSystem.cat_file
def spied(self, path, start=None, end=None):
    asked.append([start, end])
    return cat_file(self, path, start=start, end=end)
s3fs.S3FileSystem.cat_file = spied
cache = Cache(given["cache"])
def fetched(url, size, sha256):
    asked.clear()
    try:
        answer = hashlib.sha256(cache.fetch(url, size, sha256).read_bytes()).hexdigest()
    except UserError as error:
        answer = str(error)
    output([url, answer, asked])
"""
FETCH = SPY + "for file in given['files']: fetched(*file)"


@pytest.fixture(scope="module")
def store() -> Iterator[SimpleNamespace]:
    """An object store with the empty bucket "bucket"; `put(name, content)` gives (address, size, sha256)."""
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def request(path: str, content: bytes = b"") -> None:
        headers = {"Content-Type": "application/octet-stream"}  # a form would be parsed before it is stored
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(urllib.request.Request(f"{url}/{path}", content, headers, method="PUT"), timeout=60).close()

    def put(name: str, content: bytes) -> tuple[str, int, str]:
        request(f"bucket/{name}", content)
        return f"s3://bucket/{name}", len(content), hashlib.sha256(content).hexdigest()

    request("bucket")
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }
    try:
        yield SimpleNamespace(put=put, environment=environment)
    finally:
        process.communicate(timeout=60)


@pytest.fixture
def run(store, tmp_path) -> Callable[..., list]:
    """`run(files, script=FETCH, **environment)`: the answers of a process with a cache in `tmp_path`."""

    def run(files: list, script: str = FETCH, **environment: str | None) -> list:
        given = {"cache": str(tmp_path), "files": files}
        return outputs(started(script, given, **{**store.environment, **environment}))

    return run


@pytest.mark.medium
def test_s3_files_arrive_or_fail_with_a_reason(store, run):
    """In chunks of 8 MiB; a missing, too short or damaged object or a folder is named and retried only if that may help."""
    size = (8 << 20) + 1000
    good = store.put("data/shard-00000.tar", random_bytes(size))
    url, _, sha256 = good
    files = [
        good,
        ("s3://bucket/data/none.tar", size, "1" * 64),
        ("s3://no-such-bucket/a.tar", size, "2" * 64),
        ("s3://bucket/data", size, "3" * 64),
        (url, size - 1, "4" * 64),
        (*store.put("data/small.tar", random_bytes(1000))[:2], "5" * 64),
    ]
    answers = run(files)
    assert answers[0] == [url, sha256, [[0, 8 << 20], [8 << 20, size]]]
    for (url, message, asked), words, count in zip(
        answers[1:],
        (
            "there is no such object or bucket",
            "there is no such object or bucket",
            "it is a folder",
            f"it has {size} bytes there instead of {size - 1}",
            "does not have the expected sha256 555555555555... after 3 transfers",
        ),
        (0, 0, 0, 0, 3),
        strict=True,
    ):
        assert message.startswith(f"{url} cannot be fetched: ") and words in message
        assert len(asked) == count


@pytest.mark.medium
def test_s3_transfers_resume(store, run, tmp_path):
    """Only the missing bytes are requested; a .part of a longer file is dropped."""
    url, size, sha256 = store.put("resumed.tar", random_bytes(10_000, seed=1))
    (tmp_path / f"{sha256}.{size}.part").write_bytes(random_bytes(10_000, seed=1)[:7000])
    assert run([(url, size, sha256)]) == [[url, sha256, [[7000, 10_000]]]]
    script = """
from pathlib import Path
path, url = Path(given["cache"]) / "file", given["files"][0][0]
path.with_name("file.part").write_bytes(bytes(20_000))
transfer.download(url, path, None, None)
output(transfer.sha256_of(path))
"""
    assert run([(url, size, sha256)], script) == [sha256]


def test_s3_without_credentials_names_the_variables(store, run):
    """At once, without searching the network for credentials."""
    file = store.put("private.tar", random_bytes(1000, seed=2))
    ((_, message, _),) = run([file], AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    assert "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)" in message
    assert "attempts" not in message


def test_s3_without_s3fs_names_the_package(store, run):
    """It is an optional dependency."""
    script = """
sys.modules["s3fs"] = None
try:
    transfer.fetch_bytes(given["files"][0][0], 1000)
except UserError as error:
    output(str(error))
"""
    assert run([store.put("x.tar", b"x")], script) == ["s3://bucket/x.tar needs s3fs: pip install s3fs"]


def test_an_unreachable_s3_endpoint_is_named(run):
    """The connection is refused."""
    ((_, message, _),) = run([("s3://bucket/a.tar", 1, "6" * 64)], AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert "127.0.0.1:9" in message and "Check address and network." in message


@pytest.mark.medium
def test_s3_transfers_are_shared_by_processes(store, tmp_path):
    """Two processes and one cache: each object is fetched by one of them."""
    files = [store.put(f"shared-{number}.tar", random_bytes(20_000, seed=10 + number)) for number in range(8)]
    given = {"cache": str(tmp_path), "files": files}
    processes = [started(FETCH, given, **store.environment) for _ in range(2)]
    first, second = (outputs(process) for process in processes)
    for (url, _, sha256), one, other in zip(files, first, second, strict=True):
        assert one[:2] == other[:2] == [url, sha256]
        assert sorted([one[2], other[2]]) == [[], [[0, 20_000]]]


def test_s3_can_be_read_in_a_forked_process(store, run):
    """An fsspec file system does not survive a fork; parent and child both keep fetching."""
    files = [store.put(f"forked-{number}.tar", random_bytes(20_000, seed=20 + number)) for number in range(3)]
    script = """
fetched(*given["files"][0])
child = os.fork()
if child == 0:
    fetched(*given["files"][1])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
fetched(*given["files"][2])
"""
    assert run(files, SPY + script) == [[url, sha256, [[0, 20_000]]] for url, _, sha256 in files]


# ---- hf -------------------------------------------------------------------------------------------------------------

HUB = """
for url in given["urls"]:
    try:
        output(transfer.fetch_bytes(url, 10**6).decode())
    except UserError as error:
        output(str(error))
"""


@pytest.fixture
def hub() -> Iterator[HttpServer]:
    """A Hub that redirects files to another host name, which must not receive the token."""
    with HttpServer(hub=True, token="Bearer hf_secret") as server:
        for revision in ("main", "v1", "refs%2Fpr%2F1", HUB_COMMIT):
            path = f"/datasets/someone/images/resolve/{revision}/data/index.json"
            server.files[path] = server.files[f"/cdn{path}"] = revision.encode()
            server.always[path] = Fault(redirect=f"{server.other_name}/cdn")
        yield server


def _asked(hub: HttpServer, urls: list[str], tmp_path, **environment: str | None) -> list[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": None, "HF_HUB_OFFLINE": None}
    return outputs(started(HUB, {"urls": urls}, **{**settings, **environment}))


def test_hf_files_follow_the_redirect_of_the_hub(hub, tmp_path):
    """With and without a revision; the token goes to the Hub and to no other host."""
    urls = [
        f"hf://datasets/someone/images{at}/data/index.json" for at in ("", "@v1", "@refs%2Fpr%2F1", f"@{HUB_COMMIT}")
    ]
    hub.faults["/cdn/datasets/someone/images/resolve/v1/data/index.json"] = [Fault(status=503), Fault(cut_after=1)]
    answers = _asked(hub, urls, tmp_path, HF_TOKEN="hf_secret")
    assert answers == ["main", "v1", "refs%2Fpr%2F1", HUB_COMMIT]
    # The client requests other paths too.
    files = [request for request in hub.requests if request.path.endswith("index.json")]
    hosts = {(request.host, request.authorization) for request in files}
    assert hosts == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_hf_files_on_the_hub_itself_are_requested_with_the_token(hub, tmp_path):
    """Small files are not redirected; a private one needs the token for its bytes too."""
    path = "/datasets/someone/images/resolve/main/small.json"
    hub.files[path] = b"{}"
    assert _asked(hub, ["hf://datasets/someone/images/small.json"], tmp_path, HF_TOKEN="hf_secret") == ["{}"]
    assert [request.authorization for request in hub.gets(path)] == ["Bearer hf_secret"]


def test_a_token_does_not_follow_a_redirect(hub, tmp_path):
    """Even if only the request for the bytes is redirected."""
    path = "/datasets/someone/images/resolve/main/late.json"
    hub.files[path] = hub.files[f"/cdn{path}"] = b"late"
    hub.faults[path] = [Fault(redirect=f"{hub.other_name}/cdn")]
    assert _asked(hub, ["hf://datasets/someone/images/late.json"], tmp_path, HF_TOKEN="hf_secret") == ["late"]
    assert [request.authorization for request in hub.gets(f"/cdn{path}")] == [None]


@pytest.mark.medium
def test_hf_failures_have_a_reason(hub, tmp_path):
    """No permission and no such file have different messages and end at once; a busy Hub is retried."""
    url = "hf://datasets/someone/images/data/index.json"
    (denied,) = _asked(hub, [url], tmp_path)
    assert "401" in denied and "HF_TOKEN" in denied and "attempts" not in denied
    urls = ["hf://datasets/someone/images/none.json", "hf://datasets/no--name/images/a.json", "hf://datasets/images"]
    missing, misnamed, short = _asked(hub, urls, tmp_path, HF_TOKEN="hf_secret")
    assert "404" in missing and "none.json" in missing and "attempts" not in missing
    assert "attempts" not in misnamed and "expected hf://datasets/USER/REPO" in short
    (offline,) = _asked(hub, [url], tmp_path, HF_HUB_OFFLINE="1")
    assert "attempts" not in offline and "ffline" in offline
    busy = "/datasets/someone/images/resolve/main/data/index.json"
    hub.always[busy] = Fault(status=503)
    (gave_up,) = _asked(hub, [url], tmp_path, HF_TOKEN="hf_secret")
    assert "503" in gave_up and "4 attempts" in gave_up
    for message in (denied, missing, misnamed, short, offline, gave_up):
        assert message.startswith("hf://") and "\n" not in message and "Traceback" not in message
