"""Transfers that resume by byte and retry with backoff: the one retry policy for reading."""

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, sha256_of
from nrat_scale.remote.stores import MayPass, RangeRefused, WillNotPass, open_at

ATTEMPTS = 8  # without progress; the pauses below add up to one to two minutes
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
_DAMAGED_ATTEMPTS = 3  # complete transfers whose content is wrong
_PROGRESS_BYTES = 1 << 20  # an attempt that brought this much does not count as failed


class Cancelled(Exception):
    """The transfer was given up because nobody waits for it any more."""


# ---- whole files ----------------------------------------------------------------------------------------------------


def fetch_bytes(url: str, limit: int) -> bytes:
    """The content of a small file, at most `limit` bytes.

    Raises:
        UserError: it cannot be had, or is larger.
    """

    def attempt() -> bytes:
        data = bytearray()
        with open_at(url, 0) as (chunks, _, size):
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise WillNotPass(f"it has more than {limit} bytes")
            if size is not None and len(data) != size:
                raise MayPass(f"{len(data)} of {size} bytes arrived")
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
                raise WillNotPass(f"{wrong}, {damaged} times")
            raise MayPass(wrong)

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
        with open_at(url, there) as (chunks, received, size):
            if num_bytes is not None and size is not None and size != num_bytes:
                raise WillNotPass(f"it has {size} bytes there instead of {num_bytes}")
            with open(part, "ab") as file:
                file.truncate(received)
                for chunk in chunks:
                    if stopped():
                        raise Cancelled
                    file.write(chunk)
                    received += len(chunk)
                    progress(received)
                    if num_bytes is not None and received > num_bytes:
                        raise WillNotPass(f"it has more than {num_bytes} bytes there")
    except RangeRefused:
        if there:
            os.truncate(part, 0)  # the next attempt asks from the beginning
        raise
    expected = num_bytes if num_bytes is not None else size
    if expected is not None and received != expected:
        raise MayPass(f"{received} of {expected} bytes arrived")


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
        except WillNotPass as error:
            raise UserError(f"{url} cannot be fetched: {error}.") from None
        except MayPass as error:
            failed += 1
            if size_of() - most >= _PROGRESS_BYTES:
                failed, most = 1, size_of()
            if failed >= attempts:
                raise UserError(
                    f"{url} cannot be fetched: {error} ({attempts} attempts). Check address and network."
                ) from None
            pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (failed - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
            wait_before_retry(min(max(pause, error.wait or 0.0), 5 * LONGEST_PAUSE_SECONDS), stopped)


def wait_before_retry(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise Cancelled
        time.sleep(min(left, 0.2))
