"""Names of releases that are mistyped: a local path is not looked up on the Hub, and no lookup is retried for long."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.targets import TargetOptions, find_targets
from nrat_scale.loading import release_folder
from nrat_scale.loading.load import load


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with `releases/robust` and `mine/`, and no way to ask the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "releases" / "robust").mkdir(parents=True)
    (tmp_path / "mine").mkdir()

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    for name in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(release_folder, name, asked)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("releases/robst", "no folder releases/robst. Did you mean releases/robust"),
        ("runs/typo", "There is no folder runs/typo"),  # there is no folder runs either
        ("mine/typo", r"name a revision: mine/typo@main"),
        ("./mine/typo", "is not a release folder"),
        ("../typo", "is not a release folder"),
        ("mine/deeper/typo", "is not a release folder"),
        ("weights/typo.pt", r"no file weights/typo\.pt"),
        ("weights/typo.safetensors", "no file"),
    ],
)
def test_a_local_path_is_refused_at_once(name: str, words: str) -> None:
    """By `load` and by evaluation."""
    with pytest.raises(UserError, match=words):
        load(name)
    with pytest.raises(UserError, match=r"no folder|no file|is not a release folder"):
        find_targets(name, TargetOptions())


SCRIPT = """
import sys, nrat_scale
from nrat_scale.core.errors import run_cli
run_cli(lambda: nrat_scale.load(sys.argv[1]))
"""


@pytest.mark.medium
@pytest.mark.parametrize("answers", [True, False])
def test_a_release_that_is_not_there_ends_quickly(server: SimpleNamespace, tmp_path: Path, answers: bool) -> None:
    """One sentence after two attempts at most, whether the Hub says that there is none or does not answer."""
    url = server.url if answers else "http://127.0.0.1:1"
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, "someone/typo"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert "Retry" not in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert "someone/typo is neither a folder nor a release on the Hub" in result.stderr
    if answers:
        assert sum(server.requests.values()) <= 3
