"""A bounded cache of verified remote files, shared by the processes of a node."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, sha256_of
from nrat_scale.core.user_cache import user_cache
from nrat_scale.remote.transfer import Cancelled, download, sleep_unless

DEFAULT_CACHE_GB = 50.0
_CACHED = re.compile(r"([0-9a-f]{64})\.(?:tar|(\d+)\.part)")  # only these are evicted


def file_stamp(path: Path) -> list[int]:
    """Size, modification time (ns) and inode: they change if the file is written or replaced."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


class Cache:
    """A folder of verified files, named by their sha256, with a size limit.

    One process fetches a file while the others wait for its lock; the lock of a killed process is released. Least
    recently used files are evicted even while mapped; an open mapping stays valid. Other files in the folder are ignored.

    Args:
        folder: by default $NRAT_SCALE_CACHE, or ~/.cache/nrat_scale.
        limit_gb: of all files together, in 10^9 bytes.
    """

    def __init__(self, folder: str | Path | None = None, limit_gb: float = DEFAULT_CACHE_GB) -> None:
        self.folder = Path(folder).expanduser() if folder else user_cache()
        self.limit_bytes = int(limit_gb * 1e9)

    def fetch(self, url: str, num_bytes: int, sha256: str, *, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The verified local file with the content of `url`. Another process may evict it before it is opened.

        Raises:
            UserError: the file cannot be fetched, differs from the expected one, or does not fit.
            Cancelled: `stopped` returned True.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise UserError(f"The index has no valid sha256 for {url}. Make the shards again.")
        path = self.folder / f"{sha256}.tar"
        if self._stamped(path):
            return path
        make_folder(self.folder)
        try:
            with self._locked(sha256, stopped):
                if not self._stamped(path):
                    self._fill(path, url, num_bytes, sha256, stopped)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"The cache {self.folder} cannot be used ({reason}). Set data.remote.cache.") from error
        return path

    def _fill(self, path: Path, url: str, num_bytes: int, sha256: str, stopped: Callable[[], bool]) -> None:
        if path.exists() and (path.stat().st_size != num_bytes or sha256_of(path) != sha256):
            path.unlink()  # changed since it was verified
        if not path.exists():
            part = self.folder / f"{sha256}.{num_bytes}.part"
            self._make_room(num_bytes, part, stopped)
            download(url, path, num_bytes, sha256, part=part, stopped=stopped)
        path.with_suffix(".json").write_text(json.dumps(file_stamp(path)))

    def _locked(self, name: str, stopped: Callable[[], bool]) -> AcquireReturnProxy:
        """The acquired lock NAME.lock; leaving its `with` block releases it."""
        while True:
            try:
                return FileLock(self.folder / f"{name}.lock").acquire(timeout=0.2, poll_interval=0.05)
            except Timeout:
                if stopped():
                    raise Cancelled from None

    def _stamped(self, path: Path) -> bool:
        """Whether `path` is unchanged since it was verified; if so, it counts as used now."""
        stamp = path.with_suffix(".json")
        try:
            if json.loads(stamp.read_text()) != file_stamp(path):
                return False
        except (OSError, ValueError):
            return False
        with contextlib.suppress(OSError):  # a filled cache may be read-only
            os.utime(stamp)
        return True

    def _make_room(self, num_bytes: int, part: Path, stopped: Callable[[], bool]) -> None:
        """Evict least recently used files until `num_bytes` fit, and reserve them by creating `part`.

        If transfers of other processes take all the room, wait for them.
        """
        if num_bytes > self.limit_bytes:
            raise UserError(
                f"The limit of the cache {self.folder}, {self.limit_bytes / 1e9:.2f} GB, is too little for a shard of "
                f"{num_bytes / 1e9:.2f} GB. Raise data.remote.cache_gb."
            )
        while not self._reserved(num_bytes, part, stopped):
            part.unlink(missing_ok=True)  # give up the reservation: two waiting processes would block each other
            sleep_unless(stopped, 0.2)

    def _reserved(self, num_bytes: int, part: Path, stopped: Callable[[], bool]) -> bool:
        with self._locked("room", stopped):
            contents = self._contents()
            contents.pop(part.name.partition(".")[0], None)
            total = num_bytes + sum(size for _, size in contents.values())
            for sha256, (_, size) in sorted(contents.items(), key=lambda item: item[1]):
                if total <= self.limit_bytes:
                    break
                if self._evicted(sha256):
                    total -= size
            if total > self.limit_bytes:
                return False
            if shutil.disk_usage(self.folder).free < num_bytes - (part.stat().st_size if part.exists() else 0):
                raise UserError(
                    f"The disk of the cache {self.folder} has no room for a shard of {num_bytes / 1e9:.2f} GB. "
                    "Free some space, lower data.remote.cache_gb, or set data.remote.cache."
                )
            part.touch()
            return True

    def _contents(self) -> dict[str, tuple[float, int]]:
        """sha256 -> (time of last use, bytes); an unfinished file counts with its full size."""
        contents = {}
        for pattern in ("*.part", "*.tar"):  # a file completed in between is counted twice, never missed
            for path in self.folder.glob(pattern):
                if (match := _CACHED.fullmatch(path.name)) is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # completed or evicted in between
                    stamp = path if match[2] else path.with_suffix(".json")
                    used = stamp.stat().st_mtime if stamp.exists() else 0.0
                    contents[match[1]] = used, int(match[2]) if match[2] else path.stat().st_size
        return contents

    def _evicted(self, sha256: str) -> bool:
        """Evict a file; False if a process is fetching it."""
        try:
            with FileLock(self.folder / f"{sha256}.lock", timeout=0):
                for name in (f"{sha256}.json", f"{sha256}.tar"):
                    (self.folder / name).unlink(missing_ok=True)
                for part in self.folder.glob(f"{sha256}.*.part"):
                    part.unlink(missing_ok=True)
                return True
        except Timeout:
            return False
