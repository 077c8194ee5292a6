"""Publish shards as a data set on the Hugging Face Hub, from where `open_shards("hf://datasets/USER/REPO")` reads them.

Only the tars that an index names and the index itself are uploaded, the index last: who sees it can read everything it
names. Uploading again is cheap, because the Hub knows what it has. The token is the one of the environment (HF_TOKEN) or of
`hf auth login`, and is never shown.
"""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nrat_scale.errors import UserError
from nrat_scale.shards import INDEX, open_shards

_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/?", re.ASCII)
_ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 1.0
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_COMMIT_SHARDS = 50  # in one commit
_Result = TypeVar("_Result")


def parse_address(address: str) -> tuple[str, str | None]:
    """(USER/REPO, revision or None) of hf://datasets/USER/REPO[@REV].

    Raises:
        UserError: it has another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is no address to push to. Expected hf://datasets/USER/REPO or .../REPO@REVISION.")
    return match[1], match[2]


def push(folder: Path, address: str) -> str:
    """Verify the shards in `folder` (or, where it holds no index, in its subfolders) and upload them to `address`.

    Raises:
        UserError: a bad address, damaged shards, no permission, or the Hub cannot be reached.
    """
    repo, revision = parse_address(address)
    files = _files(folder)
    shards = [name for name in files if name.endswith(".tar")]
    indices = [name for name in files if not name.endswith(".tar")]
    hub = _Hub(address, repo, revision)
    hub.prepare()
    for first in range(0, len(shards), _COMMIT_SHARDS):
        hub.upload(folder, shards[first : first + _COMMIT_SHARDS])
    hub.upload(folder, indices)
    size = sum((folder / name).stat().st_size for name in files) / 1e6
    return f"{address}: {len(shards)} shards and {INDEX} uploaded, {size:.1f} MB"


def _files(folder: Path) -> list[str]:
    """What is to be uploaded, relative to `folder`, after every byte of it was verified."""
    found = [folder] if (folder / INDEX).exists() else sorted(path.parent for path in folder.glob(f"[!.]*/{INDEX}"))
    files = []
    for place in found or [folder]:
        shards = open_shards(place, str(place))
        shards.verify(full=True)
        files += [(place / name).relative_to(folder).as_posix() for name in (*shards.names, INDEX)]
    return files


class _Hub:
    """One repository on the Hub."""

    def __init__(self, address: str, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self._address, self._repo, self._revision = address, repo, revision
        self._api = HfApi()

    def prepare(self) -> None:
        """Make the repository and the branch where they do not exist."""
        where: dict[str, Any] = {"repo_id": self._repo, "repo_type": "dataset", "exist_ok": True}
        self._retried(lambda: self._api.create_repo(**where))
        if self._revision is not None and self._revision != "main":
            self._retried(lambda: self._api.create_branch(**where, branch=self._revision or "main"))

    def upload(self, folder: Path, names: list[str]) -> None:
        """Commit the files `names` of `folder`."""
        from huggingface_hub import CommitOperationAdd

        def commit() -> None:
            self._api.create_commit(
                repo_id=self._repo,
                repo_type="dataset",
                revision=self._revision,
                # Made anew for each attempt: a half-used operation remembers what went wrong.
                operations=[CommitOperationAdd(name, str(folder / name)) for name in names],
                commit_message=f"Upload {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            )

        self._retried(commit)
        there = self._retried(
            lambda: self._api.get_paths_info(self._repo, names, repo_type="dataset", revision=self._revision)
        )
        sizes = {entry.path: getattr(entry, "size", None) for entry in there}
        for name in names:  # a .gitignore in the repository, for instance, makes the client leave a file out
            if sizes.get(name) != (folder / name).stat().st_size:
                raise UserError(f"{name} did not arrive at {self._address} as it is here. Look at the repository.")

    def _retried(self, attempt: Callable[[], _Result]) -> _Result:
        """The result of `attempt`, repeated while what fails may pass."""
        for failed in range(1, _ATTEMPTS + 1):
            try:
                return attempt()
            except (
                Exception
            ) as error:  # below the Hub's client lie different HTTP libraries, whose errors share no base
                status = getattr(getattr(error, "response", None), "status_code", None)
                # Without an answer it was the network, unless the client refused what it was given.
                may_pass = status in _TRANSIENT or (
                    status is None and not isinstance(error, ValueError | FileNotFoundError)
                )
                if not may_pass or failed == _ATTEMPTS:
                    raise self._sentence(error, status) from error
            time.sleep(_FIRST_PAUSE_SECONDS * 2.0 ** (failed - 1) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    def _sentence(self, error: Exception, status: int | None) -> UserError:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        way_out = "What was uploaded stays there: the same command goes on with it."
        if status in (401, 403):
            way_out = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
        return UserError(f"The shards cannot be pushed to {self._address}: {reason}. {way_out}")
