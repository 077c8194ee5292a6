"""The benchmarks run where they can, refuse where they cannot, and their levers are what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench import against_package, data, gpu, loaders, processes
from bench.attack_profile import Profile, Spent, print_profile
from bench.gpu import step_gpu, step_seconds
from bench.gpu_rows import CONTENDERS, Case, Contender
from bench.step import make_images
from nrat_scale.core.errors import UserError

WIDE = Case("wrn28_10_silu", 2, "{depth: 10, width: 1}")
EVERY = [contender for group in CONTENDERS for contender in group]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.compile does nothing; one step of each row is measured, after no further warm-up."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(torch, "compile", lambda function, *, dynamic: function)
    for name, value in {"_WARMUP_STEPS": 0, "_MOST_STEPS": 1, "_LEAST_STEPS": 1}.items():
        monkeypatch.setattr(gpu, name, value)


# ---- step --gpu -----------------------------------------------------------------------------------------------------


def test_the_gpu_table_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without one the command ends with one sentence, before it computes anything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs a CUDA GPU, and torch finds none"):
        command.main(["step", "--gpu"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
def test_every_row_of_the_gpu_table_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU with a tiny model: the checks hold, and the table and the JSON file have every row."""
    out = tmp_path / "rows.json"
    (tmp_path / "work").mkdir()
    step_gpu(tmp_path / "work", out, 600.0, (WIDE,), device="cpu", check_steps=1)
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert all(check["holds"] for check in report["checks"]) and len(report["checks"]) == 10
    assert len(report["rows"]) == len(EVERY)
    for row, contender in zip(report["rows"], EVERY, strict=True):
        assert row["contender"].startswith(contender.name) and f"| {row['contender']} |" in printed
        assert row["images_per_second"] == pytest.approx(2 / row["median_seconds"])
        assert row["share_of_peak"] is None, "a CPU has no datasheet peak"


