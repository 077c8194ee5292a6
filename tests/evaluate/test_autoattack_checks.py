"""AutoAttack's own checks: its warnings are kept, Square is judged over all blocks, few classes leave parts out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate import run as evaluate_run
from nrat_scale.evaluate.measures import Images, correct_under
from nrat_scale.evaluate.package_warnings import merge_warnings
from nrat_scale.evaluate.results import BlockLog, FinishedBlock
from nrat_scale.evaluate.sanity import square_warning
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.release.__main__ import main as release
from nrat_scale.report.__main__ import main as report
from tests.support.digits import digits
from tests.support.run_folders import write_run
from tests.support.stand_in_autoattack import install, install_source

Measured = Callable[..., dict[str, Any]]
CHECKS = (
    'it seems to be a randomized defense! Please use version="rand". See flags_doc.md for details.',
    "it seems that the output is a probability distribution, please be sure that the logits are used!",
    "there are 3 points with zero gradient! This might lead to unreliable evaluation with gradient-based attacks.",
    "it seems to be a dynamic defense! The evaluation with AutoAttack might be insufficient.",
)


@pytest.mark.parametrize("how", ["printed", "warned", "logged", "root"])
def test_every_warning_of_the_package_is_kept(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, how: str
) -> None:
    """Each is in the record and flagged once, with the text that the package gives it, and nowhere else on the terminal."""
    install(monkeypatch, tmp_path / "path", {"apgd-ce": 2}, CHECKS, how)
    results = measured("--attacks", "aa", "--checkpoint", "best", "--batch-size", "16")
    entry = results["checkpoints"]["best"]["attacks"]["aa"]
    assert entry["warnings"] == sorted(CHECKS)
    assert [flag for flag in results["checkpoints"]["best"]["flags"] if "AutoAttack (aa)" in flag] == [
        f"AutoAttack (aa): {text}" for text in sorted(CHECKS)
    ]
    shown = capsys.readouterr()
    assert all(shown.out.count(text) == 1 and text not in shown.err for text in CHECKS)
    assert results["versions"]["autoattack"] == "unknown", "it is on the path, but pip did not install it"


def test_what_a_model_prints_is_not_a_warning(
    model: nn.Module, images: Images, threat: ThreatSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Text of the model passes, whole and in order, also without a newline."""
    install(monkeypatch, tmp_path / "path", {})

    class Talking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("one ", end="")
            print("two")
            logits: Tensor = self.model(x)
            return logits

    talking = Talking()
    talking.model = model
    correct_under("aa:square", talking.eval(), images.take(np.arange(3)), threat)
    assert set(capsys.readouterr().out.splitlines()) == {"one two"}


