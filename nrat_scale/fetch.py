"""Files behind an address, fetched completely or not at all: retried, resumed, verified, kept in a bounded cache.

    https://host/path, http://...        the standard library
    hf://datasets/USER/REPO[@REV]/path   resolved by huggingface_hub (endpoint, login, redirects), then as https
    s3://bucket/path                     fsspec with s3fs (the extra `s3`)

A transfer that is cut goes on at the byte where it stopped. What may pass (no answer, HTTP 429 or 5xx, a cut) is tried
again with exponential backoff and jitter, or when the server says so; what will not (404, no permission) ends at once.
A file is used only after its size and sha256 were those of the index.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, IncompleteRead, InvalidURL
from pathlib import Path
from typing import Any

import braceexpand
from filelock import FileLock, Timeout

from nrat_scale.errors import UserError
from nrat_scale.files import fsync_folder, make_folder, sha256_of

SCHEMES = ("http", "https", "hf", "s3")
CACHE_VARIABLE = "NRAT_SCALE_CACHE"
DEFAULT_CACHE_GB = 50.0
ATTEMPTS = 8  # without progress; the pauses below add up to one to two minutes
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
STALL_SECONDS = 30.0  # without a byte
_DAMAGED_ATTEMPTS = 3  # complete transfers whose content is wrong
_PROGRESS_BYTES = 1 << 20  # an attempt that brought this much does not count as failed
_CHUNK, _S3_CHUNK = 1 << 20, 8 << 20
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_MAX_NAMES = 1_000_000
_URL_SAFE = "%/:?&=#~+!$,;'@()*[]"  # already quoted, or with a meaning in an address
_HF = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_CACHED = re.compile(r"([0-9a-f]{64})\.(?:tar|(\d+)\.part)")  # nothing else in the folder is the cache's to remove


class _MayPass(Exception):
    """A failure that may pass; `wait` is the pause in seconds that the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _RangeRefused(_MayPass):
    """The server does not go on where we stand: what is there has become shorter, or another file."""


class _WillNotPass(Exception):
    """A failure that another attempt does not cure."""


class Stopped(Exception):
    """The transfer was given up because nobody waits for it any more."""


# ---- addresses ------------------------------------------------------------------------------------------------------


def is_remote(where: str) -> bool:
    """Whether `where` is an address and not a local path."""
    return "://" in where


def expand(where: str) -> tuple[str, list[str] | None]:
    """(folder, names of tars or None for all) of a folder, of one tar, or of a brace list of tars.

    Raises:
        UserError: an unknown scheme, or braces that cannot be expanded.
    """
    scheme = where.partition("://")[0] if is_remote(where) else ""
    if scheme and scheme not in SCHEMES:
        raise UserError(f"{where} cannot be read: the scheme '{scheme}' is none of {', '.join(SCHEMES)}.")
    if not where.endswith(".tar"):
        return where.rstrip("/") if scheme else where, None
    folder, _, last = where.rpartition("/")
    # braceexpand writes out each range before it gives the first name.
    too_many = any(abs(int(a) - int(b)) >= _MAX_NAMES for a, b in re.findall(r"\{(-?\d{1,99})\.\.(-?\d{1,99})", last))
    try:
        names = [] if too_many else list(itertools.islice(braceexpand.braceexpand(last), _MAX_NAMES + 1))
    except ValueError as error:
        raise UserError(
            f"The braces in {where} cannot be expanded ({error}). Write shard-{{00000..00009}}.tar."
        ) from error
    if too_many or len(names) > _MAX_NAMES:
        raise UserError(f"{where} names more than {_MAX_NAMES} shards.")
    return folder or ("/" if where.startswith("/") else "."), names


