"""Releases that say what they are, and their way to a Hub on loopback with the real client: exact, or a clear sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.loading.load import load
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.release import __main__ as release_cli
from nrat_scale.release import bundle, card, publish
from tests.support.hub_server import HubServer
from tests.support.run_folders import write_run

ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 16}), 10, 1, (0.3,), (0.3,))
SCRIPT = """
import sys, json
import nrat_scale.remote.transfer
nrat_scale.remote.transfer.FIRST_PAUSE_SECONDS = 0.05
from nrat_scale.core.errors import run_cli
from nrat_scale.release import __main__ as release
import nrat_scale, torch
def main():
    for line in json.loads(sys.argv[1]):
        if line[0] == "load":
            model = nrat_scale.load(line[1])
            x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            print("logits", model(x).double().sum().item())
        else:
            release.main(line)
run_cli(main)
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create("cnn4", ARGUMENTS).eval()


@pytest.fixture
def run(tmp_path: Path, model: nn.Module) -> Path:
    """An evaluated run of 40 test images, with one queued checkpoint and things in it that are nobody's business."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    names = tuple("0123456789")
    write_shards(LabelledArrays(images, np.arange(40) % 10, "digits", names), tmp_path / "test", progress=False)
    folder = write_run(tmp_path / "run", model, ARGUMENTS, 8, threat="eps: 8/255, step: 2/255", queue=True)
    for name in (".env", "train.log", "token"):
        (folder / name).write_text("HF_TOKEN=hf_secret")
    evaluate_cli.main(
        [str(folder), "--data", str(tmp_path / "test"), "--attacks", "natural,pgd3,aa-apgd", "--aa-images", "10"]
    )
    return folder


def client(
    hub: HubServer, home: Path, *lines: list[Any], token: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """Commands in a process of their own (the client reads its environment at import), with short pauses."""
    given = json.dumps([[str(word) for word in line] for line in lines])
    env = {**os.environ, **hub.environment(home, token)}
    return subprocess.run([sys.executable, "-c", SCRIPT, given], env=env, text=True, capture_output=True, timeout=240)


def logits(model: nn.Module) -> float:
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return float(model(x).detach().double().sum())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what a release says --------------------------------------------------------------------------------------------


def test_the_card_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    """Metadata that the Hub's own reader understands, with every attack; flags as warnings; the command that checks it."""
    path = run / "results.json"
    results = json.loads(path.read_text())
    for record in results["checkpoints"].values():
        record["flags"] = ["PGD found nothing."]
    path.write_text(json.dumps(results))
    folder = bundle.release(run, tmp_path / "out" / "mine")
    text = (folder / "README.md").read_text()
    found = ModelCard(text).data
    assert found.library_name == "timm" and found.model_name == "mine" and found.datasets == ["digits"]
    measured = {result.metric_name: result.metric_value for result in found.eval_results}
    attacks = results["checkpoints"]["best"]["attacks"]
    assert measured == {
        "natural accuracy in % (n = 40)": pytest.approx(100 * attacks["natural"]["accuracy"], abs=1e-3),
        "PGD-3 accuracy in %, l_inf eps = 8/255 (n = 40)": pytest.approx(100 * attacks["pgd3"]["accuracy"], abs=1e-3),
        "APGD accuracy in %, l_inf eps = 8/255 (n = 10)": pytest.approx(100 * attacks["aa-apgd"]["accuracy"], abs=1e-3),
    }
    assert "## Reasons for doubt\n\n* PGD found nothing." in text
    assert "--eps 8/255 --step 2/255 --batch-size 256 --seed 0 --aa-images 10" in text and "2003.01690" in text
    assert "hf_secret" not in text and str(tmp_path) not in text


def test_the_command_on_the_card_gives_its_numbers(run: Path, tmp_path: Path) -> None:
    """A stranger with the release and the test images gets the same outcome of every image."""
    folder = bundle.release(run, tmp_path / "mine")
    command = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("python -m"))
    words = command.split()[3:]
    words = [str(folder) if word == "mine" else word.replace("TEST_SHARDS", str(tmp_path / "test")) for word in words]
    evaluate_cli.main([*words, "--out", str(tmp_path / "again" / "results.json")])
    again = json.loads((tmp_path / "again" / "results.json").read_text())["checkpoints"]["release"]["attacks"]
    there = json.loads((folder / "results.json").read_text())["checkpoints"]["best"]["attacks"]
    assert {name: entry["outcome_sha256"] for name, entry in again.items()} == {
        name: entry["outcome_sha256"] for name, entry in there.items()
    }


