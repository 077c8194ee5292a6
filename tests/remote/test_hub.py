"""Uploads to the Hub: transient failures are retried, permanent ones end at once, missing files are noticed."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.remote import hub as hub_module
from nrat_scale.remote import transfer
from nrat_scale.remote.hub import HubRepository


@pytest.fixture
def repository(monkeypatch):
    """A repository whose client retries without pauses; it describes no files."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(hub_module, "_FIRST_PAUSE_SECONDS", 0.001, raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda *arguments, **options: [])
    return HubRepository("a/b", "dataset", None, "The shards", "hf://datasets/a/b")


@pytest.mark.parametrize(
    ("status", "failures", "calls"),
    [(None, 2, 3), (503, 3, 4), (503, 99, None), (403, 99, 1), (404, 99, 1), (400, 99, 1)],
)
def test_only_transient_failures_are_retried(monkeypatch, repository, status, failures, calls):
    """A cut connection or a busy server gets several attempts; a permanent failure ends at once, with one sentence."""
    error, made = ConnectionError("cut\n"), []
    if status is not None:
        error.response = SimpleNamespace(status_code=status, headers={})

    def create_repo(*arguments, **options):
        made.append(options)
        if len(made) <= failures:
            raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    if failures < 99:
        repository.prepare()
    else:
        with pytest.raises(UserError, match=r"The shards cannot be pushed to hf://datasets/a/b: cut") as caught:
            repository.prepare()
        assert "\n" not in str(caught.value)
    assert len(made) == calls if calls else 3 < len(made) < 20


def test_a_file_that_the_hub_left_out_is_noticed(tmp_path, monkeypatch, repository):
    """The client silently skips files that a .gitignore of the repository names; that push did not succeed."""
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lambda *arguments, **options: None)
    (tmp_path / "a.tar").write_bytes(b"content")
    with pytest.raises(UserError, match=r"a\.tar did not arrive"):
        repository.upload({"a.tar": tmp_path / "a.tar"})