# ---- one attempt ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(url: str, start: int) -> Iterator[tuple[Iterator[bytes], int, int | None]]:
    """(chunks, byte at which they start, complete size where the server tells it) of what lies at `url`."""
    scheme = url.partition("://")[0]
    if scheme == "s3":
        yield _opened_s3(url, start)
        return
    private: dict[str, str] = {}
    if scheme == "hf":
        url, private = _resolve_hf(url)
    headers = {"User-Agent": "nrat_scale", "Accept-Encoding": "identity"}
    with _http_failures(url):
        request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_SAFE), headers=headers)
    for key, value in private.items():
        request.add_unredirected_header(key, value)  # a redirect to another host must not see the token
    if start:
        request.add_header("Range", f"bytes={start}-")
    with _http_failures(url):
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    with response:
        length = response.length  # None where the answer comes in chunks or ends with the connection
        begin, size = 0, length
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise _WillNotPass(f"the server sends it compressed ({encoding}), which was not asked for")
        if response.headers.get_content_type() == "text/html":
            raise _WillNotPass("the server answers with a web page instead of the file")
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise _RangeRefused("the server answers a range request with another range")
            begin, size = start, None if match[2] == "*" else int(match[2])
        yield _chunks(response, url, length), begin, size


def _chunks(response: Any, url: str, left: int | None) -> Iterator[bytes]:
    """What the connection brings, as it comes, so that nothing is lost where it is cut or stalls."""
    while left != 0:
        with _http_failures(url):
            chunk = response.read1(_CHUNK if left is None else min(_CHUNK, left))
        if not chunk:
            break
        left = None if left is None else left - len(chunk)
        yield chunk
    if left:
        raise _MayPass(f"the connection was cut {left} bytes before the end")


@contextlib.contextmanager
def _http_failures(url: str) -> Iterator[None]:
    """Sort what urllib raises into `_MayPass` and `_WillNotPass`."""
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2]
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"HTTP {error.code} {str(error.reason).partition(chr(10))[0]}".strip()
        if error.code == 416:
            raise _RangeRefused(reason) from None
        if error.code in _TRANSIENT:
            raise _MayPass(reason, _retry_after(error.headers.get("Retry-After"))) from None
        raise _WillNotPass(reason) from None
    except IncompleteRead:
        raise _MayPass("the connection was cut") from None
    except (ValueError, InvalidURL) as error:  # an address that is none
        raise _WillNotPass(str(error)) from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, str):
            raise _WillNotPass(cause) from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _WillNotPass(f"the certificate of {host} is not trusted ({cause.verify_message})") from None
        if isinstance(cause, socket.gaierror):
            raise _MayPass(f"the name {host} cannot be resolved") from None
        if isinstance(cause, ConnectionRefusedError):
            raise _MayPass(f"{host} refuses the connection") from None
        if isinstance(cause, TimeoutError):
            raise _MayPass(f"{host} sent nothing for {STALL_SECONDS:.0f} s") from None
        raise _MayPass(f"{type(cause).__name__}: {cause}") from None


def _retry_after(value: str | None) -> float | None:
    """Seconds, from the form in seconds; the form with a date is left to our own pauses."""
    return float(value) if value is not None and value.isdecimal() else None


