"""The folder of a release: its card, its claims, its exports, and that no failure leaves or overwrites files."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from omegaconf import OmegaConf
from torch import nn

import nrat_scale
from nrat_scale.attacks import RELEASED_CODE_WARNING
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.loading.load import load
from nrat_scale.release import __main__ as release_cli
from nrat_scale.release import bundle, publish
from nrat_scale.release.contents import Publication
from tests.support.run_folders import folder_contents

GOLDEN = Path(__file__).parents[1] / "golden" / "abbf399"


def command_on(card: Path) -> list[str]:
    """The arguments of the command on a card."""
    return next(line for line in card.read_text().splitlines() if line.startswith("python -m")).split()[3:]


# ---- what a release says --------------------------------------------------------------------------------------------


def test_the_card_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    """The Hub's own reader finds every attack in the metadata; flags are listed; no local path or token appears."""
    path = run / "results.json"
    results = json.loads(path.read_text())
    for record in results["checkpoints"].values():
        record["flags"] = ["PGD found nothing.", "\x1b[2J"]
    path.write_text(json.dumps(results))
    text = (bundle.release(run, tmp_path / "out" / "mine") / "README.md").read_text()
    found = ModelCard(text).data
    assert found.library_name == "timm" and found.model_name == "mine" and found.datasets is None
    measured = {result.metric_name: result.metric_value for result in found.eval_results}
    attacks = results["checkpoints"]["best"]["attacks"]
    assert measured == {
        "natural accuracy in % (n = 40)": pytest.approx(100 * attacks["natural"]["accuracy"], abs=1e-3),
        "PGD-3 accuracy in %, l_inf, eps = 8/255 (n = 40)": pytest.approx(100 * attacks["pgd3"]["accuracy"], abs=1e-3),
        "APGD accuracy in %, l_inf, eps = 8/255 (n = 10)": pytest.approx(
            100 * attacks["aa-apgd"]["accuracy"], abs=1e-3
        ),
    }
    assert "## Reasons for doubt\n\n* PGD found nothing.\n* ?[2J\n" in text
    assert "--eps 8/255 --step 2/255 --batch-size 256 --seed 0 --aa-images 10" in text and "2003.01690" in text
    assert "import nrat_scale.models" in text, "timm knows the architecture only after this import"
    assert "hf_secret" not in text and str(tmp_path) not in text and RELEASED_CODE_WARNING not in text


def test_a_release_names_the_norm_that_was_tested(run: Path, tmp_path: Path) -> None:
    """Card, metadata, command and RobustBench's texts of an evaluation in l_2 nowhere say that it was in l_inf."""
    path = run / "results.json"
    results = json.loads(path.read_text())
    results["threat"] |= {"norm": "l2", "eps": 0.5, "step": 0.125}
    path.write_text(json.dumps(results))
    folder = bundle.release(run, tmp_path / "out" / "mine")
    card, issue = (folder / "README.md").read_text(), (folder / bundle.ISSUE).read_text()
    assert "Threat: l_2, eps = 0.5." in card and "--norm l2 --eps 0.5 --step 0.125" in card
    assert {result.metric_name for result in ModelCard(card).data.eval_results} >= {
        "PGD-3 accuracy in %, l_2, eps = 0.5 (n = 40)"
    }
    assert card.count("l_inf") == 1 and "trained with **nrat**, against the threat l_inf, eps = 8/255" in card
    assert "- **Threat Model**: L2\n- **eps**: 0.5\n" in issue and "Linf" not in issue


@pytest.mark.medium
def test_the_command_on_the_card_gives_its_numbers(run: Path, test_shards: Path, tmp_path: Path) -> None:
    """The release and the test images are enough to reproduce the outcome of every image."""
    folder = bundle.release(run, tmp_path / "mine")
    words = [{"mine": str(folder), "TEST_SHARDS": str(test_shards)}.get(w, w) for w in command_on(folder / "README.md")]
    evaluate_cli.main([*words, "--out", str(tmp_path / "again" / "results.json")])
    again = json.loads((tmp_path / "again" / "results.json").read_text())["checkpoints"]["release"]["attacks"]
    released = json.loads((folder / "results.json").read_text())["checkpoints"]["best"]["attacks"]
    assert {name: entry["outcome_sha256"] for name, entry in again.items()} == {
        name: entry["outcome_sha256"] for name, entry in released.items()
    }


def test_released_code_is_stamped_once(run: Path, tmp_path: Path) -> None:
    """A run in the threat space of the released code carries one warning, at the top of its card, and is unreliable."""
    recipe, results = run / "recipe.yaml", json.loads((run / "results.json").read_text())
    recipe.write_text(recipe.read_text().replace("space: pixel", "space: released_code"))
    for record in results["checkpoints"].values():
        record["flags"] = [RELEASED_CODE_WARNING]
    (run / "results.json").write_text(json.dumps(results))
    folder = bundle.release(run, tmp_path / "mine")
    card = (folder / "README.md").read_text()
    assert card.count(RELEASED_CODE_WARNING) == 1 and f"> **Warning.** {RELEASED_CODE_WARNING}" in card
    info = json.loads((folder / "robustbench" / "model_info.json").read_text())
    assert info["unreliable"] and info["footnote"].count(RELEASED_CODE_WARNING) == 1


