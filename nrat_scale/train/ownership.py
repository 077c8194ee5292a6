"""One training per run directory: the main process owns RUN until it ends, however it ends.

    RUN/.alive/lock         locked by the owner; the kernel unlocks it when the process dies
    RUN/.alive/owner.json   host, machine, pid, start time, token; touched every second

On one machine the lock decides. A file system may not lock, or lock on each node separately, so an owner on another machine
counts as alive until its record has not been touched for `LEASE_SECONDS`. An owner that was frozen for longer and has been
replaced finds another token in the record, and stops writing.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nrat_scale.core.errors import UserError, printable, warn
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.core.run_folder import RunFolder

LEASE_SECONDS = 60.0  # an owner on another machine that does not touch its record for so long is dead
_PERIOD_SECONDS = 1.0  # between touches
_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 2.5  # after a takeover without a common lock, until a rival's record would be visible
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system cannot lock


@dataclass(frozen=True)
class Owner:
    """The record of a process that trains."""

    host: str
    machine: str  # boot id of its kernel: containers of one machine share it, and its file locks
    pid: int
    started: str  # local time
    token: str  # unique

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)} (since {printable(self.started)})"


def machine_id() -> str:
    """Identifies the running kernel."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def read_owner(run: RunFolder) -> Owner | None:
    """The record of RUN, None if it is missing or incomplete."""
    try:
        fields = json.loads(run.owner.read_bytes())
        owner = Owner(**fields)
    except (OSError, ValueError, TypeError):
        return None
    kinds = {"pid": int}
    return owner if all(type(value) is kinds.get(key, str) for key, value in asdict(owner).items()) else None


class Ownership:
    """This process's claim on a run directory; see `claim`. `replaced_by` is set once another process has taken over."""

    def __init__(self, run: RunFolder, lock: int | None) -> None:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self.me = Owner(socket.gethostname(), machine_id(), os.getpid(), started, uuid.uuid4().hex)
        self.replaced_by: Owner | None = None
        self._run, self._lock, self._released = run, lock, threading.Event()
        self._beat = threading.Thread(target=self._touch, name="owner", daemon=True)

    def __enter__(self) -> "Ownership":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, UserError):
                self.check()  # a file may be missing because a successor removed it as a leftover: then say that
        finally:
            self.release()

    def check(self) -> None:
        """Raise `UserError` if another process has replaced this one."""
        now = read_owner(self._run)
        if now is not None and now.token != self.me.token:
            self.replaced_by = now
        if self.replaced_by is not None:
            raise UserError(
                f"{self._run.path} is now trained by {self.replaced_by}, because this process did not answer for "
                f"{LEASE_SECONDS:.0f} s. This process writes nothing more to it."
            )

    def release(self) -> None:
        """End the claim; safe to call twice."""
        if self._released.is_set():
            return
        self._released.set()
        if self._beat.is_alive():
            self._beat.join()
        now = read_owner(self._run)
        if now is not None and now.token != self.me.token:
            return  # perhaps a later claim of this process: closing any descriptor of the file would end its lock
        with suppress(OSError):
            self._run.owner.unlink()
        if self._lock is not None:
            os.close(self._lock)

    def _record(self, *, replace: bool) -> bool:
        """Write the record; without `replace` only if there is none. Whether it was written."""
        content = json.dumps(asdict(self.me))
        if replace:
            write_atomically(self._run.owner, content)
            return True
        try:
            with open(self._run.owner, "x", encoding="utf-8") as file:  # atomic over NFS, too
                file.write(content)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self._run.owner} cannot be written ({error.strerror}). Free space.") from error
        return True

    def _touch(self) -> None:
        while not self._released.wait(_PERIOD_SECONDS):
            with suppress(OSError, UserError):  # a full disk or a lost server must not end the run
                now = read_owner(self._run)
                if now is not None and now.token != self.me.token:
                    self.replaced_by = now
                    return
                if not self._run.owner.exists():  # removed by hand
                    self._record(replace=False)
                os.utime(self._run.owner)


def claim(run: RunFolder) -> Ownership:
    """Own the folder `run`, which exists, until `Ownership.release` or the end of this process.

    Waits for at most `LEASE_SECONDS` if the last owner was on another machine and did not end by itself.

    Raises:
        UserError: another process owns it; the message names the process.
    """
    make_folder(run.alive)
    lock, locked = _lock(run)
    mine = Ownership(run, lock)
    try:
        if not mine._record(replace=False):
            before = _complete_record(run)
            dead = locked and (before is None or before.machine == mine.me.machine)  # it held the lock that we hold now
            if not dead:
                _wait_for_lease(run, before)
            mine._record(replace=True)
            if not dead:
                time.sleep(_SETTLE_SECONDS)
            now = read_owner(run)
            if now is not None and now.token != mine.me.token:
                raise _refusal(run, now)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    mine._beat.start()
    return mine


def _lock(run: RunFolder) -> tuple[int | None, bool]:
    """(descriptor, whether it is locked); not locked if the file system cannot lock."""
    try:
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{run.lock} cannot be opened ({error.strerror}). Change its permissions.") from error
    try:
        # A record lock: it works over NFS, and children that this process forks do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return descriptor, False
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{run.lock} cannot be locked ({error.strerror}).") from error
        raise _refusal(run, _complete_record(run)) from None
    return descriptor, True


def _complete_record(run: RunFolder) -> Owner | None:
    """The record; waits a moment for a process that is about to write it."""
    end = time.monotonic() + _SETTLE_SECONDS
    while (owner := read_owner(run)) is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return owner


def _wait_for_lease(run: RunFolder, owner: Owner | None) -> None:
    """Return when the record has not been touched for `LEASE_SECONDS`; `UserError` as soon as it is touched."""
    first = _touched(run)
    if first is None:
        return
    probe = run.alive / f"now-{uuid.uuid4().hex[:8]}"
    told = False
    try:
        while True:
            probe.touch()  # ages are by the file system's clock, because those of hosts differ
            if probe.stat().st_mtime - first > LEASE_SECONDS:
                return
            time.sleep(_POLL_SECONDS)
            last = _touched(run)
            if last is None:
                return
            if last != first:
                raise _refusal(run, read_owner(run))
            if not told and probe.stat().st_mtime - first > 4 * _PERIOD_SECONDS:
                what = owner or "another process"
                warn(f"waiting whether {what} still trains {run.path}: at most {LEASE_SECONDS:.0f} s.")
                told = True
    except OSError as error:
        raise UserError(f"{probe} cannot be written ({error.strerror}). Free space.") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _touched(run: RunFolder) -> float | None:
    """Modification time of the record, None if there is none; opening it makes an NFS client ask the server."""
    with suppress(OSError), open(run.owner, "rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return None


def _refusal(run: RunFolder, owner: Owner | None) -> UserError:
    return UserError(
        f"{run.path} is being trained by {owner or 'another process'}; a second training would damage it. Wait for its end, "
        "stop it, or choose another run folder with run_dir=PATH."
    )