def _resolve_hf(url: str) -> tuple[str, dict[str, str]]:
    """(https address, headers for its host alone) of a file on the Hugging Face Hub."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    match = _HF.fullmatch(url)
    if match is None:
        raise _WillNotPass("expected hf://datasets/USER/REPO/FILE")
    try:
        revision = urllib.parse.unquote(match[2]) if match[2] else None
        public = huggingface_hub.hf_hub_url(match[1], match[3], repo_type="dataset", revision=revision)
        location = huggingface_hub.get_hf_file_metadata(public, timeout=STALL_SECONDS).location
    except Exception as error:  # below the Hub's client lie different HTTP libraries, whose errors share no base class
        answer = getattr(error, "response", None)
        status = getattr(answer, "status_code", None)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]).rstrip(".") or type(error).__name__
        if status in (401, 403):
            raise _WillNotPass(f"{reason}; log in with `hf auth login` or set HF_TOKEN") from None
        if isinstance(error, ValueError) or type(error).__name__ == "OfflineModeIsEnabled":
            raise _WillNotPass(reason) from None
        if status is None or status in _TRANSIENT:
            raise _MayPass(
                reason, _retry_after(answer.headers.get("Retry-After")) if answer is not None else None
            ) from None
        raise _WillNotPass(reason) from None
    same_host = urllib.parse.urlsplit(location).netloc == urllib.parse.urlsplit(public).netloc
    authorization = build_hf_headers().get("authorization") if same_host else None
    return location, {"Authorization": authorization} if authorization else {}


def _opened_s3(url: str, start: int) -> tuple[Iterator[bytes], int, int | None]:
    import fsspec

    try:
        # Asked for anew each time: an fsspec file system does not survive a fork.
        system, path = fsspec.core.url_to_fs(url)
    except ImportError:
        raise UserError(f"{url} needs s3fs: pip install s3fs") from None
    with _s3_failures():
        info = system.info(path)
    size = int(info["size"])
    if info["type"] != "file":
        raise _WillNotPass("it is a folder")
    if start > size:
        raise _RangeRefused(f"it has {size} bytes there")

    def chunks() -> Iterator[bytes]:
        for first in range(start, size, _S3_CHUNK):
            with _s3_failures():
                chunk = system.cat_file(path, start=first, end=min(first + _S3_CHUNK, size))
            yield chunk

    return chunks(), start, size


@contextlib.contextmanager
def _s3_failures() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _WillNotPass(f"there is no such object or bucket ({error})") from None
    except PermissionError as error:
        raise _WillNotPass(f"the access is denied ({error})") from None
    except Exception as error:  # botocore's and aiohttp's errors share no base class with each other
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError"):
            raise _WillNotPass(f"{error} (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)") from None
        raise _MayPass(f"{name}: {error}") from None


# ---- whole files ----------------------------------------------------------------------------------------------------


def fetch_bytes(url: str, limit: int) -> bytes:
    """The content of a small file, at most `limit` bytes.

    Raises:
        UserError: it cannot be had, or is larger.
    """

    def attempt() -> bytes:
        data = bytearray()
        with _opened(url, 0) as (chunks, _, size):
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise _WillNotPass(f"it has more than {limit} bytes")
            if size is not None and len(data) != size:
                raise _MayPass(f"{len(data)} of {size} bytes arrived")
        return bytes(data)

    # Fewer attempts: this is the first thing that a run asks for, and a mistyped address should end soon.
    return _retried(attempt, url, lambda: False, attempts=4)


def download(
    url: str,
    path: Path,
    num_bytes: int | None,
    sha256: str | None,
    *,
    part: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Fetch `url` into `path`, which is whole and verified or not there. Not for two processes at once: see `Cache`.

    Args:
        num_bytes, sha256: what must arrive; None where nobody knows, then only a cut is noticed.
        part: where the bytes are collected; what an earlier call left there is not fetched again.
        stopped: asked whenever bytes arrive (at the latest after STALL_SECONDS) and in pauses; once it is true the
            transfer is given up, resumable.
        progress: told the number of bytes that are there, after each chunk.

    Raises:
        UserError: it cannot be had, is not what it should be, or cannot be written.
        Stopped: `stopped` said so.
    """
    part = part or path.with_name(f"{path.name}.part")
    damaged = 0

    def attempt() -> None:
        nonlocal damaged
        _transfer(url, part, num_bytes, stopped, progress)
        if sha256 is not None and sha256_of(part) != sha256:
            os.truncate(part, 0)
            damaged += 1
            wrong = f"what arrives has not the sha256 {sha256[:12]}... of the index"
            if damaged == _DAMAGED_ATTEMPTS:
                raise _WillNotPass(f"{wrong}, {damaged} times")
            raise _MayPass(wrong)

    try:
        _retried(attempt, url, stopped, size_of=lambda: part.stat().st_size if part.exists() else 0)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}). Free some space or choose another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if part.stat().st_size == 0:  # nothing to go on with
                part.unlink()


