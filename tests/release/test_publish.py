"""Releases on their way to a Hub on loopback and back, with the real client: exact, or a clear sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.loading.load import load
from nrat_scale.release import __main__ as release_cli
from nrat_scale.release import bundle
from tests.support.hub_server import BucketClient, HubServer
from tests.support.run_folders import folder_contents

SCRIPT = """
import sys, json
import nrat_scale.remote.transfer
nrat_scale.remote.transfer.FIRST_PAUSE_SECONDS = 0.05
from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.release import __main__ as release
import nrat_scale, torch
def run(line):
    if line[0] == "load":
        model = nrat_scale.load(line[1])
        x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        print("logits", model(x).double().sum().item())
    else:
        release.main(line)
def main():
    for line in json.loads(sys.argv[1]):
        if line[0] != "fails":
            run(line)
            continue
        try:
            run(line[1:])
        except UserError as error:
            print("error:", error)
run_cli(main)
"""
TIMM = """
import nrat_scale, nrat_scale.models, timm, torch
x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
print(timm.create_model("hf-hub:someone/mine", pretrained=True).eval()(x).double().sum().item())
name = nrat_scale.register_robustbench("someone/mine", "Some2026Noisy-CNN")
print(name)
model = timm.create_model(name, num_classes=10, pretrained=True, checkpoint_path="")
print(model(x).double().sum().item(), model.training)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty Hub."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def released(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a release, by name."""
    return folder_contents(bundle.release(evaluated_run, tmp_path_factory.mktemp("released") / "mine"))


def client(
    hub: HubServer, home: Path, *lines: list[object], token: str | None = None, script: str = SCRIPT
) -> "subprocess.CompletedProcess[str]":
    """Commands in a process of their own (the client reads its environment at import), with short pauses."""
    given = json.dumps([[str(word) for word in line] for line in lines])
    env = {**os.environ, **hub.environment(home, token)}
    return subprocess.run([sys.executable, "-c", script, given], env=env, text=True, capture_output=True, timeout=240)


def logits(model: nn.Module) -> float:
    """The sum that the scripts print."""
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return float(model(x).detach().double().sum())


@pytest.mark.medium
def test_a_public_repository_is_not_taken_for_private(run: Path, hub: HubServer, tmp_path: Path) -> None:
    """--private on a repository that is public already sends nothing."""
    again = ["fails", run, "--push", "someone/open", "--private", "--license", "mit"]
    done = client(hub, tmp_path / "home", [run, "--push", "someone/open"], again)
    assert "someone/open exists and is public" in done.stdout and "Nothing was sent." in done.stdout, done.stderr
    assert len(hub.commits) == 1