def test_another_package_of_that_name(
    model: nn.Module, images: Images, threat: ThreatSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called autoattack without Python files is not used; a module without the class is named."""
    (tmp_path / "autoattack").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    some = images.take(np.arange(2))
    assert len(correct_under("aa:apgd-ce", model, some, threat)) == 2
    install_source(monkeypatch, tmp_path, "")
    with pytest.raises(UserError, match=r"__init__\.py is not the package autoattack"):
        correct_under("aa:apgd-ce", model, some, threat)


def test_warnings_that_differ_in_a_number_are_one() -> None:
    """Of blocks with 3, 12 and 7 points the largest is kept."""
    texts = [f"there are {n} points with zero gradient!" for n in (3, 12, 7)]
    assert merge_warnings([[texts[0]], texts[1:], ["other"], []]) == ["other", texts[1]]


# ---- Square -----------------------------------------------------------------------------------------------------------


def test_square_is_judged_over_all_blocks(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of 80 is 6 % of its block of 16 and no flag; many images are one flag, with the share of all images."""
    install(monkeypatch, tmp_path / "one", {"apgd-ce": 1, "square": 1, "total of square": 1})
    command = ("--attacks", "aa", "--checkpoint", "best", "--batch-size", "16")
    record = measured(*command)["checkpoints"]["best"]
    assert record["attacks"]["aa"]["broken_by"] == {"apgd-ce": 5, "apgd-t": 0, "fab-t": 0, "square": 1}
    assert record["flags"] == [] and record["attacks"]["aa"]["warnings"] == []
    (tmp_path / "run" / "results.json").unlink()
    install(monkeypatch, tmp_path / "many", {"apgd-ce": 1, "square": 2})
    record = measured(*command)["checkpoints"]["best"]
    (flag,) = record["flags"]
    assert "Square broke 10 of 80 images (12.50 %)" in flag


def test_components_survive_an_interruption(
    run: Path, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed evaluation counts what the components broke in blocks that were finished before."""
    install(monkeypatch, tmp_path / "path", {"apgd-ce": 3, "square": 2})
    command = ("--attacks", "aa", "--checkpoint", "best", "--batch-size", "16")
    write, written = BlockLog.write, []

    def write_twice(log: BlockLog, first: int, block: FinishedBlock) -> None:
        if len(written) == 2:
            raise UserError("stopped")
        written.append(first)
        write(log, first, block)

    with monkeypatch.context() as patch:
        patch.setattr(BlockLog, "write", write_twice)
        with pytest.raises(UserError, match="stopped"):
            measured(*command)
    seen: list[str] = []
    real = evaluate_run.block_outcome
    monkeypatch.setattr(
        evaluate_run, "block_outcome", lambda *given, **named: (seen.append("block"), real(*given, **named))[1]
    )
    entry = measured(*command)["checkpoints"]["best"]["attacks"]["aa"]
    assert len(seen) == 3, "two of five blocks were finished"
    assert entry["broken_by"] == {"apgd-ce": 15, "apgd-t": 0, "fab-t": 0, "square": 10}


@pytest.mark.parametrize(
    ("count", "n", "flagged"),
    [(1, 256, False), (1, 100, False), (20, 10_000, False), (21, 10_000, True), (5, 500, False), (6, 500, True)],
)
def test_squares_threshold(count: int, n: int, flagged: bool) -> None:
    """More than 0.2 % of all images, as in AutoAttack, and more than chance explains."""
    broken = {"apgd-ce": n // 2, "apgd-t": 0, "fab-t": 0, "square": count}
    assert (square_warning(broken, n) is not None) == flagged
    assert square_warning({"square": n // 2}, n) is None, "alone it says nothing about other parts"


# ---- few classes ------------------------------------------------------------------------------------------------------


def few_classes(folder: Path, classes: int, count: int = 24) -> Path:
    """A run of an untrained CNN for the first digits, with its images as shards beside it."""
    pixels, labels = digits()
    rows = np.flatnonzero(labels < classes)[:count]
    names = tuple(map(str, range(classes)))
    write_shards(LabelledArrays(pixels[rows], labels[rows], "few", names), folder / "test", progress=False)
    torch.manual_seed(1)
    arguments = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 8}), classes, 1, (0.3,), (0.3,))
    model = create("cnn4", arguments).eval()
    return write_run(folder / "run", model, arguments, 8, threat="eps: 0.1, step: 0.03")


@pytest.mark.parametrize(
    ("classes", "name", "needs"),
    [
        (2, "aa:apgd-ce+fab-t+square", "apgd-t needs 4 classes, and the model has 2"),
        (3, "aa:apgd-ce+fab-t+square", "has 3"),
    ],
)
def test_undefined_parts_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, classes: int, name: str, needs: str
) -> None:
    """Results, terminal, report, card and RobustBench's texts name the parts, and none says AutoAttack's standard version."""
    install(monkeypatch, tmp_path / "path", {})
    run = few_classes(tmp_path, classes)
    command = [str(run), "--data", str(tmp_path / "test"), "--attacks", "natural,aa", "--checkpoint", "best"]
    evaluate_cli.main(command)
    record = json.loads((run / "results.json").read_text())["checkpoints"]["best"]
    assert set(record["attacks"]) == {"natural", name}
    assert needs in record["attacks"][name]["left_out"][0]
    note = f"{name} is not the standard version of AutoAttack: apgd-t needs 4 classes"
    assert note in capsys.readouterr().out
    evaluate_cli.main(command)  # known by the name of its parts
    report([str(run)])
    assert note in capsys.readouterr().out and note in (run / "report.html").read_text()
    release([str(run), "--to", str(tmp_path / "release")])
    card = (tmp_path / "release" / "README.md").read_text()
    assert note in card and "| AutoAttack |" in card and f"| {name} |" in card
    info = json.loads((tmp_path / "release" / "robustbench" / "model_info.json").read_text())
    assert info["autoattack_acc"] is None and note in info["footnote"]


def test_four_classes_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From four classes on it is AutoAttack; parts that need more are refused where they are all that was asked for."""
    install(monkeypatch, tmp_path / "path", {})
    run = few_classes(tmp_path, 4)
    command = [str(run), "--data", str(tmp_path / "test"), "--checkpoint", "best", "--attacks"]
    evaluate_cli.main([*command, "aa"])
    assert list(json.loads((run / "results.json").read_text())["checkpoints"]["best"]["attacks"]) == ["aa"]
    three = few_classes(tmp_path / "three", 3)
    with pytest.raises(UserError, match="apgd-t needs 4 classes, and the model has 3"):
        evaluate_cli.main([str(three), "--data", str(tmp_path / "three" / "test"), "--attacks", "aa:apgd-t"])


@pytest.mark.medium
@pytest.mark.parametrize(("classes", "norm", "eps"), [(2, "linf", 0.1), (3, "l2", 0.8)])
def test_the_package_runs_on_few_classes(tmp_path: Path, classes: int, norm: str, eps: float) -> None:
    """pyautoattack itself, in both norms, with every part that is defined."""
    run = few_classes(tmp_path, classes, count=3)
    options = ["--norm", norm, "--eps", str(eps), "--attacks", "natural,aa,aa:apgd-dlr+square", "--checkpoint", "best"]
    evaluate_cli.main([str(run), "--data", str(tmp_path / "test"), *options])
    attacks = json.loads((run / "results.json").read_text())["checkpoints"]["best"]["attacks"]
    dlr = "aa:apgd-dlr+square" if classes == 3 else "aa:square"
    assert set(attacks) == {"natural", "aa:apgd-ce+fab-t+square", dlr}
    broken = sum(attacks["aa:apgd-ce+fab-t+square"]["broken_by"].values())
    assert broken == attacks["natural"]["correct"] - attacks["aa:apgd-ce+fab-t+square"]["correct"]
    assert not any(entry["warnings"] for entry in attacks.values())