@pytest.mark.usefixtures("no_compiler")
def test_rows_beyond_the_budget_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table stays whole, and the file too."""
    monkeypatch.setattr(gpu, "_checks", lambda *given: [])
    step_gpu(tmp_path, tmp_path / "rows.json", 0.0, (WIDE,), device="cpu")
    reasons = [row["skipped"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert len(reasons) == len(EVERY) and all("not measured" in reason for reason in reasons)


def test_a_row_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance of memory; the rows after it are measured."""

    def fail(*given: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nMore text")

    monkeypatch.setattr(gpu, "_measure", fail)
    row = gpu._row(tmp_path, WIDE, EVERY[0], "cpu", float("inf"))
    assert row["skipped"] == "failed: CUDA out of memory."


def test_a_check_that_fails_ends_the_command_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_checks", lambda *given: [{"check": "float64 step", "holds": False}])
    with pytest.raises(SystemExit, match="do not hold on CPU: float64 step"):
        step_gpu(tmp_path, tmp_path / "rows.json", 0.0, (WIDE,), device="cpu")


@pytest.mark.medium
@pytest.mark.usefixtures("no_compiler")
def test_levers_are_what_they_say(tmp_path: Path) -> None:
    """Each changes exactly what its row names, in the model and in the attack's copies of it."""
    make_images(tmp_path)

    def facts(**levers: bool) -> dict[str, Any]:
        state = gpu._ours(tmp_path, WIDE, Contender("row", **levers), "cpu").state
        attack = state.attack_model
        copies = (state.base, attack.module, attack.low)
        return {
            "channels_last": state.recipe.train.channels_last,
            "fold": attack.num_folded > 0,
            "compute_weights": any(p.dtype == torch.bfloat16 for p in attack.low.parameters()),
            "padding_copy": [sum(_pads(module)) for module in copies] == [3, 3, 3],
            "compile": state.base._compiled_call_impl is not None,
        }

    usual = {
        "channels_last": True,
        "fold": True,
        "compute_weights": True,
        "padding_copy": False,
        "compile": False,
    }
    assert facts() == usual
    for name, value in usual.items():
        assert facts(**{name: not value}) == {**usual, name: not value}


def _pads(model: nn.Module) -> list[bool]:
    return [module.padding is not None for module in model.modules() if hasattr(module, "conv_0")]


def test_steps_end_with_the_budget_but_not_before_three() -> None:
    calls: list[None] = []
    first, steps = step_seconds(lambda: calls.append(None), "cpu", 12, 2, 0.0)
    assert len(steps) == 3 and len(calls) == 6 and first >= 0
    assert len(step_seconds(lambda: None, "cpu", 12, 2, 60.0)[1]) == 12


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_missing_loader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The table goes on without its rows."""
    monkeypatch.setattr(loaders, "version", lambda package: None)
    assert data._write_for_loaders(tmp_path) == ["streaming", "litdata"]
    assert "mosaicml-streaming is not installed (pip install -e '.[bench]')" in capsys.readouterr().out
    assert set(data.OPTIONAL) == {"streaming", "streaming_workers", "litdata", "litdata_workers"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(loaders.PACKAGES))
def test_other_loaders_give_the_images_and_labels(tmp_path: Path, kind: str) -> None:
    """Every image of a batch is one of the sources, with its label; three in ten are real."""
    if loaders.version(loaders.PACKAGES[kind]) is None:
        pytest.skip(f"{kind} is not installed (extra bench)")
    known: dict[bytes, tuple[str, int]] = {}
    for seed, source in enumerate(loaders.SOURCES):
        data.make_npz(tmp_path / f"{source}.npz", 4_000, seed)
        with np.load(tmp_path / f"{source}.npz") as file:
            rows = zip(file["image"], file["label"], strict=True)
            known |= {image.tobytes(): (source, int(label)) for image, label in rows}
    loaders.write(kind, tmp_path)
    images, labels = next(getattr(loaders, kind)(tmp_path, 0))
    assert images.shape == (loaders.BATCH, 32, 32, 3)
    found = [known[image.numpy().tobytes()] for image in images]
    assert [label for _, label in found] == labels.tolist()
    assert sum(source == "real" for source, _ in found) / loaders.BATCH == pytest.approx(0.3, abs=0.08)


def test_starts_share_the_cache_of_the_first_compiled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eager and first start begin with an empty cache, the second finds its files; the row has what the run said."""

    def started(recipe: Path, run: Path, *overrides: str, cache: Path) -> tuple[float, str]:
        assert "data.batch_size=4" in overrides
        if "train.compile=false" in overrides:
            return 2.0, ""
        read = 5 if (cache / "fxgraph").exists() else 0
        (cache / "fxgraph").mkdir(parents=True, exist_ok=True)
        return 9.0 - read, f"torch.compile: {5 - read} graphs compiled, {read} read from {cache}, {6.5 - read} s\n"

    monkeypatch.setattr(processes, "_startup_seconds", started)
    monkeypatch.setattr(processes, "_cpu_seconds_of_children", lambda: 0.0)
    command.main(["--work", str(tmp_path), "start", "--model", "cnn4", "data.batch_size=4"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| eager | 2.0 | 0.0 | 0 | 0 | 0 |",
        "| compiled, empty cache | 9.0 | 0.0 | 6.5 | 5 | 0 |",
        "| compiled, second start | 4.0 | 0.0 | 1.5 | 0 | 5 |",
    ]


# ---- autoattack -----------------------------------------------------------------------------------------------------


def test_differing_outcomes_are_listed_with_their_margins(capsys: pytest.CaptureFixture[str]) -> None:
    """An image is wrong if its margin is above 0; each that only one of the two breaks is printed."""
    both = {"direct": torch.tensor([-1.0, 0.5, -0.001]), "ours": torch.tensor([-1.0, 0.5, 0.002])}
    report = against_package._report(
        "cnn4", torch.device("cpu"), both, {"direct": 3.0, "ours": 1.5}, {"square": 1.0}, [7, 8, 9], 3
    )
    assert report["images_per_second"] == {"direct": 1.0, "ours": 2.0}
    assert [image["id"] for image in report["differing"]] == [9]
    against_package._print(report)
    printed = capsys.readouterr().out
    assert "image 9: logit margin -1.00e-03 by the direct call, +2.00e-03 by ours" in printed
    assert "| 3 | 1.00 | 2.00 | 2.00 | 66.7 % | 33.3 % | 1 |" in printed


@pytest.mark.slow
def test_autoattack_gives_the_outcomes_of_a_direct_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU every outcome is equal; the time of each component is printed."""
    options = ["--images", "6", "--batch-size", "4", "--steps", "2", "--out", str(tmp_path / "out.json")]
    command.main(["autoattack", "--model", "cnn4", *options, "model.kwargs={width: 2, hidden: 4}"])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["differing"] == [] and report["robust"]["direct"] == report["robust"]["ours"]
    assert "time of ours by component:" in capsys.readouterr().out


def test_the_profile_of_an_attack_counts_its_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Each pass belongs to the component that runs; gradients are those of the model; the shares add up."""
    ticks = iter(range(1000))
    profile = Profile(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), lambda: float(next(ticks)))
    x = torch.rand(5, 3, 2, 2, requires_grad=True)
    profile(x)  # before the first component: not counted
    profile.begin("gradients")
    (gradient,) = torch.autograd.grad(profile(x).logsumexp(1).sum(), x)
    (expected,) = torch.autograd.grad(profile.model(x).logsumexp(1).sum(), x)
    assert torch.equal(gradient, expected)
    profile.begin("queries")
    with torch.no_grad():
        profile(x), profile(x[:2])
    profile.begin("")
    assert profile.components == {"gradients": Spent(5, 1, 1, 1, 5), "queries": Spent(5, 2, 0, 2, 7)}
    print_profile(profile.components)
    printed = capsys.readouterr().out
    assert "| gradients | 5.0 | 50 % | 20 % | 20 % | 60 % | 1 | 5.0 |" in printed
    assert "| all | 10.0 | 100 % | 30 % | 10 % | 60 % | 3 | 4.0 |" in printed


def test_an_outcome_that_differs_ends_the_command_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU one is too many."""
    monkeypatch.setattr(against_package, "direct", lambda block: block.x)
    monkeypatch.setattr(against_package, "_evaluated", lambda block, components: block.x)
    signs = iter([1.0, -1.0])
    monkeypatch.setattr(against_package, "margins", lambda model, x, y: torch.full((len(y),), next(signs)))
    options = ["--images", "4", "--batch-size", "4", "--steps", "0", "model.kwargs={width: 2, hidden: 4}"]
    with pytest.raises(SystemExit, match="4 of 4 outcomes differ"):
        command.main(["autoattack", "--model", "cnn4", *options])