def _transfer(
    url: str, part: Path, num_bytes: int | None, stopped: Callable[[], bool], progress: Callable[[int], object]
) -> None:
    """Bring `part` to its full size, from where it stands."""
    there = part.stat().st_size if part.exists() else 0
    if num_bytes is not None and there > num_bytes:
        os.truncate(part, 0)
        there = 0
    if num_bytes and there == num_bytes:
        return
    try:
        with _opened(url, there) as (chunks, received, size):
            if num_bytes is not None and size is not None and size != num_bytes:
                raise _WillNotPass(f"it has {size} bytes there instead of {num_bytes}")
            with open(part, "ab") as file:
                file.truncate(received)
                for chunk in chunks:
                    if stopped():
                        raise Stopped
                    file.write(chunk)
                    received += len(chunk)
                    progress(received)
                    if num_bytes is not None and received > num_bytes:
                        raise _WillNotPass(f"it has more than {num_bytes} bytes there")
    except _RangeRefused:
        if there:
            os.truncate(part, 0)  # the next attempt asks from the beginning
        raise
    expected = num_bytes if num_bytes is not None else size
    if expected is not None and received != expected:
        raise _MayPass(f"{received} of {expected} bytes arrived")


def _retried(
    attempt: Callable[[], Any],
    url: str,
    stopped: Callable[[], bool],
    *,
    attempts: int = ATTEMPTS,
    size_of: Callable[[], int] = lambda: 0,
) -> Any:
    """The result of `attempt`, repeated while it may help."""
    failed, most = 0, size_of()  # most: a server that lets us begin again and again makes no progress
    while True:
        try:
            return attempt()
        except _WillNotPass as error:
            raise UserError(f"{url} cannot be fetched: {error}.") from None
        except _MayPass as error:
            failed += 1
            if size_of() - most >= _PROGRESS_BYTES:
                failed, most = 1, size_of()
            if failed >= attempts:
                raise UserError(
                    f"{url} cannot be fetched: {error} ({attempts} attempts). Check address and network."
                ) from None
            pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (failed - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
            _sleep(min(max(pause, error.wait or 0.0), 5 * LONGEST_PAUSE_SECONDS), stopped)


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise Stopped
        time.sleep(min(left, 0.2))


# ---- the cache ------------------------------------------------------------------------------------------------------


class Cache:
    """A folder of verified files, named by their sha256, shared by all processes of a node and bounded in size.

    A file is fetched by one process while the others wait for it (file locks, which end with the process that holds
    them). It belongs to the cache: the files that were used longest ago are removed when room is needed, also while
    somebody reads them, who keeps his open map. Other files in the folder are left alone.

    Args:
        folder: by default $NRAT_SCALE_CACHE, or ~/.cache/nrat_scale.
        limit_gb: of all files together, 10^9 bytes.
    """

    def __init__(self, folder: str | Path | None = None, limit_gb: float = DEFAULT_CACHE_GB) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        given = folder or os.environ.get(CACHE_VARIABLE) or f"{home}/nrat_scale"
        self.folder = Path(given).expanduser()
        self.limit_bytes = int(limit_gb * 1e9)

    def fetch(self, url: str, num_bytes: int, sha256: str, *, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The verified local file with the content of `url`. Another process may remove it before it is opened.

        Raises:
            UserError: it cannot be had, is not what it should be, or finds no room.
            Stopped: `stopped` said so.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise UserError(f"The index states no sha256 for {url}. Make the shards again with tools/shard_dataset.py.")
        path = self.folder / f"{sha256}.tar"
        if self._stamped(path):
            return path
        make_folder(self.folder)
        try:
            with self._locked(sha256, stopped):
                if not self._stamped(path):
                    self._fill(path, url, num_bytes, sha256, stopped)
        except OSError as error:
            raise UserError(
                f"The cache {self.folder} cannot be used ({error.strerror or error}). "
                "Choose another place with data.remote.cache."
            ) from error
        return path

    def _fill(self, path: Path, url: str, num_bytes: int, sha256: str, stopped: Callable[[], bool]) -> None:
        if path.exists() and (path.stat().st_size != num_bytes or sha256_of(path) != sha256):
            path.unlink()  # no longer what it was when it was verified
        if not path.exists():
            part = self.folder / f"{sha256}.{num_bytes}.part"
            self._make_room(num_bytes, part, stopped)
            download(url, path, num_bytes, sha256, part=part, stopped=stopped)
        path.with_suffix(".json").write_text(json.dumps(self._state(path)))

    @contextlib.contextmanager
    def _locked(self, name: str, stopped: Callable[[], bool]) -> Iterator[None]:
        lock = FileLock(self.folder / f"{name}.lock")
        while True:
            try:
                lock.acquire(timeout=1.0, poll_interval=0.05)
                break
            except Timeout:
                if stopped():
                    raise Stopped from None
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    def _state(path: Path) -> list[int]:
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino]

    def _stamped(self, path: Path) -> bool:
        """Whether `path` is the very file that was verified; if so it counts as used now."""
        stamp = path.with_suffix(".json")
        try:
            if json.loads(stamp.read_text()) != self._state(path):
                return False
        except (OSError, ValueError):
            return False
        with contextlib.suppress(OSError):  # a filled cache may be read-only
            os.utime(stamp)
        return True

    def _make_room(self, num_bytes: int, part: Path, stopped: Callable[[], bool]) -> None:
        """Remove what was used longest ago until `num_bytes` fit, and reserve them by the existence of `part`.

        Where all the room is taken by files that others are fetching, wait for these.
        """
        if num_bytes > self.limit_bytes:
            raise UserError(
                f"The cache {self.folder} may hold {self.limit_bytes / 1e9:.2f} GB, which is too little for a shard of "
                f"{num_bytes / 1e9:.2f} GB. Raise data.remote.cache_gb."
            )
        while not self._reserved(num_bytes, part, stopped):
            part.unlink(missing_ok=True)  # it counts as a reservation: two that wait would wait for each other
            _sleep(0.2, stopped)

    def _reserved(self, num_bytes: int, part: Path, stopped: Callable[[], bool]) -> bool:
        with self._locked("room", stopped):
            contents = self._contents()
            contents.pop(part.name.partition(".")[0], None)
            total = num_bytes + sum(size for _, size in contents.values())
            for sha256, (_, size) in sorted(contents.items(), key=lambda item: item[1]):
                if total <= self.limit_bytes:
                    break
                if self._removed(sha256):
                    total -= size
            if total > self.limit_bytes:
                return False
            if shutil.disk_usage(self.folder).free < num_bytes - (part.stat().st_size if part.exists() else 0):
                raise UserError(
                    f"There is no room for a shard of {num_bytes / 1e9:.2f} GB in the cache {self.folder}. Free some "
                    "space, lower data.remote.cache_gb, or choose another place with data.remote.cache."
                )
            part.touch()
            return True

    def _contents(self) -> dict[str, tuple[float, int]]:
        """sha256 -> (when it was last used, bytes).

        An unfinished file counts as whole: somebody is filling it, or a killed run left it.
        """
        contents = {}
        for pattern in ("*.part", "*.tar"):  # in this order one that is finished meanwhile is seen twice, not missed
            for path in self.folder.glob(pattern):
                if (match := _CACHED.fullmatch(path.name)) is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # finished or given up meanwhile
                    stamp = path if match[2] else path.with_suffix(".json")
                    used = stamp.stat().st_mtime if stamp.exists() else 0.0
                    contents[match[1]] = used, int(match[2]) if match[2] else path.stat().st_size
        return contents

    def _removed(self, sha256: str) -> bool:
        lock = FileLock(self.folder / f"{sha256}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False  # being fetched
        try:
            (self.folder / f"{sha256}.json").unlink(missing_ok=True)
            for path in (self.folder / f"{sha256}.tar", *self.folder.glob(f"{sha256}.*.part")):
                path.unlink(missing_ok=True)
        finally:
            lock.release()
        return True
