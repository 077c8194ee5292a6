"""Publishing shards: exactly the bytes of the index and its tars, the index last, failures as sentences."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.prepare import push
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.remote import hub as hub_module
from tests.support.hub_server import HubServer


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """Three shards, and files beside them that are nobody's business."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    source = LabelledArrays(images, generator.integers(0, 3, 70), "custom", ("a", "b", "c"))
    folder = write_shards(source, tmp_path / "shards", block_size=16, shard_size=32, progress=False)
    for name in (".verified.json", ".secret.tar", "notes.txt", "other.tar"):
        (folder / name).write_text("{}")
    return folder


def _published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*folder.glob("shard-*.tar"), folder / "index.json"]}


def _run(hub: HubServer, home: Path, *commands: list[object], token: str | None = None) -> subprocess.CompletedProcess:
    """Run commands in one process, one after the other, with short pauses: the client reads its environment at import."""
    lines = [[str(word) for word in command] for command in commands]
    script = (
        "import nrat_scale.remote.transfer; from nrat_scale.core.errors import run_cli; from nrat_scale.prepare.__main__ import main; "
        f"nrat_scale.remote.transfer.FIRST_PAUSE_SECONDS = 0.05; run_cli(lambda: [main(line) for line in {lines!r}])"
    )
    env = {**os.environ, **hub.environment(home, token), "NRAT_SCALE_CACHE": str(home / "cache")}
    return subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True, timeout=120)


def test_what_is_pushed_is_what_lies_here(tmp_path, hub, folder):
    """Bytes equal, the index in the last commit, no other file; failures that pass are tried again; a second push is
    cheap; and the address can be verified, which reads every byte of it."""
    hub.failures = {"POST /api/repos/create": [503], "PUT /lfs/": [500, 0], "/commit/main": [500]}
    address = "hf://datasets/someone/made"
    commands = ["push", folder, address], ["push", folder, f"{address}@v2"], ["verify", f"{address}@v2"]
    result = _run(hub, tmp_path / "home", *commands)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{address}: 3 shards and index.json uploaded")
    assert "all 3 shards (70 images" in result.stdout
    assert hub.files("someone/made") == hub.files("someone/made", "v2") == _published(folder)
    assert [paths for _, _, paths in hub.commits[:2]] == [[f"shard-0000{i}.tar" for i in range(3)], ["index.json"]]
    assert all(paths[-1:] == ["index.json"] for _, _, paths in hub.commits[1::2])
    assert not any(map(bool, hub.failures.values()))
    assert sum("PUT /lfs/" in request for request in hub.requests) == 3 + 2  # each once, and two that failed
    assert hub.token not in result.stdout + result.stderr


def test_a_conversion_can_end_with_a_push(tmp_path, hub):
    """`--push` of a format that writes two sets: both arrive, below their names, indices last."""
    out = tmp_path / "digits"
    result = _run(hub, tmp_path / "home", ["digits", "--out", out, "--push", "hf://datasets/someone/digits"])
    assert result.returncode == 0, result.stderr
    assert set(hub.files("someone/digits")) == {
        f"{split}/{name}" for split in ("train", "test") for name in ("shard-00000.tar", "index.json")
    }
    for name, content in hub.files("someone/digits").items():
        assert (out / name).read_bytes() == content
    assert hub.commits[-1][2] == ["test/index.json", "train/index.json"]


def test_a_wrong_token_is_a_sentence(tmp_path, hub, folder):
    """401: exit status 2, what to do, no traceback, no token, and nothing of it on the Hub."""
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
        push.push(tmp_path / "nowhere", address)
    with pytest.raises(UserError, match="hf://datasets/USER/REPO"):
        prepare_cli.main(["digits", "--out", str(tmp_path / "out"), "--push", address])
    assert list(tmp_path.iterdir()) == []


def test_damaged_shards_are_never_published(tmp_path, monkeypatch, folder):
    """A bit that flipped on disk since the last check stays here."""

    def never(*arguments: object) -> None:
        raise AssertionError("reached the Hub")

    monkeypatch.setattr(hub_module.HubRepository, "prepare", never)
    path = folder / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001\.tar.*sha256"):
        push.push(folder, "hf://datasets/someone/made")
    with pytest.raises(UserError, match="no shards"):
        push.push(tmp_path / "nowhere", "hf://datasets/someone/made")
