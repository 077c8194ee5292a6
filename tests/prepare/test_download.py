"""Downloads from a Hub on loopback: complete and verified, or one sentence."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.download import PUBLISHED, download, fetch_file
from tests.support.http_server import HttpServer, Request, Response
from tests.support.preparation import is_one_sentence

TOOL = Path(__file__).parents[2] / "tools" / "download.py"
REPO = "P2333/DM-Improves-AT"
CONTENT = np.random.default_rng(0).bytes(3_000_000)


@dataclass(repr=False)
class _Hub(HttpServer):
    """A server of REPO; `stated` are the contents that it describes, `files` those that it sends."""

    hub: bool = True
    stated: dict[str, bytes] = field(default_factory=dict)

    def serve(self, files: dict[str, bytes]) -> None:
        """Send `files` (path in REPO -> content)."""
        self.files |= {f"/datasets/{REPO}/resolve/main/{path}": content for path, content in files.items()}

    def respond(self, request: Request) -> Response:
        if request.method != "POST":
            return super().respond(request)
        if request.path != f"/api/datasets/{REPO}/paths-info/main":
            return Response(404, b"{}", (("X-Error-Code", "RepoNotFound"),))
        entries = []
        for path in urllib.parse.parse_qs(request.body.decode())["paths"]:
            if (content := self.stated.get(path)) is not None:
                lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
                entries.append({"type": "file", "path": path, "size": len(content), "oid": "1" * 40, "lfs": lfs})
        return Response(200, json.dumps(entries).encode(), (("Content-Type", "application/json"),))

    def all_ranges(self) -> list[str | None]:
        """The header Range of each GET for a file."""
        return [request.range for request in self.requests if request.method == "GET" and "/resolve/" in request.path]


@pytest.fixture
def hub() -> Iterator[_Hub]:
    with _Hub() as server:
        yield server


def _started(hub: HttpServer, folder: Path, *argv: str) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(TOOL), *argv]
    return subprocess.Popen(command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _ended(process: subprocess.Popen[str]) -> SimpleNamespace:
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def test_files_arrive_resume_and_stay(hub, tmp_path):
    """Two files, one of them begun by an earlier call: complete, verified, not fetched twice; the next command is printed."""
    parts = {f"cifar10/20m_part{number}.npz": CONTENT[number:] for number in (1, 2)}
    hub.stated = parts
    hub.serve(parts)
    folder = tmp_path / "my data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "20m_part2.npz.part").write_bytes(CONTENT[2:1_000_002])
    result = _ended(_started(hub, tmp_path, "cifar10_20m", "--to", "my data"))
    assert result.status == 0, result.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        f"20m_part{number}.npz": CONTENT[number:] for number in (1, 2)
    }
    assert hub.all_ranges() == [None, "bytes=1000000-"]
    *lines, following = result.out.splitlines()
    assert lines == [f"my data/cifar10/20m_part{number}.npz: 3.0 MB, verified" for number in (1, 2)]
    words = shlex.split(following.removeprefix("next: "))
    assert words == [
        *("python", "-m", "nrat_scale.prepare", "npz"),
        *(f"my data/cifar10/20m_part{number}.npz" for number in (1, 2)),
        *("--dataset", "cifar10", "--out", "data/cifar10_20m"),
    ]

    hub.requests.clear()
    again = _ended(_started(hub, tmp_path, "cifar10_20m", "--to", "my data"))
    assert again.status == 0 and again.out.count("already downloaded, verified") == 2 and hub.all_ranges() == []


@pytest.mark.medium
def test_a_failed_download_is_a_sentence(hub, tmp_path):
    """Wrong bytes, a file that is gone, and one that is shorter than the Hub says."""
    hub.stated = dict.fromkeys(["cifar10/1m.npz", "cifar10/5m.npz", "cifar10/10m.npz"], CONTENT)
    hub.serve({"cifar10/1m.npz": b"x" * len(CONTENT), "cifar10/10m.npz": CONTENT[:-1]})
    processes = {
        "wrong": _started(hub, tmp_path, "cifar10_1m", "--to", "a"),
        "gone": _started(hub, tmp_path, "cifar10_5m", "--to", "b"),
        "shorter": _started(hub, tmp_path, "cifar10_10m", "--to", "c"),
    }
    results = {name: _ended(process) for name, process in processes.items()}
    assert is_one_sentence(results["wrong"], "cifar10/1m.npz", "sha256"), results["wrong"].err
    assert is_one_sentence(results["gone"], "cifar10/5m.npz", "404"), results["gone"].err
    assert is_one_sentence(results["shorter"], "2999999 bytes there instead of 3000000"), results["shorter"].err
    assert list(tmp_path.rglob("*.npz")) == []


def test_files_that_the_hub_does_not_have(hub, tmp_path, monkeypatch):
    """A renamed file, an unknown data set, no Hub at all, and another file at the place of the published one."""
    import huggingface_hub

    client = huggingface_hub.HfApi
    url = [hub.url]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client(endpoint=url[0]))
    hub.stated = {"cifar100/1m.npz": CONTENT}
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "1m.npz").write_bytes(b"mine")
    for name, words in [
        ("cifar10_50m", "has no file cifar10/50m_part1.npz"),
        ("hf://datasets/some/thing/a.npz", "does not describe the data set some/thing"),
        ("cifar100_1m", "is not the published file"),
    ]:
        with pytest.raises(UserError, match=words):
            list(download([name], tmp_path))
    url[0] = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="does not describe"):
        list(download(["cifar10_1m"], tmp_path))
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"mine"]


@pytest.mark.medium
def test_a_damaged_beginning_is_fetched_again(hub, tmp_path):
    """A .part with other bytes fails the hash at the end, and the next attempt starts anew. An address works too."""
    hub.stated = {"svhn/1m.npz": CONTENT}
    hub.serve(hub.stated)
    (tmp_path / "to" / "svhn").mkdir(parents=True)
    (tmp_path / "to" / "svhn" / "1m.npz.part").write_bytes(b"other bytes")
    result = _ended(_started(hub, tmp_path, f"hf://datasets/{REPO}/svhn/1m.npz", "--to", "to"))
    assert result.status == 0, result.err
    assert (tmp_path / "to" / "svhn" / "1m.npz").read_bytes() == CONTENT
    assert hub.all_ranges() == ["bytes=11-", None]
    assert result.out.endswith("next: python -m nrat_scale.prepare npz to/svhn/1m.npz --out data/1m\n")


def test_the_list_shows_the_table(cli):
    """Every name belongs to files of a known data set, and --list shows them."""
    printed = cli("download", "--list").out
    for name, published in PUBLISHED.items():
        assert name in printed and all(file in printed for file in published.files)
        assert published.dataset in DATASETS and name.startswith(f"{published.dataset}_")
        assert all(file.startswith(f"{published.dataset}/") and file.endswith(".npz") for file in published.files)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "Give the NAME"),
        (["cifar100_50m", "cifar10_1M"], "Did you mean 'cifar10_1m'"),
        (["hf://datasets/a/b/../../x.npz"], "leads out of"),
        (["hf://datasets/a/b"], "Give a file in it"),
        (["https://example.org/a.npz"], "hf://datasets/USER/REPO"),
    ],
)
def test_mistakes_are_sentences(tmp_path, cli, names, words):
    """They are found before anything is fetched."""
    assert is_one_sentence(cli("download", *names, "--to", tmp_path), words)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    """Without space for the file, nothing is fetched."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"not enough space for a\.npz"):
        fetch_file(tmp_path / "a.npz", "hf://datasets/a/b/a.npz", 11, None)
    assert list(tmp_path.iterdir()) == []
