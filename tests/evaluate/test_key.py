"""Everything that changes an outcome belongs to its key, and evaluations at the same time lose nothing."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import register_model
from torch import Tensor, nn

from nrat_scale import models
from nrat_scale.checkpoint.folder import write_pointer
from nrat_scale.checkpoint.format import save_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import unfinished_sibling
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate import measures, request
from nrat_scale.evaluate.attacks import ATTACKS
from nrat_scale.evaluate.results import BlockLog, FinishedBlock, read_arrays
from nrat_scale.evaluate.sanity import check_model
from nrat_scale.models import Cnn4

Measured = Callable[..., dict[str, Any]]


class Negated(Cnn4):
    """Has the tensors of `Cnn4`, and other outcomes."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@register_model
def cnn4_negated(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For a weight file of `cnn4` that is evaluated as another architecture."""
    return Negated(**{name: kwargs[name] for name in ("mean", "std") if name in kwargs})


@pytest.fixture
def weights(model: nn.Module, run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[Path]]:
    """Evaluate a weight file of `model` by the command line from the folder of `run`: the default results files afterwards."""
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(
        Cnn4.__init__, "__defaults__", (10, 1, (0.5,), (0.5,), 8, 32, 0.0, "avg")
    )  # the size of `model`
    monkeypatch.setitem(models.default_cfgs, "cnn4_negated", models.default_cfgs["cnn4"])  # it normalises itself

    def measure(*options: str, file: str = "w.pt", scale: float = 1.0) -> set[Path]:
        Path(file).parent.mkdir(exist_ok=True)
        torch.save({name: value * scale for name, value in model.state_dict().items()}, file)
        arch = [] if "--arch" in options else ["--arch", "cnn4"]
        evaluate_cli.main([file, "--data", "test", "--attacks", "natural", "--eps", "0.1", *arch, *options])
        return set(Path("evaluations").glob("*/results.json"))

    return measure


def correct(path: Path, label: str = "file") -> int:
    return int(json.loads(path.read_text())["checkpoints"][label]["attacks"]["natural"]["correct"])


PLAIN = ("--mean", "0.3", "--std", "0.3")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--mean", "0.9", "--std", "0.3"], r"mean \[0.3\] \(requested: \[0.9\]\)"),
        (["--mean", "0.3", "--std", "0.1"], r"std \[0.3\] \(requested: \[0.1\]\)"),
        (["--arch", "cnn4_negated", *PLAIN], r"architecture cnn4 \(requested: cnn4_negated\)"),
    ],
)
def test_one_file_as_two_models(weights: Callable[..., Any], options: list[str], field: str) -> None:
    """Another normalisation or architecture has its own folder and numbers; in an explicit --out it is refused by name."""
    (first,) = weights(*PLAIN)
    assert re.fullmatch(r"evaluations/w-[0-9a-f]{8}/results\.json", first.as_posix())
    (second,) = weights(*options) - {first}
    assert correct(first) != correct(second)
    assert (weights(*PLAIN), weights(*options)) == ({first, second}, {first, second})
    weights(*PLAIN, "--out", "out.json")
    content = Path("out.json").read_bytes()
    with pytest.raises(UserError, match=rf"out\.json holds another file: {field}.*Give another --out"):
        weights(*options, "--out", "out.json")
    assert Path("out.json").read_bytes() == content and correct(Path("out.json")) == correct(first)


def test_two_files_of_one_name(weights: Callable[..., Any]) -> None:
    """a/best.pt and b/best.pt have their own results; the same tensors in two files are one model."""
    (first,) = weights(*PLAIN, file="a/best.pt")
    both = weights(*PLAIN, file="b/best.pt", scale=0.5)
    assert len(both) == 2 and all(path.parent.name.startswith("best-") for path in both)
    seconds = json.loads(first.read_text())["checkpoints"]["file"]["attacks"]["natural"]["seconds"]
    assert weights(*PLAIN, file="c/best.pt") == both
    assert json.loads(first.read_text())["checkpoints"]["file"]["attacks"]["natural"]["seconds"] == seconds
    weights(*PLAIN, "--out", "out.json")
    with pytest.raises(UserError, match=r"weights_sha256 [0-9a-f]{12} \(requested: [0-9a-f]{12}\)"):
        weights(*PLAIN, "--out", "out.json", scale=0.5)


def test_unfinished_blocks_belong_to_a_model(weights: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that an interrupted evaluation leaves are not used for another normalisation of the same file."""
    write = BlockLog.write

    def write_and_stop(log: BlockLog, first: int, block: FinishedBlock) -> None:
        write(log, first, block)
        raise KeyboardInterrupt

    wrong, options = ("--mean", "0.9", "--std", "0.1"), ("--batch-size", "64", "--out", "out.json")
    with monkeypatch.context() as patch:
        patch.setattr(BlockLog, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            weights(*wrong, *options)
    weights(*PLAIN, *options)
    assert len(list(unfinished_sibling(Path("out.json")).glob("*/block-*.json"))) == 1, (
        "those of the other model are kept"
    )
    weights(*PLAIN, "--batch-size", "64", "--out", "fresh.json")
    assert correct(Path("out.json")) == correct(Path("fresh.json"))


@pytest.mark.parametrize("field", ["float32", "attack_version", "device"])
def test_how_it_was_computed_belongs_to_the_key(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Results of another float32 mode, or of an earlier version of an attack, are not taken for these."""
    options = ("--attacks", "pgd2", "--checkpoint", "best")
    entry = measured(*options)["checkpoints"]["best"]["attacks"]["pgd2"]
    changed = {"float32": "tf32", "attack_version": entry["attack_version"] + 1, "device": "cuda"}[field]
    evaluation_key = request.Request.evaluation_key
    if field == "attack_version":
        monkeypatch.setitem(ATTACKS, "pgd", dataclasses.replace(ATTACKS["pgd"], version=changed))
    else:
        other = lambda *given: dataclasses.replace(evaluation_key(*given), **{field: changed})  # noqa: E731
        monkeypatch.setattr(request.Request, "evaluation_key", other)
    with pytest.raises(UserError, match=rf"pgd2 with {field} {entry[field]} \(requested: {changed}\)"):
        measured(*options)
    assert measured("--attacks", "cw2", "--checkpoint", "best")["checkpoints"]["best"]["attacks"]["pgd2"] == entry


def test_settings_are_recorded_and_printed(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    """results.json and the output name everything that a second person needs."""
    entry = measured("--attacks", "natural,pgd2", "--batch-size", "48")["checkpoints"]["best"]["attacks"]["pgd2"]
    assert {
        "device": "cpu",
        "float32": "ieee",
        "batch_size": 48,
        "architecture": "cnn4",
        "num_classes": 10,
    }.items() <= entry.items()
    assert {
        "attack": "pgd2",
        "attack_version": 1,
        "space": "pixel",
        "norm": "linf",
        "step": 0.04,
    }.items() <= entry.items()
    assert entry["versions"]["torch"] and entry["device_name"] and entry["threads"] == torch.get_num_threads()
    assert entry["model_args"]["width"] == 8 and entry["mean"] == pytest.approx([0.3])
    assert len(entry["weights_sha256"]) == len(entry["data_sha256"]) == 64
    out = capsys.readouterr().out
    assert re.search(r"keys: .*architecture cnn4, .*batch_size 48, device cpu, float32 ieee, versions \(", out)
    assert f"key of pgd2: {entry['key']}, step 0.04, steps 2, restarts 1\n" in out


def test_a_changed_checkpoint_keeps_the_earlier_results(
    run: Path, model: nn.Module, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    """After more training RUN/results.json is of the new checkpoint, and a copy holds what was measured before."""
    options = ("--attacks", "natural,pgd2")
    measured(*options)
    content, arrays = (run / "results.json").read_bytes(), read_arrays(run / "results.json")
    tensors = {name: value * 0.5 for name, value in model.state_dict().items()}
    saved = save_checkpoint(run, {"model": tensors, "ema": tensors}, {"step": 12, "epoch": 3, "whole_epoch": True})
    for pointer in ("best", "last"):
        write_pointer(run, pointer, saved)
    shutil.copyfile(run / "results.json", run / "explicit.json")
    shutil.copyfile(run / "results.npz", run / "explicit.npz")
    with pytest.raises(UserError, match=r"another best: weights_sha256 .* Give another --out"):
        measured(*options, "--out", str(run / "explicit.json"))
    results = measured("--attacks", "natural")
    assert all(
        record["step"] == 12 and set(record["attacks"]) == {"natural"} for record in results["checkpoints"].values()
    )
    (copy,) = run.glob("results.earlier-*.json")
    assert copy.read_bytes() == content and read_arrays(copy).keys() == arrays.keys()
    assert str(copy) in capsys.readouterr().err


def test_results_of_an_earlier_version_do_not_count(
    run: Path, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry without a key is measured again for a run, its file is kept, and an explicit --out is refused."""
    path, options = run / "results.json", ("--attacks", "natural", "--checkpoint", "best")
    results = measured(*options)
    entry = results["checkpoints"]["best"]["attacks"]["natural"]
    results["checkpoints"]["best"]["attacks"]["natural"] = {**entry, "seconds": 1234.5}
    del results["checkpoints"]["best"]["attacks"]["natural"]["key"]
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"earlier version.*Give another --out"):
        measured(*options, "--out", str(path))
    again = measured(*options)["checkpoints"]["best"]["attacks"]["natural"]
    assert again["seconds"] != 1234.5 and again["key"] == entry["key"]
    assert "earlier version" in capsys.readouterr().err and len(list(run.glob("results.earlier-*.json"))) == 1


@pytest.mark.parametrize("second", ["natural", "pgd2", "pgd2,cw2"])
def test_an_evaluation_within_another(
    run: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    """Both have read the results file before either writes it; all attacks of both are in it, with their outcomes."""
    check, nested = check_model, []

    def check_and_evaluate(*given: Any, **options: Any) -> Any:
        if not nested:
            nested.append(True)
            measured("--attacks", second, "--checkpoint", "best")
        return check(*given, **options)

    monkeypatch.setattr("nrat_scale.evaluate.run.check_model", check_and_evaluate)
    record = measured("--attacks", "pgd2,cw3", "--checkpoint", "best")["checkpoints"]["best"]
    assert set(record["attacks"]) == {"pgd2", "cw3", *second.split(",")}
    assert {f"best/{name}" for name in record["attacks"]} == read_arrays(run / "results.json").keys()
    assert record["worst"]["attacks"] == sorted(record["attacks"])


TOGETHER = """
import sys, time
from pathlib import Path
from nrat_scale.evaluate import run
from nrat_scale.evaluate.__main__ import main
here, there = map(Path, sys.argv[1:3])
check = run.check_model
def check_together(*given):
    here.touch()
    while not there.exists():
        time.sleep(0.01)
    return check(*given)
run.check_model = check_together
main(sys.argv[3:])
"""


@pytest.mark.medium
def test_two_evaluations_at_the_same_time(run: Path) -> None:
    """Two processes with one results file, with an attack in common: both succeed, and nothing is lost."""
    attacks = ("natural,pgd2", "pgd2,cw2")
    ready = [run.parent / "ready-0", run.parent / "ready-1"]
    options = [
        str(run),
        "--data",
        str(run.parent / "test"),
        "--checkpoint",
        "best",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(ready[i]), str(ready[1 - i]), *options, "--attacks", attacks[i]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    record = json.loads((run / "results.json").read_text())["checkpoints"]["best"]
    assert set(record["attacks"]) == set(",".join(attacks).split(","))
    assert {f"best/{name}" for name in record["attacks"]} == read_arrays(run / "results.json").keys()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_memory_that_does_not_suffice(
    run: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Blocks that do not fit end in a sentence with the way out, which works; finished attacks stay."""
    forward = Cnn4.forward

    def small(model: Cnn4, x: Tensor) -> Tensor:
        if len(x) > 16:
            raise error
        return forward(model, x)

    monkeypatch.setattr(Cnn4, "forward", small)
    for size, smaller in ((40, 20), (20, 10)):
        with pytest.raises(UserError, match=rf"blocks of {size} images.* --batch-size, such as {smaller}\. .*key"):
            measured("--attacks", "pgd2", "--checkpoint", "best", "--batch-size", str(size))
    assert measured("--attacks", "pgd2", "--checkpoint", "best", "--batch-size", "10")["checkpoints"]["best"]["attacks"]


def test_an_error_of_one_process_is_printed(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line prints errors of local rank 0 only: an error in one block is printed by its own process."""

    def fail(*given: Any, **options: Any) -> None:
        monkeypatch.setenv("LOCAL_RANK", "3")
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("nrat_scale.evaluate.run.block_outcome", fail)
    with pytest.raises(UserError):
        measured("--attacks", "pgd2")
    assert "error (process 3): best pgd2 does not fit into the memory" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_memory() -> None:
    """A bug keeps its traceback."""
    with pytest.raises(RuntimeError, match="shape"), measures.memory_errors("x", 8):
        raise RuntimeError("The size of tensor a must match the shape")
