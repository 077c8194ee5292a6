"""Upload files to a repository or bucket on the Hugging Face Hub: skip unchanged files, retry, verify what arrived.

The token comes from HF_TOKEN or `hf auth login` and is never printed.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import sha256_of
from nrat_scale.remote.address import HubAddress, is_bucket, parse_hub
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
        self._prepared = self._sent = False

    def prepare(self, *, private: bool = False) -> None:
        """Create the repository and the branch if they do not exist.

        Raises:
            UserError: as `upload`; or `private` is asked of a repository that exists and is public.
        """
        self._retried(lambda: self._api.create_repo(**self._where, exist_ok=True, private=private or None))
        self._prepared = True
        if private and self._retried(lambda: self._api.repo_info(**self._where)).private is False:
            raise UserError(
                f"{self._shown} exists and is public, and --private makes only a new repository private. Nothing was sent. "
                "Change its visibility in its settings, or leave out --private."
            )
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
        self._sent = True
        # The client silently skips files that a .gitignore in the repository names.
        if missing := self.missing(folder, names):
            raise UserError(
                f"{missing[0]} did not arrive at {self._shown} with the local bytes. Check the repository's .gitignore."
            )

    def _retried(self, request: Callable[[], T]) -> T:
        what, way_out = f"{self._what} cannot be pushed to {self._shown}", "The same command resumes the upload."
        try:
            return _attempted(request, what, way_out)
        except UserError as error:
            if self._sent or not (self._prepared and self._is_empty()):
                raise
            name, kind = self._where["repo_id"], self._where["repo_type"]
            raise UserError(
                f"{error} The repository {name} has no file yet; hf repos delete {name} --type {kind} removes it."
            ) from error

    def _is_empty(self) -> bool:
        """Whether the Hub says that the repository has no file but the .gitattributes of a new one."""
        try:
            return set(self._api.list_repo_files(**self._where)) <= {".gitattributes"}
        except Exception:  # it cannot be reached, either
            return False


class HubBucket:
    """A folder of a bucket on the Hub to upload to, with the methods of `HubRepository`. A bucket keeps no history.

    Args:
        address: of the folder.
        what, shown, api: as in `HubRepository`.

    Raises:
        UserError: the installed huggingface_hub has no buckets.
    """

    def __init__(self, address: HubAddress, what: str, shown: str, api: Any = None) -> None:
        from huggingface_hub import HfApi

        self._bucket, self._prefix = address.repo, f"{address.path.rstrip('/')}/" if address.path else ""
        self._what, self._shown = what, shown
        self._api: Any = api or HfApi()
        if not hasattr(self._api, "batch_bucket_files"):
            raise UserError(f"{shown} needs huggingface_hub 1.5 or newer: pip install -U huggingface_hub")

    def prepare(self, *, private: bool = False) -> None:
        """Create the bucket if it does not exist; `private` only affects a new bucket."""
        self._retried(lambda: self._api.create_bucket(self._bucket, exist_ok=True, private=private or None))

    def missing(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Which of the files `names` of `folder` the bucket lacks or has with other bytes."""
        import hf_xet

        paths = [self._prefix + name for name in names]
        entries = self._retried(lambda: list(self._api.get_bucket_paths_info(self._bucket, paths)))
        there = {entry.path: entry.xet_hash for entry in entries}  # a bucket states no sha256
        here = [info.hash for info in hf_xet.hash_files([str(folder / name) for name in names])]
        return [name for name, path, content in zip(names, paths, here, strict=True) if there.get(path) != content]

    def upload(self, folder: Path, names: Sequence[str], message: str | None = None) -> None:
        """Upload the files `names` of `folder` and verify that they arrived; a bucket keeps no `message`.

        Raises:
            UserError: no permission, the Hub cannot be reached, or a file did not arrive.
        """
        add = [(str(folder / name), self._prefix + name) for name in names]
        self._retried(lambda: self._api.batch_bucket_files(self._bucket, add=add))
        if missing := self.missing(folder, names):
            raise UserError(f"{missing[0]} did not arrive at {self._shown} with the local bytes. Push it again.")

    def _retried(self, request: Callable[[], T]) -> T:
        return _attempted(
            request, f"{self._what} cannot be pushed to {self._shown}", "The same command uploads the rest."
        )


def _attempted(request: Callable[[], T], what: str, way_out: str) -> T:
    """The answer to a request of the Hub's client; transient failures are retried."""

    def attempt() -> T:
        try:
            return request()
        except Exception as error:  # the HTTP libraries of the Hub's client share no base class
            raise hub_failure(error) from error

    return retried(attempt, what, attempts=ATTEMPTS, way_out=way_out)


def _has_bytes_of(entry: Any, path: Path) -> bool:
    """Compare a file on the Hub with `path`: by sha256 if the Hub stores it as LFS, else by git's blob id."""
    if getattr(entry, "size", None) != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == sha256_of(path))
    content = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def destination(where: str, kind: str, revision: str | None, what: str) -> "HubRepository | HubBucket":
    """The repository `user/repo` of a `kind`, or the folder hf://buckets/USER/BUCKET[/FOLDER], to upload `what` to.

    Raises:
        UserError: as `check_repository`.
    """
    check_repository(where, revision)
    if is_bucket(where):
        return HubBucket(parse_hub(where), what, where)
    return HubRepository(where, kind, revision, what, f"{where}@{revision}" if revision else where)


def check_repository(repo: str, revision: str | None) -> None:
    """Raise `UserError` if `repo` is not `user/repo` or in a bucket, or `revision` cannot be the name of a branch."""
    if is_bucket(repo):
        address = parse_hub(repo)
        if revision is not None:
            raise UserError(f"{repo} has no revisions: buckets keep no history. Push to another folder of the bucket.")
        if any(part in ("", ".", "..") for part in address.path.rstrip("/").split("/")) and address.path:
            raise UserError(f"{quoted(repo)} is not a folder of a bucket. Expected hf://buckets/USER/BUCKET[/FOLDER].")
        repo = address.repo
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo, re.ASCII):
        meant = re.fullmatch(rf"(?:https://[^/]+/|hf://(?:models/)?)({_NAME}/{_NAME})/?", repo, re.ASCII)
        hint = f" Did you mean {meant[1]}?" if meant else " Expected user/repo."
        raise UserError(f"{quoted(repo)} is not a repository on the Hub.{hint}")
    if revision is not None and not re.fullmatch(_NAME, revision, re.ASCII):
        raise UserError(f"{quoted(revision)} cannot be a revision. Use letters, digits, ., _ and -.")