def test_robustbench_gets_only_what_was_measured(run: Path, tmp_path: Path) -> None:
    """AutoAttack on some of the images is no claim; what only the authors know is left to them."""
    folder = bundle.release(run, tmp_path / "mine")
    info = json.loads((folder / "robustbench" / "model_info.json").read_text())
    assert info["autoattack_acc"] is None and "No AutoAttack accuracy is claimed" in info["footnote"]
    assert info["link"] == info["authors"] == info["venue"] == "TO FILL IN" and info["eps"] == "8/255"
    natural = json.loads((folder / "results.json").read_text())["checkpoints"]["best"]["attacks"]["natural"]
    assert info["clean_acc"] == f"{100 * natural['accuracy']:.2f}"
    text = (folder / "robustbench" / "new_model_issue.md").read_text()
    assert "**Threat Model**: Linf" in text and "**Robust accuracy**: not measured" in text


def test_the_card_states_the_attack_of_training(run: Path, tmp_path: Path) -> None:
    """With the phases of its schedule."""
    plain = (bundle.release(run, tmp_path / "plain") / "README.md").read_text()
    recipe = OmegaConf.load(run / "recipe.yaml")
    of = f"{recipe.threat.num_steps} step{'s' if recipe.threat.num_steps > 1 else ''} of 2/255"
    assert f"attack in training: {of}\n" in plain
    recipe.threat.schedule = [{"until": 0.3, "num_steps": 1, "step": 8 / 255}]
    OmegaConf.save(recipe, run / "recipe.yaml")
    card = (bundle.release(run, tmp_path / "phases") / "README.md").read_text()
    assert f"attack in training: 1 step of 8/255 until 30 % of training, then {of}\n" in card


def _with_noise(run: Path, **rates: float) -> None:
    """Give the run the label noise of the GPU recipes: 154 real and 358 generated images in a batch."""
    recipe = OmegaConf.load(run / "recipe.yaml")
    recipe.data.batch_size, recipe.data.generated.shards = 512, "/secret/edm_1m"
    OmegaConf.save(recipe, run / "recipe.yaml")
    for kind, rate in rates.items():
        noise = {"kind": "symmetric", "rate": rate, "num_labels": 50_000, "num_noisy": 10_000, "realised_rate": rate}
        RunFolder(run).noise_files(kind)[0].write_text(json.dumps(noise))


def test_the_card_states_the_effective_rate(run: Path, tmp_path: Path) -> None:
    """20 % of the real labels are 6.0 % of a batch's, on the card and in RobustBench's footnote."""
    _with_noise(run, real=0.2)
    folder = bundle.release(run, tmp_path / "mine")
    sentence = "20.0 % of its real training labels (6.0 % of a batch's labels, the effective rate) are wrong"
    card = (folder / "README.md").read_text()
    assert f"* label noise: symmetric, {sentence}\n" in card and "nobody has checked the labels" in card
    assert sentence in json.loads((folder / "robustbench" / "model_info.json").read_text())["footnote"]
    assert "secret" not in card


def test_the_card_knows_noise_of_generated_labels(run: Path, tmp_path: Path) -> None:
    """Each source has its line; without wrong labels there is none."""
    assert "* label noise" not in (bundle.release(run, tmp_path / "clean") / "README.md").read_text()
    _with_noise(run, real=0.2, generated=0.2)
    card = (bundle.release(run, tmp_path / "mine") / "README.md").read_text()
    assert "20.0 % of its generated training labels (14.0 % of a batch's labels, the effective rate) are wrong" in card
    assert card.count("* label noise: ") == 2 and "Some training labels are wrong" in card


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    """A run that an older version trained gives the same release as that version wrote, in every file that is read back."""
    run = shutil.copytree(GOLDEN / "run", tmp_path / "run")
    folder = bundle.release(run, tmp_path / "release")
    for name in ("model.safetensors", "config.json", "results.json"):
        assert (folder / name).read_bytes() == (GOLDEN / "release" / name).read_bytes(), name
    assert command_on(folder / "README.md") == command_on(GOLDEN / "release" / "README.md")


