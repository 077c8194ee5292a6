"""Write an output folder beside its final place and rename it at the end, so that it is complete or absent.

    .OUT.unfinished/lock        held while a process writes OUT
    .OUT.unfinished/whole/      renamed to OUT when it is complete
    .OUT.unfinished/scratch/    temporary files of the reader, e.g. a decompressed npz member

An error or Ctrl-C removes .OUT.unfinished. A killed process leaves it behind; the next writer of OUT removes it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, make_folder, unfinished_sibling


class Staging(NamedTuple):
    """Folders to write to: `whole` becomes the output, `scratch` is deleted."""

    whole: Path
    scratch: Path


@contextmanager
def staged(out: Path) -> Iterator[Staging]:
    """Folders to prepare `out` in; `Staging.whole` becomes `out` if the block succeeds.

    If the block fails, everything written is removed, including the parents of `out` that were created for it.

    Raises:
        UserError: `out` is not a new or empty folder, another process is writing it, or it cannot be written.
    """
    out = out if out.name else out.absolute()  # "." has no sibling
    created = [folder for folder in out.parents if not folder.exists()]
    try:
        _require_new(out)
        make_folder(out.parent)
        with _only_writer(out) as folder:
            _require_new(out)  # another writer may have finished since the first check
            staging = Staging(folder / "whole", folder / "scratch")
            for path in staging:
                shutil.rmtree(path, ignore_errors=True)  # left by a killed process
                path.mkdir()
            yield staging
            shutil.rmtree(staging.scratch)  # before the rename: a kill after it would leave large files
            for path in [*staging.whole.rglob("*"), staging.whole]:
                if path.is_dir():
                    fsync_folder(path)
            os.replace(staging.whole, out)  # replaces an empty folder; fails on a non-empty one
            fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"The shards cannot be written to {out} ({error.strerror or error}).") from error
    finally:
        for folder in created:
            with suppress(OSError):  # not empty if `out` was written
                folder.rmdir()


def _require_new(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} already exists and is never overwritten. Choose another --out, or remove it yourself.")


@contextmanager
def _only_writer(out: Path) -> Iterator[Path]:
    """The hidden sibling of `out`, locked; removed at the end."""
    folder = unfinished_sibling(out)
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
        (folder / "lock").stat()  # the previous holder may have removed the folder before it released the lock
    except (Timeout, FileNotFoundError):
        lock.release()
        raise UserError(f"Another process is writing {out}. Wait for it, or choose another --out.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
