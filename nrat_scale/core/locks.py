"""An exclusive lock between processes, held by the operating system, which frees it however its owner ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nrat_scale.core.errors import UserError, warn
from nrat_scale.core.files import make_folder

_NOT_AVAILABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of `path` while its content is read, changed and written; other processes wait.

    The lock is `flock` on `.NAME.lock` beside `path`. A file that a killed owner leaves is not locked and is used again. On
    NFS, Linux asks the server, so that the lock holds between nodes. If the file system has no locks (Lustre without
    `-o flock`, some FUSE mounts), a warning says so, and the caller continues without one.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    make_folder(path.parent)
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _acquired(lock)
    try:
        yield
    finally:
        with suppress(OSError):  # removed while locked: see `_acquired`
            os.unlink(lock)
        os.close(descriptor)


@contextmanager
def try_lock(path: Path) -> Iterator[int | None]:
    """The lock of `path` as in `locked`, without waiting: yields its descriptor, None if another process holds it.

    The lock belongs to the open file: a child process that inherits the descriptor keeps it when this process dies.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    make_folder(path.parent)
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = _acquired(lock, wait=False)
    except BlockingIOError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # the file stays: a child may hold its lock


def _acquired(lock: Path, *, wait: bool = True) -> int:
    """A descriptor that holds the lock, of the file that has this name now (an earlier owner removes its file)."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{lock} cannot be written ({error.strerror}). Choose another place.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                    return descriptor
        except OSError as error:
            if error.errno not in _NOT_AVAILABLE:
                os.close(descriptor)
                raise
            warn(
                f"The file system of {lock.parent} has no locks ({error.strerror}): run one evaluation at a time with each "
                "results file, or results can be lost."
            )
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
