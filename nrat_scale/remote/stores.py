"""Open a remote file at a byte offset: one opener per scheme, listed in `OPENERS`.

https://, http://   urllib
hf://               resolved by huggingface_hub (endpoint, token, redirect), then as https
s3://               fsspec with s3fs (the extra `s3`)
"""

import contextlib
import re
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.client import HTTPException, IncompleteRead, InvalidURL
from typing import Any, NamedTuple

from nrat_scale.core.errors import UserError, printable
from nrat_scale.remote.address import parse_hub

STALL_SECONDS = 30.0  # without a byte
_URL_SAFE = "%/:?&=#~+!$,;'@()*[]"  # already quoted, or has a meaning in an address
_CHUNK_BYTES, _S3_CHUNK_BYTES = 1 << 20, 8 << 20
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


class TransientError(Exception):
    """A failure that another attempt may cure; `wait` is the pause in seconds that the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RangeRefused(TransientError):
    """The server does not continue at the requested byte: the file there became shorter or was replaced."""


class PermanentError(Exception):
    """A failure that another attempt cannot cure."""


class RemoteFile(NamedTuple):
    """An open remote file."""

    chunks: Iterator[bytes]  # from `start` on
    start: int  # 0 if the store ignored the requested offset
    size: int | None  # of the complete file in bytes; None if the store does not state it


def open_at(url: str, start: int) -> AbstractContextManager[RemoteFile]:
    """Open `url` at byte `start`; raises `UserError` for an unknown scheme.

    Opening it and reading its chunks raise `TransientError` and `PermanentError`.
    """
    scheme = url.partition("://")[0]
    if scheme not in OPENERS:
        raise UserError(f"{url} cannot be read: the scheme '{scheme}' is not one of {', '.join(OPENERS)}.")
    return OPENERS[scheme](url, start)


@contextlib.contextmanager
def _open_http(url: str, start: int, authorization: str | None = None) -> Iterator[RemoteFile]:
    headers = {"User-Agent": "nrat_scale", "Accept-Encoding": "identity"}
    with _http_failures(url):
        request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_SAFE), headers=headers)
    if authorization:
        request.add_unredirected_header("Authorization", authorization)  # not sent to the host of a redirect
    if start:
        request.add_header("Range", f"bytes={start}-")
    with _http_failures(url):
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    with response:
        length = response.length  # None if the body is chunked or ends with the connection
        begin, size = 0, length
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise PermanentError(f"the server sends it compressed ({printable(encoding)}), which was not requested")
        if response.headers.get_content_type() == "text/html":
            raise PermanentError("the server answers with a web page instead of the file")
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise RangeRefused("the server answers a range request with another range")
            begin, size = start, None if match[2] == "*" else int(match[2])
        yield RemoteFile(_http_chunks(response, url, length), begin, size)


def _http_chunks(response: Any, url: str, left: int | None) -> Iterator[bytes]:
    """The body as it arrives, so that a cut or a stall loses no received byte."""
    while left != 0:
        with _http_failures(url):
            chunk = response.read1(_CHUNK_BYTES if left is None else min(_CHUNK_BYTES, left))
        if not chunk:
            break
        left = None if left is None else left - len(chunk)
        yield chunk
    if left:
        raise TransientError(f"the connection was cut {left} bytes before the end")


@contextlib.contextmanager
def _http_failures(url: str) -> Iterator[None]:
    """Translate urllib's exceptions into `TransientError` and `PermanentError`."""
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2]
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"HTTP {error.code} {printable(str(error.reason).partition(chr(10))[0])}".strip()
        if error.code == 416:
            raise RangeRefused(reason) from None
        if error.code in _TRANSIENT_STATUS:
            raise TransientError(reason, _retry_after(error.headers)) from None
        raise PermanentError(reason) from None
    except IncompleteRead:
        raise TransientError("the connection was cut") from None
    except (ValueError, InvalidURL) as error:  # a malformed address
        raise PermanentError(str(error)) from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, str):
            raise PermanentError(cause) from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise PermanentError(f"the certificate of {host} is not trusted ({cause.verify_message})") from None
        if isinstance(cause, socket.gaierror):
            raise TransientError(f"the name {host} cannot be resolved") from None
        if isinstance(cause, ConnectionRefusedError):
            raise TransientError(f"{host} refuses the connection") from None
        if isinstance(cause, TimeoutError):
            raise TransientError(f"{host} sent nothing for {STALL_SECONDS:.0f} s") from None
        raise TransientError(f"{type(cause).__name__}: {cause}") from None


