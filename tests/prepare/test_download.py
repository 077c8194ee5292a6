"""tools/download.py against a Hub on loopback, in real processes: whole and verified, or one sentence."""

import hashlib
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.prepare import download

TOOL = Path(__file__).parents[2] / "tools" / "download.py"
REPO = "P2333/DM-Improves-AT"
CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def hub() -> Iterator[SimpleNamespace]:
    """Files of REPO: `stated` is what the Hub describes, `served` what it sends; `ranges` what was asked for."""
    state = SimpleNamespace(stated={}, served={}, ranges=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": "0" * 40, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_POST(self) -> None:
            body = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            if self.path != f"/api/datasets/{REPO}/paths-info/main":
                self._answer(404, b"{}", X_Error_Code="RepoNotFound")
                return
            entries = []
            for path in body["paths"]:
                if path in state.stated:
                    content = state.stated[path]
                    lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
                    entries.append({"type": "file", "path": path, "size": len(content), "oid": "1" * 40, "lfs": lfs})
            self._answer(200, json.dumps(entries).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            content = state.served.get(self.path.removeprefix(f"/datasets/{REPO}/resolve/main/"))
            if content is None:
                self._answer(404, b"", X_Error_Code="EntryNotFound")
                return
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if self.command == "GET":
                state.ranges.append(self.headers.get("Range"))
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                first = int(match[1])
                headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self._answer(206, content[first:], **headers)
            else:
                self._answer(200, content, **headers)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()
        thread.join()


def _started(hub: SimpleNamespace, folder: Path, *argv: str) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(TOOL), *argv]
    return subprocess.Popen(command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _ended(process: subprocess.Popen[str]) -> SimpleNamespace:
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def _is_one_sentence(result: SimpleNamespace, *words: str) -> bool:
    return (
        result.status == 2
        and result.err.startswith("error: ")
        and result.err.count("\n") == 1
        and all(word in result.err for word in words)
    )


def test_files_arrive_resume_and_stay(hub, tmp_path):
    """Two parts, one of them begun by an earlier call: complete, verified, not fetched twice; the next command is told."""
    parts = {f"cifar10/20m_part{number}.npz": CONTENT[number:] for number in (1, 2)}
    hub.stated, hub.served = parts, parts
    folder = tmp_path / "my data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "20m_part2.npz.part").write_bytes(CONTENT[2:1_000_002])
    result = _ended(_started(hub, tmp_path, "cifar10_20m", "--to", "my data"))
    assert result.status == 0, result.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        f"20m_part{number}.npz": CONTENT[number:] for number in (1, 2)
    }
    assert hub.ranges == [None, "bytes=1000000-"]
    *lines, following = result.out.splitlines()
    assert lines == [f"my data/cifar10/20m_part{number}.npz: 3.0 MB, verified" for number in (1, 2)]
    words = shlex.split(following.removeprefix("next: "))
    assert words[:2] == ["python", "tools/shard_dataset.py"]
    arguments = prepare_cli._parser().parse_args(words[2:])
    assert arguments.files == [f"my data/cifar10/20m_part{number}.npz" for number in (1, 2)]
    assert arguments.dataset == "cifar10" and str(arguments.out) == "data/cifar10_20m"

    hub.ranges.clear()
    again = _ended(_started(hub, tmp_path, "cifar10_20m", "--to", "my data"))
    assert again.status == 0 and again.out.count("there already, verified") == 2 and hub.ranges == []


def test_what_cannot_be_had_is_a_sentence(hub, tmp_path):
    """Wrong bytes, a file that is gone, and one that is shorter than the Hub says."""
    hub.stated = dict.fromkeys(["cifar10/1m.npz", "cifar10/5m.npz", "cifar10/10m.npz"], CONTENT)
    hub.served = {
        "cifar10/1m.npz": b"x" * len(CONTENT),  # of the right size
        "cifar10/10m.npz": CONTENT[:-1],
    }
    processes = {
        "wrong": _started(hub, tmp_path, "cifar10_1m", "--to", "a"),
        "gone": _started(hub, tmp_path, "cifar10_5m", "--to", "b"),
        "shorter": _started(hub, tmp_path, "cifar10_10m", "--to", "c"),
    }
    results = {name: _ended(process) for name, process in processes.items()}
    assert _is_one_sentence(results["wrong"], "cifar10/1m.npz", "sha256"), results["wrong"].err
    assert _is_one_sentence(results["gone"], "cifar10/5m.npz", "404"), results["gone"].err
    assert _is_one_sentence(results["shorter"], "2999999 bytes there instead of 3000000"), results["shorter"].err
    assert list(tmp_path.rglob("*.npz")) == []


def test_what_the_hub_does_not_have(hub, tmp_path, monkeypatch):
    """A file that was renamed, an unknown data set, no Hub at all, and another file where the published one should go."""
    import huggingface_hub

    client = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client(endpoint=hub.url))
    hub.stated = {"cifar100/1m.npz": CONTENT}
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "1m.npz").write_bytes(b"mine")
    for name, words in [
        ("cifar10_50m", "has no file cifar10/50m_part1.npz"),
        ("hf://datasets/some/thing/a.npz", "says nothing about the data set some/thing"),
        ("cifar100_1m", "is not the published file"),
    ]:
        with pytest.raises(UserError, match=words):
            download.main([name, "--to", str(tmp_path)])
    hub.url = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="says nothing about"):
        download.main(["cifar10_1m", "--to", str(tmp_path)])
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"mine"]


def test_a_damaged_beginning_is_fetched_again(hub, tmp_path):
    """A .part of other bytes is found out at the end, and one attempt later the file is right. An address works too."""
    hub.stated = hub.served = {"svhn/1m.npz": CONTENT}
    (tmp_path / "to" / "svhn").mkdir(parents=True)
    (tmp_path / "to" / "svhn" / "1m.npz.part").write_bytes(b"other bytes")
    result = _ended(_started(hub, tmp_path, f"hf://datasets/{REPO}/svhn/1m.npz", "--to", "to"))
    assert result.status == 0, result.err
    assert (tmp_path / "to" / "svhn" / "1m.npz").read_bytes() == CONTENT
    assert hub.ranges == ["bytes=11-", None]
    assert result.out.endswith("next: python tools/shard_dataset.py npz to/svhn/1m.npz --out data/1m\n")


def test_the_table_and_the_list(capsys):
    """Every name stands for files of a data set that we know, and --list shows it all."""
    download.main(["--list"])
    printed = capsys.readouterr().out
    for name, published in download.PUBLISHED.items():
        assert name in printed and all(file in printed for file in published.files)
        assert published.dataset in DATASETS and name.startswith(f"{published.dataset}_")
        assert all(file.startswith(f"{published.dataset}/") and file.endswith(".npz") for file in published.files)


def test_mistakes(tmp_path, capsys, monkeypatch):
    """Unknown names get a suggestion before anything is fetched, paths stay in the folder, a full disk is foreseen."""
    with pytest.raises(UserError, match="Did you mean 'cifar10_1m'"):
        download.main(["cifar100_50m", "cifar10_1M"])
    with pytest.raises(UserError, match="leads out of"):
        download.main(["hf://datasets/a/b/../../x.npz", "--to", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        download.main([])
    assert end.value.code == 2 and "give a NAME" in capsys.readouterr().err
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"no room for a\.npz"):
        download._fetch(download.Remote("hf://datasets/a/b/a.npz", 11, None), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []
