"""Targets of an evaluation, options and data that do not fit, and runs of earlier versions."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate.targets import TargetOptions, find_targets
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.digits import digits

GOLDEN = Path(__file__).parents[1] / "golden" / "abbf399"
Measured = Callable[..., dict[str, Any]]


def test_a_weight_file_and_a_transfer_source(run: Path, tmp_path: Path) -> None:
    """A plain state dict is evaluated with --arch, in l_2 too, and a run serves as the source of a transfer attack."""
    torch.save(create("cnn4", model_arguments(ModelSpec(), 10, 1, (0.3,), (0.3,))).state_dict(), tmp_path / "plain.pt")
    out, data = tmp_path / "file.json", str(run.parent / "test")
    with pytest.raises(UserError, match="--arch"):
        evaluate_cli.main([str(tmp_path / "plain.pt"), "--data", data, "--eps", "0.1"])
    given = [str(tmp_path / "plain.pt"), "--arch", "cnn4", "--mean", "0.3", "--std", "0.3", "--data", data]
    with pytest.raises(UserError, match="--eps"):
        evaluate_cli.main([*given, "--out", str(out)])
    options = ["--attacks", "natural,pgd2", "--eps", "0.5", "--norm", "l2", "--out", str(out)]
    evaluate_cli.main([*given, *options, "--transfer-from", str(run)])
    results = json.loads(out.read_text())
    entries = results["checkpoints"]["file"]["attacks"]
    assert results["threat"] == {"norm": "l2", "eps": 0.5, "step": 0.125, "space": "pixel"}
    assert set(entries) == {"natural", "transfer-pgd2"} and entries["transfer-pgd2"]["source"]["label"] == "run"


def test_one_of_two_sets_of_weights(run: Path, tmp_path: Path) -> None:
    """`--weights-key` picks the raw or the averaged weights of a file, also of the source of a transfer attack."""
    states = []
    for answer in (3, 5):  # a model that always gives this class
        states.append({name: torch.zeros_like(value) for name, value in create("cnn4", {}).state_dict().items()})
        states[-1]["classifier.bias"][answer] = 1.0
    torch.save({"state_dict": states[0], "state_dict_ema": states[1]}, tmp_path / "both.pt")
    both, options = str(tmp_path / "both.pt"), ["--data", str(run.parent / "test"), "--eps", "0.1"]
    with pytest.raises(UserError, match=r"2 sets of weights: 'state_dict', 'state_dict_ema'.*--weights-key"):
        evaluate_cli.main([both, "--arch", "cnn4", *options, "--attacks", "natural"])
    _, labels = digits()
    for key, answer in (("state_dict", 3), ("state_dict_ema", 5)):
        out = tmp_path / f"{key}.json"
        given = ["--arch", "cnn4", "--weights-key", key, "--attacks", "natural", "--out", str(out)]
        evaluate_cli.main([both, *given, *options])
        found = json.loads(out.read_text())["checkpoints"]["file"]
        assert found["weights_key"] == key
        assert found["attacks"]["natural"]["correct"] == (labels[1200:1280] == answer).sum()
    transfer = [str(run), *options, "--attacks", "pgd2", "--transfer-from", both, "--source-arch", "cnn4"]
    with pytest.raises(UserError, match="--source-weights-key"):
        evaluate_cli.main(transfer)
    evaluate_cli.main([*transfer, "--source-weights-key", "state_dict_ema"])


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("runs/x", {"arch": "cnn4"}, "--arch needs a weight file; runs/x is not a file"),
        ("x.pt", {}, r"There is no file x\.pt"),
        ("nowhere", {}, "There is no nowhere here"),
        ("nowhere", {"mean": [0.5]}, "they need --arch"),
        ("nowhere", {"checkpoints": ["worst"]}, "expected best, last"),
        ("nowhere", {"weights": ["averaged"]}, "expected evaluated, ema, raw"),
    ],
)
def test_targets_that_do_not_exist(what: str, options: dict[str, Any], message: str) -> None:
    """The error names what is missing, or the option that does not apply."""
    with pytest.raises(UserError, match=message):
        find_targets(what, TargetOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacks", "natural,pgdx"], "Unknown attack 'pgdx'"),
        (["--attacks", ","], "names no attack"),
        (["--eps", "8"], "8/255"),
        (["--eps", "a/b"], "--eps: 'a/b' is not a number"),
        (["--images", "0"], "images is 0"),
        (["--checkpoint", "worst"], "worst"),
        (["--out", "results.txt"], r"must be a \.json file"),
    ],
)
def test_bad_options(
    run: Path, measured: Measured, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong option ends in a sentence that names it, and nothing is written."""
    with pytest.raises((UserError, SystemExit)) as caught:
        measured(*options)
    sentence = f"{caught.value}\n{capsys.readouterr().err}"
    assert re.search(message, sentence), sentence
    assert not (run / "results.json").exists()


def test_training_data_are_refused(run: Path, measured: Measured) -> None:
    """Data that the run was trained or selected on are recognised by their fingerprint."""
    fingerprint = open_shards(run.parent / "test").fingerprint
    (run / "data.json").write_text(json.dumps({"real": {"fingerprint": fingerprint}}))
    with pytest.raises(UserError, match="real training data"):
        measured()


def test_data_with_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    """A model of ten classes is not evaluated on three."""
    data = LabelledArrays(np.zeros((9, 8, 8, 1), np.uint8), np.arange(9) % 3, "x", ("a", "b", "c"))
    with pytest.raises(UserError, match="3 classes"):
        evaluate_cli.main([str(run), "--data", str(write_shards(data, tmp_path / "o", progress=False))])


def test_a_run_of_an_earlier_version_is_evaluated(tmp_path: Path) -> None:
    """A run that abbf399 wrote, with keys that recipes no longer have, gives the outcomes that abbf399 measured."""
    pytest.importorskip("sklearn")
    prepare_cli.main(["digits", "--out", str(tmp_path / "digits")])
    run = shutil.copytree(GOLDEN / "run", tmp_path / "run")
    command = [str(run), "--data", str(tmp_path / "digits" / "test"), "--attacks", "natural,pgd5", "--images", "100"]
    evaluate_cli.main([*command, "--out", str(tmp_path / "results.json")])
    now, then = (json.loads(path.read_text()) for path in (tmp_path / "results.json", run / "results.json"))
    assert now["data"] == then["data"] and now["threat"] == then["threat"]
    for label in ("best", "last"):
        for attack, entry in then["checkpoints"][label]["attacks"].items():
            again = now["checkpoints"][label]["attacks"][attack]
            assert again["outcome_sha256"] == entry["outcome_sha256"], (label, attack)


def test_a_weight_file_of_another_size(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--arch-args` builds the model of the file; they are part of the key, and an error without them names the option."""
    weights = tmp_path / "small.pt"
    torch.save(create("cnn4", {"width": 4, "hidden": 16}).state_dict(), weights)
    given = [
        str(weights),
        "--arch",
        "cnn4",
        "--data",
        str(run.parent / "test"),
        "--attacks",
        "natural",
        "--eps",
        "0.1",
    ]
    with pytest.raises(UserError, match=r"does not fit the architecture cnn4.*--arch-args"):
        evaluate_cli.main([*given, "--out", str(tmp_path / "a.json")])
    evaluate_cli.main([*given, "--arch-args", "width=4, hidden=16", "--out", str(tmp_path / "b.json")])
    (entry,) = json.loads((tmp_path / "b.json").read_text())["checkpoints"]["file"]["attacks"].values()
    assert entry["model_args"]["width"] == 4 and entry["model_args"]["hidden"] == 16
    for text, words in (("width", "NAME=VALUE"), ("mean=3", "an option of its own"), ("depth=9", "does not take")):
        with pytest.raises((SystemExit, UserError)) as caught:
            evaluate_cli.main([*given, "--arch-args", text, "--out", str(tmp_path / "c.json")])
        assert words in str(caught.value) + capsys.readouterr().err