def _retry_after(headers: Any) -> float | None:
    """The seconds of a Retry-After header; None if it is absent or a date."""
    value = headers.get("Retry-After", "") if headers is not None else ""
    return float(value) if value.isdecimal() else None


def hub_failure(error: Exception) -> TransientError | PermanentError:
    """Classify an exception of huggingface_hub, whose HTTP libraries share no base class."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)  # None: the network failed, or the client refused its arguments
    lines = [printable(line.strip()) for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]).rstrip(".") or type(error).__name__
    if status in (401, 403):
        return PermanentError(f"{reason}; log in with `hf auth login` or set HF_TOKEN")
    refused = isinstance(error, ValueError | FileNotFoundError) or type(error).__name__ == "OfflineModeIsEnabled"
    if status in _TRANSIENT_STATUS or (status is None and not refused):
        return TransientError(reason, _retry_after(getattr(response, "headers", None)))
    return PermanentError(reason)


def _open_hub(url: str, start: int) -> AbstractContextManager[RemoteFile]:
    """Open the https address that the Hub names; the token goes to the host of the Hub alone."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    repo, revision, path, kind = parse_hub(url)
    if not path:
        raise PermanentError("expected hf://datasets/USER/REPO/FILE or hf://buckets/USER/BUCKET/FILE")
    try:
        if kind == "bucket":  # not part of `hf_hub_url`; the same address as in `HfApi.get_bucket_file_metadata`
            endpoint = huggingface_hub.constants.ENDPOINT
            public = f"{endpoint}/buckets/{repo}/resolve/{urllib.parse.quote(path, safe='')}"
        else:
            public = huggingface_hub.hf_hub_url(repo, path, repo_type="dataset", revision=revision)
        location = huggingface_hub.get_hf_file_metadata(public, timeout=STALL_SECONDS).location
    except Exception as error:
        raise hub_failure(error) from None
    same_host = urllib.parse.urlsplit(location).netloc == urllib.parse.urlsplit(public).netloc
    authorization = build_hf_headers().get("authorization") if same_host else None
    return _open_http(location, start, authorization)


@contextlib.contextmanager
def _open_s3(url: str, start: int) -> Iterator[RemoteFile]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)  # for each file: an fsspec file system does not survive a fork
    except ImportError:
        raise UserError(f"{url} needs s3fs: pip install s3fs") from None
    with _s3_failures():
        info = system.info(path)
    size = int(info["size"])
    if info["type"] != "file":
        raise PermanentError("it is a folder")
    if start > size:
        raise RangeRefused(f"it has {size} bytes there")

    def chunks() -> Iterator[bytes]:
        for first in range(start, size, _S3_CHUNK_BYTES):
            with _s3_failures():
                chunk = system.cat_file(path, start=first, end=min(first + _S3_CHUNK_BYTES, size))
            yield chunk

    yield RemoteFile(chunks(), start, size)


@contextlib.contextmanager
def _s3_failures() -> Iterator[None]:
    """Translate s3fs's exceptions into `TransientError` and `PermanentError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise PermanentError(f"there is no such object or bucket ({error})") from None
    except PermissionError as error:
        raise PermanentError(f"the access is denied ({error})") from None
    except Exception as error:  # botocore and aiohttp share no base class
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError"):
            raise PermanentError(f"{error} (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)") from None
        raise TransientError(f"{name}: {error}") from None


OPENERS: dict[str, Callable[[str, int], AbstractContextManager[RemoteFile]]] = {
    "http": _open_http,
    "https": _open_http,
    "hf": _open_hub,
    "s3": _open_s3,
}
