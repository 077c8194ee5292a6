"""Open a remote file at a byte offset: one opener per scheme."""

import contextlib
import re
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, IncompleteRead, InvalidURL
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.remote.address import HF, URL_SAFE

STALL_SECONDS = 30.0  # without a byte
_CHUNK, _S3_CHUNK = 1 << 20, 8 << 20
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class MayPass(Exception):
    """A failure that may pass; `wait` is the pause in seconds that the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RangeRefused(MayPass):
    """The server does not go on where we stand: what is there has become shorter, or another file."""


class WillNotPass(Exception):
    """A failure that another attempt does not cure."""


# ---- one attempt ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_at(url: str, start: int) -> Iterator[tuple[Iterator[bytes], int, int | None]]:
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
        request = urllib.request.Request(urllib.parse.quote(url, safe=URL_SAFE), headers=headers)
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
            raise WillNotPass(f"the server sends it compressed ({encoding}), which was not asked for")
        if response.headers.get_content_type() == "text/html":
            raise WillNotPass("the server answers with a web page instead of the file")
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise RangeRefused("the server answers a range request with another range")
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
        raise MayPass(f"the connection was cut {left} bytes before the end")


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
            raise RangeRefused(reason) from None
        if error.code in _TRANSIENT:
            raise MayPass(reason, _retry_after(error.headers.get("Retry-After"))) from None
        raise WillNotPass(reason) from None
    except IncompleteRead:
        raise MayPass("the connection was cut") from None
    except (ValueError, InvalidURL) as error:  # an address that is none
        raise WillNotPass(str(error)) from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, str):
            raise WillNotPass(cause) from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise WillNotPass(f"the certificate of {host} is not trusted ({cause.verify_message})") from None
        if isinstance(cause, socket.gaierror):
            raise MayPass(f"the name {host} cannot be resolved") from None
        if isinstance(cause, ConnectionRefusedError):
            raise MayPass(f"{host} refuses the connection") from None
        if isinstance(cause, TimeoutError):
            raise MayPass(f"{host} sent nothing for {STALL_SECONDS:.0f} s") from None
        raise MayPass(f"{type(cause).__name__}: {cause}") from None


def _retry_after(value: str | None) -> float | None:
    """Seconds, from the form in seconds; the form with a date is left to our own pauses."""
    return float(value) if value is not None and value.isdecimal() else None


def _resolve_hf(url: str) -> tuple[str, dict[str, str]]:
    """(https address, headers for its host alone) of a file on the Hugging Face Hub."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    match = HF.fullmatch(url)
    if match is None:
        raise WillNotPass("expected hf://datasets/USER/REPO/FILE")
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
            raise WillNotPass(f"{reason}; log in with `hf auth login` or set HF_TOKEN") from None
        if isinstance(error, ValueError) or type(error).__name__ == "OfflineModeIsEnabled":
            raise WillNotPass(reason) from None
        if status is None or status in _TRANSIENT:
            raise MayPass(
                reason, _retry_after(answer.headers.get("Retry-After")) if answer is not None else None
            ) from None
        raise WillNotPass(reason) from None
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
        raise WillNotPass("it is a folder")
    if start > size:
        raise RangeRefused(f"it has {size} bytes there")

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
        raise WillNotPass(f"there is no such object or bucket ({error})") from None
    except PermissionError as error:
        raise WillNotPass(f"the access is denied ({error})") from None
    except Exception as error:  # botocore's and aiohttp's errors share no base class with each other
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError"):
            raise WillNotPass(f"{error} (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)") from None
        raise MayPass(f"{name}: {error}") from None
