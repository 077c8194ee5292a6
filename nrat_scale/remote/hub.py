"""Upload files to a repository on the Hugging Face Hub: skip unchanged files, retry, verify what arrived.

The token comes from HF_TOKEN or `hf auth login` and is never printed.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import sha256_of
from nrat_scale.remote.stores import hub_failure
from nrat_scale.remote.transfer import retried

ATTEMPTS = 6  # per request
_NAME = r"[\w.-]+"
T = TypeVar("T")


class HubRepository:
    """One repository on the Hub (`HF_ENDPOINT`) to upload to.

    Args:
        repo: `user/repo`.
        kind: `model` or `dataset`.
        revision: a branch; None for the main branch.
        what: the subject of error messages, such as "The release".
        shown: the destination in error messages.
        api: a client; default `huggingface_hub.HfApi()`.
    """

    def __init__(self, repo: str, kind: str, revision: str | None, what: str, shown: str, api: Any = None) -> None:
        from huggingface_hub import HfApi

        self._where = {"repo_id": repo, "repo_type": kind}
        self._revision, self._what, self._shown = revision, what, shown
        self._api: Any = api or HfApi()

    def prepare(self, *, private: bool = False) -> None:
        """Create the repository and the branch if they do not exist; `private` only affects a new repository."""
        self._retried(lambda: self._api.create_repo(**self._where, exist_ok=True, private=private or None))
        if self._revision not in (None, "main"):
            self._retried(lambda: self._api.create_branch(**self._where, exist_ok=True, branch=self._revision))

    def missing(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Which of the files `names` of `folder` the repository lacks or has with other bytes."""
        where = {**self._where, "revision": self._revision}
        found = self._retried(lambda: self._api.get_paths_info(**where, paths=list(names)))
        entries = {entry.path: entry for entry in found}
        return [name for name in names if not _has_bytes_of(entries.get(name), folder / name)]

    def upload(self, folder: Path, names: Sequence[str], message: str | None = None) -> None:
        """Commit the files `names` of `folder` and verify that they arrived.

        Raises:
            UserError: no permission, the Hub cannot be reached, or a file did not arrive.
        """
        from huggingface_hub import CommitOperationAdd

        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        request = {**self._where, "revision": self._revision, "commit_message": message or f"Upload {names[0]}{more}"}

        def commit() -> None:
            # New operations for each attempt: they keep state from a failed one.
            operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
            self._api.create_commit(**request, operations=operations)

        self._retried(commit)
        # The client silently skips files that a .gitignore in the repository names.
        if missing := self.missing(folder, names):
            raise UserError(
                f"{missing[0]} did not arrive at {self._shown} with the local bytes. Check the repository's .gitignore."
            )

    def _retried(self, request: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return request()
            except Exception as error:  # the HTTP libraries of the Hub's client share no base class
                raise hub_failure(error) from error

        what = f"{self._what} cannot be pushed to {self._shown}"
        return retried(attempt, what, attempts=ATTEMPTS, way_out="The same command resumes the upload.")


def _has_bytes_of(entry: Any, path: Path) -> bool:
    """Compare a file on the Hub with `path`: by sha256 if the Hub stores it as LFS, else by git's blob id."""
    if getattr(entry, "size", None) != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == sha256_of(path))
    content = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def check_repository(repo: str, revision: str | None) -> None:
    """Raise `UserError` if `repo` is not `user/repo`, or `revision` cannot be the name of a branch."""
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo, re.ASCII):
        raise UserError(f"{quoted(repo)} is not a repository on the Hub. Expected user/repo.")
    if revision is not None and not re.fullmatch(_NAME, revision, re.ASCII):
        raise UserError(f"{quoted(revision)} cannot be a revision. Use letters, digits, ., _ and -.")
