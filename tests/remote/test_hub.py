"""Uploads to the Hub: transient failures are retried, permanent ones end at once, missing files are noticed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.remote import transfer
from nrat_scale.remote.hub import HubRepository, check_repository


class Client:
    """Stands for `HfApi`: it fails `failures` times with `error`, and finds no file in the repository."""

    def __init__(self, error: Exception | None = None, failures: int = 0) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    def create_repo(self, **_: Any) -> None:
        self.calls += 1
        if self.error is not None and self.calls <= self.failures:
            raise self.error

    def create_commit(self, **_: Any) -> None:
        pass

    def get_paths_info(self, *_: Any, **__: Any) -> list[Any]:
        return []


def repository(client: Client) -> HubRepository:
    return HubRepository("a/b", "dataset", None, "The shards", "hf://datasets/a/b", api=client)


@pytest.mark.parametrize(
    ("status", "failures", "calls"), [(None, 2, 3), (503, 5, 6), (503, 99, 6), (403, 99, 1), (404, 99, 1), (400, 1, 1)]
)
def test_only_transient_failures_are_retried(
    monkeypatch: pytest.MonkeyPatch, status: int | None, failures: int, calls: int
) -> None:
    """A cut connection or a busy server gets six attempts; a permanent failure ends at once, with one sentence."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.001)
    error = ConnectionError("cut\nmore lines")
    if status is not None:
        error.response = SimpleNamespace(status_code=status, headers={})  # type: ignore[attr-defined]
    client = Client(error, failures)
    if failures < calls:
        repository(client).prepare()
    else:
        with pytest.raises(UserError, match=r"The shards cannot be pushed to hf://datasets/a/b: cut") as caught:
            repository(client).prepare()
        assert "\n" not in str(caught.value)
    assert client.calls == calls


def test_a_file_that_the_client_skipped_is_noticed(tmp_path: Path) -> None:
    """The client silently skips files that a .gitignore in the repository names; that push has failed."""
    (tmp_path / "a.tar").write_bytes(b"content")
    with pytest.raises(UserError, match=r"a\.tar did not arrive at hf://datasets/a/b"):
        repository(Client()).upload(tmp_path, ["a.tar"])


@pytest.mark.parametrize(
    ("repo", "revision"), [("a", None), ("a/b/c", None), ("a/\x1bb", None), ("a/b", "x/y"), ("a/b", "")]
)
def test_names_that_the_hub_cannot_have(repo: str, revision: str | None) -> None:
    """A mistyped repository or revision is quoted in one printable sentence."""
    with pytest.raises(UserError, match=r"is not a repository|cannot be a revision") as caught:
        check_repository(repo, revision)
    assert str(caught.value).isprintable()
    check_repository("user.name/my-repo_1", "v1.0")