@pytest.mark.medium
def test_a_release_goes_to_the_hub_and_back(run: Path, model: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    """Through 429 with Retry-After, 500 and cut connections: the release's files arrive byte for byte, and no other file.

    Loading by revision gives the logits; a second push sends nothing; the token is in no file and no output.
    """
    hub.failures = {"POST /api/repos/create": [429], "PUT /lfs/": [500, 0], "/commit/": [503], "preupload": [0]}
    hub.retry_after = 1
    folder = tmp_path / "mine"
    lines: list[list[object]] = [
        [run, "--to", folder, "--push", "someone/mine", "--private"],
        [run, "--push", "someone/mine", "--private"],
        [run, "--push", "someone/mine", "--revision", "v1"],
        ["load", "someone/mine@v1"],
    ]
    done = client(hub, tmp_path / "home", *lines)
    assert done.returncode == 0, done.stderr
    assert hub.files("someone/mine") == folder_contents(folder)
    card, branch = (hub.files("someone/mine", name)["README.md"].decode() for name in ("main", "v1"))
    assert 'nrat_scale.load("someone/mine")' in card and 'create_model("hf-hub:someone/mine", pretrained=True)' in card
    assert 'nrat_scale.load("someone/mine@v1")' in branch and "hf-hub:someone/mine@v1" in branch
    assert "someone/mine: every file is already there" in done.stdout
    assert 'model = nrat_scale.load("someone/mine@v1")' in done.stdout, "as for a folder, the next line to type"
    sent = [paths for _, _, paths in hub.commits]
    assert len(sent) == 2 and set(sent[1]) == {"README.md", "manifest.json"}, "the branch differs by its own address"
    assert hub.private == {"someone/mine"}
    assert not any(map(bool, hub.failures.values())), "every failure happened"
    shown = float(done.stdout.strip().splitlines()[-1].removeprefix("logits "))
    assert shown == pytest.approx(logits(model), rel=1e-9)
    written = b"".join(folder_contents(run).values()) + b"".join(hub.files("someone/mine").values())
    assert hub.token not in done.stdout + done.stderr and hub.token.encode() not in written
    assert not any("secret" in str(content) for content in hub.files("someone/mine").values())


@pytest.mark.medium
def test_timm_loads_it_from_the_hub(
    released: dict[str, bytes], model: nn.Module, hub: HubServer, tmp_path: Path
) -> None:
    """`hf-hub:` of timm, and the name that RobustBench asks for, give the release's model."""
    hub.put("someone/mine", released)
    done = client(hub, tmp_path / "home", script=TIMM)
    assert done.returncode == 0, done.stderr
    first, name, second = done.stdout.strip().splitlines()
    assert name == "some2026noisy_cnn_cifar10_linf"
    assert float(first) == pytest.approx(logits(model), rel=1e-9) == float(second.split()[0])
    assert second.endswith("False")


@pytest.mark.medium
def test_a_corrupted_download_is_found(
    released: dict[str, bytes], model: nn.Module, hub: HubServer, tmp_path: Path
) -> None:
    """A file damaged in transit is downloaded once more; a file damaged twice ends in a sentence."""
    hub.put("someone/twice", released)
    hub.put("someone/once", released)
    hub.corrupted = {"model.safetensors": 3}
    done = client(hub, tmp_path / "home", ["fails", "load", "someone/twice"], ["load", "someone/once"])
    assert done.returncode == 0, done.stderr
    error, shown = done.stdout.strip().splitlines()
    assert error.startswith("error: ") and "model.safetensors does not match" in error
    assert float(shown.removeprefix("logits ")) == pytest.approx(logits(model), rel=1e-9)


@pytest.mark.medium
def test_a_wrong_token_is_a_sentence(run: Path, hub: HubServer, tmp_path: Path) -> None:
    """401 is exit status 2 with the way out; the token is not printed and nothing reaches the Hub."""
    done = client(hub, tmp_path / "home", [run, "--push", "someone/mine"], token="hf_wrong")
    assert done.returncode == 2 and "401" in done.stderr and "hf auth login" in done.stderr
    assert "hf_wrong" not in done.stderr + done.stdout and "Traceback" not in done.stderr and hub.commits == []


@pytest.mark.medium
def test_the_queue_is_sent_later(run: Path, model: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    """The push after a failed one sends each queued epoch to its revision; a third sends nothing again."""
    hub.failures = {"POST /api/repos/create": [403]}
    line: list[object] = [run, "--push", "someone/mine", "--queued"]
    before = folder_contents(run)
    done = client(hub, tmp_path / "home", ["fails", *line], line, line, ["load", "someone/mine@epoch-0002"])
    assert done.returncode == 0, done.stderr
    error, sent, again, shown = done.stdout.strip().splitlines()
    assert error.startswith("error: ") and "cannot be pushed" in error
    assert sent.startswith("someone/mine@epoch-0002: ") and sent.endswith("files sent")
    assert again == "someone/mine@epoch-0002: already there"
    assert float(shown.removeprefix("logits ")) == pytest.approx(logits(model), rel=1e-9)
    assert folder_contents(run) == before, "a push does not change the run"


@pytest.mark.medium
def test_a_push_without_a_first_file_says_so(run: Path, hub: HubServer, tmp_path: Path) -> None:
    """The error names the empty repository and how to remove it; not if nothing was created, or something is in it."""
    hub.put("someone/full", {"notes.txt": b"mine"})
    lines: list[list[object]] = [["fails", run, "--push", f"someone/{name}"] for name in ("new", "new", "full")]
    hub.failures = {"POST /api/repos/create": [403], "/commit/": [403, 403]}
    done = client(hub, tmp_path / "home", *lines)
    assert done.returncode == 0, done.stderr
    refused, empty, full = done.stdout.strip().splitlines()
    assert "has no file yet" not in refused and "has no file yet" not in full
    assert "The repository someone/new has no file yet; hf repos delete someone/new --type model removes it." in empty


def test_a_bucket_holds_releases(
    run: Path, model: nn.Module, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release and the queue go to folders of a bucket and load from there, verified; a second push sends nothing."""
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: BucketClient(hub))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    address = "hf://buckets/someone/work/runs/mine"
    for _ in range(2):
        release_cli.main([str(run), "--push", address])
    release_cli.main([str(run), "--push", address, "--queued"])
    files = hub.buckets["someone/work"]
    assert f'nrat_scale.load("{address}")' in files["runs/mine/README.md"].decode()
    assert logits(load(address)) == logits(load(f"{address}/epoch-0002/")) == pytest.approx(logits(model), rel=1e-9)
    files["runs/mine/model.safetensors"] = files["runs/mine/model.safetensors"][:-1] + b"x"
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(address)
    with pytest.raises(UserError, match=r"cannot be fetched|no such|404"):
        load("hf://buckets/someone/none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "hf://buckets/someone/work", "--revision", "v1"], "buckets keep no history"),
        (["--push", "hf://buckets/someone"], "not an address on the Hub"),
        (["--push", "hf://buckets/someone/work/../x"], "not a folder of a bucket"),
        (["--push", "https://huggingface.co/a/b"], r"not a repository on the Hub\. Did you mean a/b\?"),
        (["--push", "hf://a/b"], r"Did you mean a/b\?"),
        (["--push", "https://example.org/a/b/c"], "Expected user/repo"),
        (["--push", "a/b", "--license", "MIT"], "Did you mean 'mit'"),
        (["--push", "a/b", "--license", "mine"], "repositories-licenses"),
        (["--push", "a/b", "--license", "other"], "--license-name"),
        (["--push", "a/b", "--license", "mit", "--license-name", "x"], "--license-name"),
        (["--push", "a/b", "--license", "mit", "--benchmark", "cifar"], "user/repo"),
    ],
)
def test_addresses_and_licences_are_checked(run: Path, options: list[str], message: str) -> None:
    """Before anything is written or sent."""
    with pytest.raises(UserError, match=message):
        release_cli.main([str(run), *options])


def test_an_older_client_has_no_buckets(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the version that has them."""
    monkeypatch.setattr("huggingface_hub.HfApi", object)
    with pytest.raises(UserError, match=r"needs huggingface_hub 1\.5 or newer"):
        release_cli.main([str(run), "--push", "hf://buckets/someone/work"])
