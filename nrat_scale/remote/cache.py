"""Files behind an address, fetched completely or not at all: retried, resumed, verified, kept in a bounded cache.

    https://host/path, http://...        the standard library
    hf://datasets/USER/REPO[@REV]/path   resolved by huggingface_hub (endpoint, login, redirects), then as https
    s3://bucket/path                     fsspec with s3fs (the extra `s3`)

A transfer that is cut goes on at the byte where it stopped. What may pass (no answer, HTTP 429 or 5xx, a cut) is tried
again with exponential backoff and jitter, or when the server says so; what will not (404, no permission) ends at once.
A file is used only after its size and sha256 were those of the index.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, sha256_of
from nrat_scale.remote.transfer import Cancelled, download, sleep_unless

CACHE_VARIABLE = "NRAT_SCALE_CACHE"
DEFAULT_CACHE_GB = 50.0
_CACHED = re.compile(r"([0-9a-f]{64})\.(?:tar|(\d+)\.part)")  # nothing else in the folder is the cache's to remove


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
                    raise Cancelled from None
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
            sleep_unless(stopped, 0.2)

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
