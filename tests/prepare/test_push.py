"""Publishing shards: exactly the bytes of the index and its tars, the index last; failures are sentences."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare import __main__ as command_line
from nrat_scale.prepare.push import push
from nrat_scale.remote.hub import HubRepository
from tests.support.hub_server import BucketClient, HubServer
from tests.support.preparation import flip_bit, small_shards


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """Three shards, and other files beside them that must not be uploaded."""
    folder = small_shards(tmp_path / "shards")
    for name in (".verified.json", ".secret.tar", "notes.txt", "other.tar"):
        (folder / name).write_text("{}")
    return folder


def _run(hub: HubServer, home: Path, *commands: list[object], token: str | None = None) -> subprocess.CompletedProcess:
    """Run commands one after the other in a new process, because the Hub's client reads its environment at import."""
    lines = [[str(word) for word in command] for command in commands]
    script = (
        "import nrat_scale.remote.transfer\n"
        "from nrat_scale.core.errors import run_cli\n"
        "from nrat_scale.prepare.__main__ import main\n"
        "nrat_scale.remote.transfer.FIRST_PAUSE_SECONDS = 0.01\n"
        f"run_cli(lambda: [main(line) for line in {lines!r}])"
    )
    env = {**os.environ, **hub.environment(home, token), "NRAT_SCALE_CACHE": str(home / "cache")}
    return subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True, timeout=120)


@pytest.mark.medium
def test_the_hub_has_exactly_the_shards(tmp_path, hub, folder):
    """Equal bytes, the index in the last commit, no other file; transient failures are retried; a second push uploads
    nothing again; the address can be verified; a conversion with --push uploads all of its data sets."""
    hub.failures = {"POST /api/repos/create": [503], "PUT /lfs/": [500, 0], "/commit/main": [500]}
    address, digits = "hf://datasets/someone/made", tmp_path / "digits"
    result = _run(
        hub,
        tmp_path / "home",
        ["push", folder, address],
        ["push", folder, f"{address}@v2"],
        ["verify", f"{address}@v2"],
        ["digits", "--out", digits, "--push", "hf://datasets/someone/digits"],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{address}: 3 shards and index.json uploaded")
    assert "all 3 shards (70 images" in result.stdout
    published = {path.name: path.read_bytes() for path in [*folder.glob("shard-*.tar"), folder / "index.json"]}
    assert hub.files("someone/made") == hub.files("someone/made", "v2") == published
    assert [paths for _, _, paths in hub.commits[:2]] == [[f"shard-0000{i}.tar" for i in range(3)], ["index.json"]]
    assert all(paths[-1:] == ["index.json"] for _, _, paths in hub.commits[1:4:2])
    assert not any(map(bool, hub.failures.values()))
    uploads = [request for request in hub.requests if "PUT /lfs/" in request]
    assert len(uploads) == 3 + 2 + 2  # each of five shards once, and two that failed
    assert hub.files("someone/digits") == {
        f"{split}/{name}": (digits / split / name).read_bytes()
        for split in ("train", "test")
        for name in ("shard-00000.tar", "index.json")
    }
    assert hub.commits[-1][2] == ["test/index.json", "train/index.json"]
    assert hub.token not in result.stdout + result.stderr


def test_a_wrong_token_is_a_sentence(tmp_path, hub, folder):
    """401: exit status 2 and what to do, without a traceback or the token, and nothing on the Hub."""
    result = _run(hub, tmp_path / "home", ["push", folder, "hf://datasets/someone/made"], token="hf_wrong")
    assert result.returncode == 2 and result.stderr.startswith("error: The shards cannot be pushed to hf://datasets/")
    assert "401" in result.stderr and "hf auth login" in result.stderr and "Traceback" not in result.stderr
    assert "hf_wrong" not in result.stderr and result.stderr.count("\n") == 1
    assert hub.files("someone/made") == {} and hub.commits == []


@pytest.mark.parametrize(
    "address",
    [
        "someone/made",
        "hf://someone/made",
        "hf://datasets/made",
        "hf://datasets/a/b/c",
        "hf://datasets/a/b@",
        "s3://a/b",
    ],
)
def test_an_address_that_cannot_be_pushed_to_is_refused_at_once(tmp_path, address):
    """Before anything is converted or hashed."""
    with pytest.raises(UserError, match="hf://datasets/USER/REPO"):
        push(tmp_path / "nowhere", address)
    with pytest.raises(UserError, match="hf://datasets/USER/REPO"):
        command_line.main(["digits", "--out", str(tmp_path / "out"), "--push", address])
    assert list(tmp_path.iterdir()) == []


def test_damaged_shards_are_never_published(tmp_path, monkeypatch, folder):
    """A bit that flipped since the last verification is found before the Hub is contacted."""

    def never(*arguments: object) -> None:
        raise AssertionError("reached the Hub")

    monkeypatch.setattr(HubRepository, "prepare", never)
    flip_bit(folder / "shard-00001.tar", 3000)
    with pytest.raises(UserError, match=r"shard-00001\.tar.*sha256"):
        push(folder, "hf://datasets/someone/made")
    with pytest.raises(UserError, match="no shards"):
        push(tmp_path / "nowhere", "hf://datasets/someone/made")


def test_a_bucket_holds_shards(tmp_path, hub, folder, monkeypatch, capsys):
    """Pushed into a folder of a bucket, they are read and verified from there; nothing else is uploaded."""
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: BucketClient(hub))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    address = "hf://buckets/someone/work/sets/tiny"
    command_line.main(["push", str(folder), address])
    shards, local = open_shards(address), open_shards(str(folder))
    assert set(hub.buckets["someone/work"]) == {f"sets/tiny/{name}" for name in ("index.json", *local.names)}
    everything = np.arange(len(local))
    assert shards.is_remote and np.array_equal(shards.images(everything), local.images(everything))
    with pytest.raises(UserError, match="buckets have none"):
        command_line.main(["push", str(folder), "hf://buckets/someone/work@v1"])
    with pytest.raises(UserError, match="hf buckets cp"):
        command_line.main(["download", "hf://buckets/someone/work/a.npz", "--to", str(tmp_path)])
