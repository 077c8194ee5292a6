"""Files to a repository on the Hugging Face Hub: what is there already is not sent, what may pass is tried again, and what arrived
is compared with what lies here. The token is the one of the environment (HF_TOKEN) or of `hf auth login`, and is never shown.
"""

import hashlib
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
REVISION = re.compile(r"[\w.-]+", re.ASCII)
_ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 300.0  # whatever the Hub asks for
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_Result = TypeVar("_Result")


class HubRepository:
    """One repository on the Hub (`HF_ENDPOINT`), to be written to.

    Args:
        repo: `user/repo`.
        kind: `model` or `dataset`.
        revision: a branch; None is the main one.
        what: names what is pushed in errors, such as "The release".
        shown: names where to in errors.
    """

    def __init__(self, repo: str, kind: str, revision: str | None, what: str, shown: str) -> None:
        from huggingface_hub import HfApi

        self._repo, self._kind, self._revision, self._what, self._shown = repo, kind, revision, what, shown
        self._api = HfApi()

    def prepare(self, *, private: bool = False) -> None:
        """Make the repository and the branch where they do not exist; `private` counts for a new repository."""
        where: dict[str, Any] = {"repo_id": self._repo, "repo_type": self._kind, "exist_ok": True}
        made = {**where, "private": True} if private else where
        self._retried(lambda: self._api.create_repo(**made))
        if self._revision is not None and self._revision != "main":
            self._retried(lambda: self._api.create_branch(**where, branch=self._revision or "main"))

    def missing(self, files: Mapping[str, Path]) -> list[str]:
        """Which of `files` (name in the repository -> file here) are not there, or with other bytes."""
        there = self._retried(
            lambda: self._api.get_paths_info(self._repo, list(files), repo_type=self._kind, revision=self._revision)
        )
        known = {entry.path: entry for entry in there}
        return [name for name, path in files.items() if not _is(known.get(name), path)]

    def upload(self, files: Mapping[str, Path], message: str | None = None) -> None:
        """Commit `files` (name in the repository -> file here), and make sure that they arrived.

        Raises:
            UserError: no permission, the Hub cannot be reached, or something else arrived.
        """
        from huggingface_hub import CommitOperationAdd

        names = list(files)

        def commit() -> None:
            self._api.create_commit(
                repo_id=self._repo,
                repo_type=self._kind,
                revision=self._revision,
                # Made anew for each attempt: a half-used operation remembers what went wrong.
                operations=[CommitOperationAdd(name, str(path)) for name, path in files.items()],
                commit_message=message
                or f"Upload {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            )

        self._retried(commit)
        if missing := self.missing(
            files
        ):  # a .gitignore in the repository, for instance, makes the client leave a file out
            raise UserError(f"{missing[0]} did not arrive at {self._shown} as it is here. Look at the repository.")

    def _retried(self, attempt: Callable[[], _Result]) -> _Result:
        """The result of `attempt`, repeated while what fails may pass."""
        for failed in range(1, _ATTEMPTS + 1):
            try:
                return attempt()
            except (
                Exception
            ) as error:  # below the Hub's client lie different HTTP libraries, whose errors share no base
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                # Without an answer it was the network, unless the client refused what it was given.
                may_pass = status in _TRANSIENT or (
                    status is None and not isinstance(error, ValueError | FileNotFoundError)
                )
                if not may_pass or failed == _ATTEMPTS:
                    raise self._sentence(error, status) from error
                pause = _FIRST_PAUSE_SECONDS * 2.0 ** (failed - 1) * random.uniform(0.5, 1.0)
                pause = max(pause, _asked_pause(response))
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _sentence(self, error: Exception, status: int | None) -> UserError:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        way_out = "What was uploaded stays there: the same command goes on with it."
        if status in (401, 403):
            way_out = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
        return UserError(f"{self._what} cannot be pushed to {self._shown}: {reason}. {way_out}")


def _asked_pause(response: Any) -> float:
    """The seconds of a Retry-After header."""
    text = str(getattr(response, "headers", {}).get("Retry-After", "")) if response is not None else ""
    return min(float(text), _LONGEST_PAUSE_SECONDS) if text.isdecimal() else 0.0


def _is(entry: Any, path: Path) -> bool:
    """Whether a file on the Hub has the bytes of `path`: by sha256 if it is large there (LFS), else by git's blob id."""
    if entry is None or getattr(entry, "size", None) != path.stat().st_size:
        return False
    lfs = getattr(entry, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == sha256_of(path))
    content = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def check_repository(repo: str, revision: str | None) -> None:
    """Raise `UserError` where `repo` is not of the form `user/repo`, or `revision` no name of a branch."""
    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"'{repo}' is no repository on the Hub. Expected user/repo.")
    if revision is not None and not REVISION.fullmatch(revision):
        raise UserError(f"'{revision}' is no name of a revision. Use letters, digits, ., _ and -.")


def names_of(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Name -> file, of `names` in `folder`."""
    return {name: folder / name for name in names}
