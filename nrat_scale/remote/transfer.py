"""Transfers that resume at the byte where they stopped, and the one retry policy.

A transient failure (no answer, HTTP 429 or 5xx, a cut) is retried with exponential backoff and jitter, or after the
pause that the server asks for. A permanent one (404, no permission) ends at once.
"""

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, sha256_of
from nrat_scale.remote.stores import PermanentError, RangeRefused, TransientError, open_at

T = TypeVar("T")
ATTEMPTS = 8  # without progress; the pauses add up to one to two minutes
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
_LONGEST_WAIT_SECONDS = 300.0  # limits the pause that a server asks for
_INDEX_ATTEMPTS = 4  # a run fetches its indexes first, and a mistyped address should fail soon
_DAMAGED_ATTEMPTS = 3  # complete transfers with wrong content
_PROGRESS_BYTES = 1 << 20  # an attempt that adds this much does not count as failed


class Cancelled(Exception):
    """The caller gave up the transfer."""


def fetch_bytes(url: str, limit: int) -> bytes:
    """The content of a small file; raises `UserError` if it cannot be fetched or has more than `limit` bytes."""

    def attempt() -> bytes:
        data = bytearray()
        with open_at(url, 0) as (chunks, _, size):
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise PermanentError(f"it has more than {limit} bytes")
            if size is not None and len(data) != size:
                raise TransientError(f"{len(data)} of {size} bytes arrived")
        return bytes(data)

    return retried(attempt, f"{url} cannot be fetched", attempts=_INDEX_ATTEMPTS)


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
    """Fetch `url` into `path`, which appears only when it is complete and verified. One process at a time: see `Cache`.

    Args:
        num_bytes, sha256: of the expected file; if they are None, only truncation is detected.
        part: the unfinished file; bytes of an earlier call are kept.
        stopped: polled with each chunk (at the latest after STALL_SECONDS) and in pauses; True cancels the transfer,
            which can be resumed.
        progress: receives the number of bytes so far after each chunk.

    Raises:
        UserError: the file cannot be fetched, differs from the expected one, or cannot be written.
        Cancelled: `stopped` returned True.
    """
    part = part or path.with_name(f"{path.name}.part")
    damaged = 0

    def attempt() -> None:
        nonlocal damaged
        _transfer(url, part, num_bytes, stopped, progress)
        if sha256 is not None and sha256_of(part) != sha256:
            os.truncate(part, 0)
            damaged += 1
            wrong = f"it does not have the expected sha256 {sha256[:12]}..."
            if damaged == _DAMAGED_ATTEMPTS:
                raise PermanentError(f"{wrong} after {damaged} transfers")
            raise TransientError(wrong)

    def size_of_part() -> int:
        return part.stat().st_size if part.exists() else 0

    try:
        retried(attempt, f"{url} cannot be fetched", stopped=stopped, progress_of=size_of_part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        fsync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}). Free some space or choose another place.") from error
    finally:
        with contextlib.suppress(OSError):
            if not size_of_part():  # nothing to resume
                part.unlink()


def _transfer(
    url: str, part: Path, num_bytes: int | None, stopped: Callable[[], bool], progress: Callable[[int], object]
) -> None:
    """Append the missing bytes to `part`."""
    kept = part.stat().st_size if part.exists() else 0
    if num_bytes is not None and kept > num_bytes:
        os.truncate(part, 0)
        kept = 0
    if num_bytes and kept == num_bytes:
        return
    try:
        with open_at(url, kept) as (chunks, received, size), open(part, "ab") as file:
            if num_bytes is not None and size not in (num_bytes, None):
                raise PermanentError(f"it has {size} bytes there instead of {num_bytes}")
            file.truncate(received)
            for chunk in chunks:
                if stopped():
                    raise Cancelled
                file.write(chunk)
                received += len(chunk)
                progress(received)
                if num_bytes is not None and received > num_bytes:
                    raise PermanentError(f"it has more than {num_bytes} bytes there")
    except RangeRefused:
        if kept:
            os.truncate(part, 0)  # the next attempt starts at byte 0
        raise
    expected = num_bytes if num_bytes is not None else size
    if expected is not None and received != expected:
        raise TransientError(f"{received} of {expected} bytes arrived")


def retried(
    attempt: Callable[[], T],
    what: str,
    *,
    way_out: str = "Check address and network.",
    attempts: int = ATTEMPTS,
    stopped: Callable[[], bool] = lambda: False,
    progress_of: Callable[[], int] = lambda: 0,
) -> T:
    """The result of `attempt`, repeated while it raises `TransientError`.

    Args:
        what: begins the error message, for instance "https://host/a.tar cannot be fetched".
        way_out: ends the error message after the last attempt.
        attempts: how many may fail without progress.
        stopped: polled in pauses.
        progress_of: bytes so far; an attempt that adds _PROGRESS_BYTES to the maximum does not count.

    Raises `UserError` after a `PermanentError` or the last attempt, and `Cancelled` if `stopped` is True in a pause.
    """
    failed, most = 0, progress_of()  # `most` is a high-water mark: restarting from byte 0 is not progress
    while True:
        try:
            return attempt()
        except PermanentError as error:
            raise UserError(f"{what}: {error}.") from None
        except TransientError as error:
            failed += 1
            if progress_of() - most >= _PROGRESS_BYTES:
                failed, most = 1, progress_of()
            if failed >= attempts:
                raise UserError(f"{what}: {error} ({attempts} attempts). {way_out}") from None
            pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (failed - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
            sleep_unless(stopped, min(max(pause, error.wait or 0.0), _LONGEST_WAIT_SECONDS))


def sleep_unless(stopped: Callable[[], bool], seconds: float) -> None:
    """Sleep; raises `Cancelled` soon after `stopped` returns True."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise Cancelled
        time.sleep(min(left, 0.2))