def test_robustbench_gets_only_what_is_true(run: Path, tmp_path: Path) -> None:
    """AutoAttack on some of the images is no claim; what only the authors know is left to them."""
    folder = bundle.release(run, tmp_path / "mine")
    info = json.loads((folder / "robustbench" / "model_info.json").read_text())
    assert info["autoattack_acc"] is None and "No AutoAttack accuracy is claimed" in info["footnote"]
    assert info["link"] == info["authors"] == info["venue"] == "TO FILL IN" and info["eps"] == "8/255"
    natural = json.loads((folder / "results.json").read_text())["checkpoints"]["best"]["attacks"]["natural"]
    assert info["clean_acc"] == f"{100 * natural['accuracy']:.2f}"
    text = (folder / "robustbench" / "new_model_issue.md").read_text()
    assert "**Threat Model**: Linf" in text and "**Robust accuracy**: not measured" in text


def test_radii_read_back_as_they_are() -> None:
    """8/255 is written so only where it is exactly that."""
    assert card.eps_text(8 / 255) == "8/255" and card.eps_text(0.3) == "0.3" and card.eps_text(0.0) == "0.0"
    assert float(card.eps_text(0.031372)) == 0.031372


def test_a_release_is_whole_and_verified(run: Path, tmp_path: Path) -> None:
    """The manifest names every file; one changed byte is noticed on loading and before a push; nothing is left of a failure."""
    folder = bundle.release(run, tmp_path / "mine")
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(manifest) == set(contents(folder)) - {"manifest.json"}
    assert "curves.png" in manifest and "results.npz" in manifest
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is not what its manifest says"):
        load(folder)
    with pytest.raises(UserError, match="manifest"):
        publish.push(folder, "someone/mine")
    checkpoint = next((run / "checkpoints").glob("step-*")) / "ema.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4] + b"abcd")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError):
        bundle.release(run, tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == before


def test_exports_give_the_logits(run: Path, model: nn.Module, tmp_path: Path) -> None:
    """ONNX and torch.export files, for one image and for many."""
    folder = bundle.release(run, tmp_path / "mine", onnx=True, torch_export=True)
    x = torch.rand(7, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    exported = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        for images in (x, x[:1]):
            torch.testing.assert_close(
                torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model(images)
            )
            torch.testing.assert_close(exported(images), model(images))


# ---- the Hub --------------------------------------------------------------------------------------------------------


def test_a_release_goes_to_the_hub_and_back(run: Path, model: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    """Through 429 with Retry-After, 500 and a cut connection: byte for byte what lies here, and not a file more; loading by
    revision gives the logits; a second push sends nothing; the token is nowhere."""
    hub.failures = {"POST /api/repos/create": [429], "PUT /lfs/": [500, 0], "/commit/": [503], "preupload": [0]}
    hub.retry_after = 1
    folder = tmp_path / "mine"
    lines = [
        [run, "--to", folder, "--push", "someone/mine", "--private"],
        [run, "--push", "someone/mine", "--private"],
        [run, "--push", "someone/mine", "--revision", "v1"],
        ["load", "someone/mine@v1"],
    ]
    done = client(hub, tmp_path / "home", *lines)
    assert done.returncode == 0, done.stderr
    assert hub.files("someone/mine") == contents(folder) == hub.files("someone/mine", "v1")
    assert "someone/mine: everything is there already" in done.stdout
    assert len(hub.commits) == 1, "neither the second push nor a branch of the same files commits"
    assert hub.private == {"someone/mine"}
    assert not any(map(bool, hub.failures.values())), "all failures were met"
    shown = float(done.stdout.strip().splitlines()[-1].removeprefix("logits "))
    assert shown == pytest.approx(logits(model), rel=1e-9)
    written = b"".join(contents(run).values()) + b"".join(hub.files("someone/mine").values())
    assert hub.token not in done.stdout + done.stderr and hub.token.encode() not in written
    assert not any("secret" in str(content) for content in hub.files("someone/mine").values())


def test_timm_loads_it_from_the_hub(run: Path, model: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    """`hf-hub:` of timm, and the name that RobustBench asks for, give the release's model."""
    hub.put("someone/mine", contents(bundle.release(run, tmp_path / "mine")))
    script = (
        "import nrat_scale.models, timm, torch\n"
        "x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "print(timm.create_model('hf-hub:someone/mine', pretrained=True).eval()(x).double().sum().item())\n"
        "name = nrat_scale.register_robustbench('someone/mine', 'Some2026Noisy-CNN')\n"
        "print(name)\n"
        "model = timm.create_model(name, num_classes=10, pretrained=True, checkpoint_path='')\n"
        "print(model(x).double().sum().item(), model.training)\n"
    )
    env = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, name, second = done.stdout.strip().splitlines()
    assert name == "some2026noisy_cnn_cifar10_linf"
    assert float(first) == pytest.approx(logits(model), rel=1e-9) == float(second.split()[0])
    assert second.endswith("False")


def test_a_corrupted_download_is_noticed(run: Path, model: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    """Bytes that change on the way: fetched once more, and a plain sentence where they stay wrong."""
    hub.put("someone/mine", contents(bundle.release(run, tmp_path / "mine")))
    hub.corrupted = {"model.safetensors": 1}
    done = client(hub, tmp_path / "home", ["load", "someone/mine"])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.strip().removeprefix("logits ")) == pytest.approx(logits(model), rel=1e-9)
    hub.corrupted = {"model.safetensors": 99}
    done = client(hub, tmp_path / "other", ["load", "someone/mine"])
    assert done.returncode == 2 and "is not what its manifest says" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_token_is_a_sentence(run: Path, hub: HubServer, tmp_path: Path) -> None:
    """401: exit status 2, what to do, no token shown, nothing on the Hub."""
    done = client(hub, tmp_path / "home", [run, "--push", "someone/mine"], token="hf_wrong")
    assert done.returncode == 2 and "401" in done.stderr and "hf auth login" in done.stderr
    assert "hf_wrong" not in done.stderr + done.stdout and "Traceback" not in done.stderr and hub.commits == []


def test_the_queue_is_sent_later(run: Path, model: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    """What a failed push left is sent by the next one, each epoch to its revision; what is there is not sent again."""
    hub.failures = {"POST /api/repos/create": [403]}
    line = [run, "--push", "someone/mine", "--queued"]
    before = contents(run)
    failed = client(hub, tmp_path / "home", line)
    assert failed.returncode == 2 and "cannot be pushed" in failed.stderr
    assert contents(run) == before, "a failed push changes nothing"
    done = client(hub, tmp_path / "home", line, line, ["load", "someone/mine@epoch-0002"])
    assert done.returncode == 0, done.stderr
    assert "someone/mine@epoch-0002: " in done.stdout and "there already" in done.stdout
    assert float(done.stdout.strip().splitlines()[-1].removeprefix("logits ")) == pytest.approx(logits(model), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--to FOLDER"),
        (["--private"], "need --push|Say where to"),
        (["--push", "mine"], "user/repo"),
        (["--push", "a/b", "--revision", "x y"], "revision"),
        (["--push", "a/b", "--queued", "--to", "x"], "--queued"),
    ],
)
def test_bad_options(run: Path, options: list[str], message: str) -> None:
    """Before anything is written or sent."""
    with pytest.raises(UserError, match=message):
        release_cli.main([str(run), *options])


def test_names_of_robustbench_are_not_taken_over(run: Path, tmp_path: Path) -> None:
    """A registered name keeps its model; the same registration again is the same name."""
    folder = str(bundle.release(run, tmp_path / "mine"))
    name = nrat_scale.register_robustbench(folder, "Mine-A", "cifar100", "L2")
    assert name == "mine_a_cifar100_l2" == nrat_scale.register_robustbench(folder, "Mine-A", "cifar100", "L2")
    with pytest.raises(UserError, match="already"):
        nrat_scale.register_robustbench(str(tmp_path), "Mine-A", "cifar100", "L2")
    with pytest.raises(UserError, match="letters"):
        nrat_scale.register_robustbench(folder, "Mine A")
