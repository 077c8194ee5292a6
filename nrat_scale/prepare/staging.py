"""Folders that take long to write: whole or not there, one writer at a time, and a killed writer's work is gone on with.

    .OUT.unfinished/lock        held by the process that writes OUT
    .OUT.unfinished/scratch/    whatever its input needs on disk; empty at every start
    .OUT.unfinished/plans.json  what decides the bytes of each folder that is written
    .OUT.unfinished/records/    one small file for each finished piece
    .OUT.unfinished/whole/      what is renamed to OUT when everything is there

The folder lies beside OUT, on the same file system. An error keeps it where a piece was finished, and removes it where
none was; a kill cannot ask, so whoever comes next finds it either way.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, make_folder, read_json, write_json

_LOCK_SECONDS = 3.0  # the processes of a killed writer notice within less


class OtherPlan(UserError):
    """The unfinished folder belongs to another plan."""


class Unfinished:
    """The hidden sibling of `out`. Make it with `unfinished`.

    Attributes:
        out: what it becomes.
        folder, scratch, records, whole: see the top of this file.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = hidden_sibling(out)
        self.scratch, self.records, self.whole = (self.folder / name for name in ("scratch", "records", "whole"))
        self._planned = 0

    def has_pieces(self) -> bool:
        """Whether a piece is finished, so that there is something to go on with."""
        return any(self.records.rglob("*.json"))

    def plan(self, plan: dict[str, Any]) -> None:
        """State what decides the bytes of the next folder; pieces of an earlier start stand only under the same plan.

        Raises:
            OtherPlan: finished pieces are there that were made under another one.
        """
        path = self.folder / "plans.json"
        plan = json.loads(json.dumps(plan))  # tuples become lists, as they will be read
        plans = read_json(path, "plan of unfinished shards")["plans"] if path.is_file() else []
        if plans[self._planned : self._planned + 1] != [plan]:
            if self._planned < len(plans) and self.has_pieces():
                before = plans[self._planned]
                differ = sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key))
                raise OtherPlan(
                    f"{self.folder} holds unfinished work for {self.out} from other input or options (they differ in: "
                    f"{', '.join(differ)}). Remove {self.folder}, or choose another --out."
                )
            write_json(path, {"plans": [*plans[: self._planned], plan]})
        self._planned += 1

    def _prepare(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        if not self.has_pieces():  # killed before anything was finished: as if it had never begun
            for path in (self.records, self.whole):
                shutil.rmtree(path, ignore_errors=True)
            (self.folder / "plans.json").unlink(missing_ok=True)
        for path in (self.scratch, self.records, self.whole):
            path.mkdir(exist_ok=True)

    def _finish(self) -> None:
        planned = len(read_json(self.folder / "plans.json", "plan of unfinished shards")["plans"])
        assert planned == self._planned, "an earlier start planned more folders"
        for path in sorted(self.whole.rglob("*"), reverse=True):
            if path.is_dir():
                fsync_folder(path)
        fsync_folder(self.whole)
        os.replace(self.whole, self.out)  # over an empty folder, never over a full one
        fsync_folder(self.out.parent)


def hidden_sibling(out: Path) -> Path:
    """Where the unfinished work for `out` lies."""
    return out.with_name(f".{out.name}.unfinished")


def require_new_folder(folder: Path) -> None:
    """Raise `UserError` where `folder` is anything but absent or empty: nothing is ever overwritten."""
    try:
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as error:
        raise UserError(f"{folder} cannot be used as --out ({error.strerror}). Choose another place.") from error
    if taken:
        raise UserError(
            f"{folder} exists already and is never overwritten. Choose another --out, or remove it yourself."
        )


@contextmanager
def unfinished(out: Path) -> Iterator[Unfinished]:
    """The folder in which `out` is prepared; at the end of the block it becomes `out`, with one rename.

    Where the block fails it is kept if a piece was finished, and the error says so; otherwise it is removed, with the
    parents of `out` that were made for it.

    Raises:
        UserError: `out` is not new, another process is writing it, or it cannot be written.
    """
    out = out if out.name else out.absolute()  # "." has no sibling
    require_new_folder(out)
    made = [folder for folder in out.parents if not folder.exists()]
    work = Unfinished(out)
    try:
        make_folder(out.parent)
        with _written(out), _only_writer(work):
            require_new_folder(out)  # the other writer may just have finished
            try:
                work._prepare()
                yield work
                work._finish()
            except BaseException as error:
                shutil.rmtree(work.scratch, ignore_errors=True)
                if not work.has_pieces():
                    shutil.rmtree(work.folder, ignore_errors=True)
                elif isinstance(error, UserError | OSError) and not isinstance(error, OtherPlan):
                    why = error if isinstance(error, UserError) else _cannot_be_written(out, error)
                    raise UserError(
                        f"{why} What is finished stays in {work.folder}: the same command goes on with it."
                    ) from error
                raise
            shutil.rmtree(work.folder, ignore_errors=True)
    finally:
        for folder in made:
            with suppress(OSError):  # not empty, because all went well or something is kept
                folder.rmdir()


@contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_be_written(out, error) from error


def _cannot_be_written(out: Path, error: OSError) -> UserError:
    return UserError(f"The shards cannot be written to {out} ({error.strerror or error}).")


@contextmanager
def _only_writer(work: Unfinished) -> Iterator[None]:
    """Hold the lock; its file goes with the folder."""
    path = work.folder / "lock"
    taken = UserError(
        f"{work.out} is being written by another process, which holds {path}. Wait for it, or choose another --out."
    )
    while True:
        work.folder.mkdir(exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=_LOCK_SECONDS, poll_interval=0.05)
        except Timeout:
            raise taken from None
        except FileNotFoundError:  # the other writer has removed the folder in between
            continue
        if path.exists():
            break
        lock.release()
    try:
        yield
    finally:
        lock.release()