def test_results_in_the_format_of_leaderboards(run: Path, tmp_path: Path) -> None:
    """The Hub's own reader finds each attack as a task of the data set; our digits have no repository there."""
    assert not (bundle.release(run, tmp_path / "mine") / ".eval_results").exists()
    publication = Publication("someone/mine@v1", benchmark="someone/robust-digits")
    folder = bundle.release(run, tmp_path / "named", publication=publication)
    entries = parse_eval_result_entries(yaml.safe_load((folder / bundle.EVALUATION).read_text()))
    attacks = json.loads((folder / "results.json").read_text())["checkpoints"]["best"]["attacks"]
    assert {entry.task_id: entry.value for entry in entries} == {
        name: pytest.approx(100 * found["accuracy"], abs=1e-3) for name, found in attacks.items()
    }
    assert {entry.dataset_id for entry in entries} == {"someone/robust-digits"}
    assert entries[0].source_url == "https://huggingface.co/someone/mine/blob/v1/results.json"
    assert {entry.notes for entry in entries} >= {"PGD-3 accuracy in %, l_inf, eps = 8/255, n = 40"}
    results = json.loads((run / "results.json").read_text())
    results["data"]["dataset"] = "cifar10"
    (run / "results.json").write_text(json.dumps(results))
    known = bundle.release(run, tmp_path / "known") / bundle.EVALUATION
    assert {entry.dataset_id for entry in parse_eval_result_entries(yaml.safe_load(known.read_text()))} == {
        "uoft-cs/cifar10"
    }


def test_the_card_links_to_a_data_set_that_the_hub_has(run: Path, tmp_path: Path) -> None:
    """By the name of its repository; the Hub would make a dead link of `custom`."""
    path = run / "model.json"
    for dataset, expected in (("cifar10", ["uoft-cs/cifar10"]), ("custom", None)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": dataset}))
        card = (bundle.release(run, tmp_path / dataset) / "README.md").read_text()
        assert ModelCard(card).data.datasets == expected


def test_the_command_of_a_published_card_names_its_address(run: Path, tmp_path: Path) -> None:
    """Who reads the card on the Hub has no folder of that name."""
    folder = bundle.release(run, tmp_path / "mine", publication=Publication("someone/mine@v1"))
    assert command_on(folder / "README.md")[0] == "someone/mine@v1"
    assert command_on(bundle.release(run, tmp_path / "here") / "README.md")[0] == "here"


def test_the_card_has_licence_picture_and_install_line(run: Path, tmp_path: Path) -> None:
    """What the author stated, or that nothing is stated; the folder's name without an address."""
    plain = (bundle.release(run, tmp_path / "mine") / "README.md").read_text()
    assert ModelCard(plain).data.license is None and "None is stated for these weights." in plain
    assert 'nrat_scale.load("mine")' in plain and "pip install ./nrat_scale" in plain and "](curves.png)" in plain
    stated = Publication("a/b", "other", "My terms", "https://example.org/terms")
    card = (bundle.release(run, tmp_path / "other", publication=stated) / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "My terms", "https://example.org/terms")
    assert "[My terms](https://example.org/terms)" in card
    with pytest.raises(UserError, match="another card"):
        bundle.release(run, tmp_path / "mine", publication=Publication("a/b"))
    assert (tmp_path / "mine" / "README.md").read_text() == plain


# ---- whole and verified ---------------------------------------------------------------------------------------------


def test_a_release_is_whole_and_verified(run: Path, tmp_path: Path) -> None:
    """The manifest names every file; a changed byte is found on loading and before a push; a failure leaves nothing."""
    folder = bundle.release(run, tmp_path / "mine")
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(manifest) == set(folder_contents(folder)) - {"manifest.json"}
    assert "curves.png" in manifest and "results.npz" in manifest
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors does not match"):
        load(folder)
    with pytest.raises(UserError, match=r"model\.safetensors does not match"):
        publish.push(folder, "someone/mine")
    checkpoint = next((run / "checkpoints").glob("step-*")) / "ema.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4] + b"abcd")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError):
        bundle.release(run, tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.medium
def test_exports_give_the_logits(run: Path, model: nn.Module, tmp_path: Path) -> None:
    """ONNX and torch.export files give the model's logits for one image and for many."""
    folder = bundle.release(run, tmp_path / "mine", exports=tuple(bundle.EXPORTERS))
    x = torch.rand(7, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    exported = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        for images in (x, x[:1]):
            logits = session.run(None, {"images": images.numpy()})[0]
            np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--to FOLDER"),
        (["--private"], "Name a destination"),
        (["--push", "mine"], "user/repo"),
        (["--push", "a/b", "--revision", "x y"], "revision"),
        (["--push", "a/b", "--queued", "--to", "x"], "--queued"),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str) -> None:
    """Options that do not fit are refused before anything is read, written or sent."""
    with pytest.raises(UserError, match=message):
        release_cli.main([str(tmp_path / "run"), *options])


def test_names_of_robustbench_are_not_taken_over(run: Path, tmp_path: Path) -> None:
    """A registered name keeps its model; the same registration again returns the same name."""
    folder = str(bundle.release(run, tmp_path / "mine"))
    name = nrat_scale.register_robustbench(folder, "Mine-A", "cifar100", "L2")
    assert name == "mine_a_cifar100_l2" == nrat_scale.register_robustbench(folder, "Mine-A", "cifar100", "L2")
    with pytest.raises(UserError, match="already"):
        nrat_scale.register_robustbench(str(tmp_path), "Mine-A", "cifar100", "L2")
    with pytest.raises(UserError, match="letters"):
        nrat_scale.register_robustbench(folder, "Mine A")
