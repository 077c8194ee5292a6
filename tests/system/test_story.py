"""Training in real processes: the story of a run, resuming, two processes, and every way to be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nrat_scale
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.checkpoint.format import open_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate import measures
from nrat_scale.recipe import load_recipe
from nrat_scale.release import bundle
from nrat_scale.report.page import write_report
from nrat_scale.report.run import read_runs
from nrat_scale.train.__main__ import main
from nrat_scale.train.loop import train
from tests.support.runs import RECIPE, ROOT, digest, launch, make_shards


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    make_shards(folder / "test", 40, 2)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


def test_the_whole_story(recipe_path: Path, tmp_path: Path) -> None:
    """Train, evaluate, report, release and load fit together, and the loaded model is the evaluated one."""
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "validation"] * 3
    assert all(row["natural_clean"] for row in rows if row["kind"] == "validation")
    noise = json.loads((run / "label_noise.json").read_text())
    stored = np.load(run / "label_noise.npz")
    assert noise["num_noisy"] == 40 == int((stored["clean"] != stored["given"]).sum()), "4 of the 12 images of a class"
    test = recipe_path.parent / "test"
    evaluate_cli.main([str(run), "--data", str(test), "--attacks", "natural,pgd3,cw3"])
    results = json.loads((run / "results.json").read_text())
    assert results["checkpoints"]["last"]["attacks"]["pgd3"]["n"] == 40
    page = write_report(read_runs([run]))
    assert "cw3" in page.read_text().lower() or "cw-3" in page.read_text().lower()
    folder = bundle.release(run, tmp_path / "release")
    model = nrat_scale.load(folder)
    images = measures.read_images(open_shards(test))
    with torch.no_grad():
        right = model(images.pixels.float() / 255).argmax(1).eq(images.labels).sum()
    assert int(right) == results["checkpoints"]["best"]["attacks"]["natural"]["correct"]


@pytest.mark.parametrize("objective", ["natural", "pgd_at_apl", "mart", "dm_at", "trades_ikl"])
def test_every_family_trains(recipe_path: Path, tmp_path: Path, objective: str) -> None:
    """One objective of each family runs, with AWP and accumulation, and its loss is finite."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"objective.name={objective}", "train.epochs=1", "train.accumulate=2"]
    run = train(load_recipe(recipe_path, [*overrides, "awp.gamma=0.005", "awp.warmup_epochs=0"]))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(row["loss"])
    assert (row["robust_accuracy"] is None) == (objective == "natural")


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions(recipe_path: Path, tmp_path: Path, precision: str) -> None:
    """bf16 autocast and float64 train, validate and save in the types they promise."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"precision={precision}", "train.epochs=1"]
    run = train(load_recipe(recipe_path, overrides))
    weight = named_checkpoint(run, "last").tensors("model")["classifier.weight"]
    assert weight.dtype == (torch.float64 if precision == "fp64" else torch.float32)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_interrupted_run_equals_undisturbed_run(recipe_path: Path, tmp_path: Path, optimizer: str) -> None:
    """Stopping anywhere and going on gives the bits of the run that was never stopped, also with loader workers."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    name = f"optim.name={optimizer}"
    train(load_recipe(recipe_path, [f"run_dir={whole}", name]))
    for overrides in (["train.max_steps=3"], ["train.max_steps=7", "data.workers=2"], []):
        train(load_recipe(recipe_path, [f"run_dir={parts}", name, *overrides]))
    assert digest(parts) == digest(whole)


def test_damaged_newest_checkpoint_falls_back(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged newest checkpoint is named, the one before is used, and the end is the same."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(load_recipe(recipe_path, [f"run_dir={whole}"]))
    train(load_recipe(recipe_path, [f"run_dir={run}", "train.max_steps=8"]))
    newest = named_checkpoint(run, "last").folder
    damaged = bytearray((newest / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "model.safetensors").write_bytes(damaged)
    train(load_recipe(recipe_path, [f"run_dir={run}"]))
    assert f"{newest} is damaged: model.safetensors" in capsys.readouterr().out
    assert digest(run) == digest(whole)


def test_finished_run_is_left_alone(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Starting a complete run again trains nothing and changes nothing."""
    overrides = [f"run_dir={tmp_path / 'run'}", "train.epochs=1"]
    run = train(load_recipe(recipe_path, overrides))
    before = digest(run)
    train(load_recipe(recipe_path, overrides))
    assert "complete" in capsys.readouterr().out
    assert digest(run) == before


def test_run_directories_are_never_mixed(recipe_path: Path, tmp_path: Path) -> None:
    """Another recipe, or a folder that is no run, is refused by name and nothing in it changes."""
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]))
    before = digest(run)
    with pytest.raises(UserError, match=r"threat\.eps is 0\.1 there and 0\.2 here"):
        train(load_recipe(recipe_path, [f"run_dir={run}", "threat.eps=0.2"]))
    with pytest.raises(UserError, match="not empty"):
        train(load_recipe(recipe_path, [f"run_dir={run}", "resume=never"]))
    assert digest(run) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run"):
        train(load_recipe(recipe_path, [f"run_dir={other}"]))
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_divergence_is_reported(recipe_path: Path, tmp_path: Path) -> None:
    """A loss that becomes NaN stops the run with advice and leaves no checkpoint of it."""
    overrides = [f"run_dir={tmp_path / 'run'}", "optim.lr=1e30", "optim.schedule=constant", "objective.name=trades"]
    with pytest.raises(FloatingPointError, match=r"(?i)lower.*(optim\.lr|learning rate)"):
        train(load_recipe(recipe_path, overrides))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_two_processes_see_the_same_images_and_agree(recipe_path: Path, tmp_path: Path) -> None:
    """Two real processes train one model: as one process does in float64, up to the order of summation."""
    overrides = ["precision=fp64", "train.epochs=2", "awp.gamma=0.005", "awp.warmup_epochs=1", "resume=never"]
    result = launch([str(recipe_path), *overrides, f"run_dir={tmp_path / 'two'}"], processes=2)
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout, "the launcher must really have started two"
    train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'one'}"]))
    one, two = (named_checkpoint(tmp_path / name, "last").tensors("model") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=15", "error: data.batch_size 15 does not divide by 2 processes"),
        ("data.real.shards=nowhere", "error: There are no shards of data.real.shards at nowhere"),
    ],
)
def test_every_rank_prints_once(recipe_path: Path, tmp_path: Path, override: str, message: str) -> None:
    """Under torchrun a user's mistake is told once, without a traceback of ours, and nothing is left behind."""
    result = launch([str(recipe_path), f"run_dir={tmp_path / 'run'}", override], processes=2)
    assert result.returncode != 0
    assert result.stderr.count(message) == 1
    assert "nrat_scale/train.py" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_user_errors_end_with_status_2(recipe_path: Path, tmp_path: Path) -> None:
    """A real process ends with status 2, one plain message and no traceback, and makes nothing."""
    result = launch([str(recipe_path), f"run_dir={tmp_path / 'run'}", "data.real.shards=nowhere"])
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "make real shards\n  make generated shards" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("threat.eps=8", "8/255"),
        ("objective.nmae=trades", "Did you mean 'name'"),
        ("model.name=resnet19_cifar", "resnet18_cifar"),
        ("model.kwargs.widht=3", "widht"),
        ("data.validation.size=500", "only 120 images"),
        ("data.generated.fraction=0.01", "0 generated images"),
    ],
)
def test_bad_values_are_named(recipe_path: Path, tmp_path: Path, override: str, message: str) -> None:
    """Each wrong value is named before anything is written."""
    with pytest.raises(UserError) as caught:
        main([str(recipe_path), f"run_dir={tmp_path / 'run'}", override])
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unwritable_run_dir(recipe_path: Path, tmp_path: Path) -> None:
    """A run directory that cannot be made is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'file' / 'run'}"]))


def test_damaged_shard_is_named(recipe_path: Path, tmp_path: Path) -> None:
    """Training refuses a shard with one flipped bit and says which."""
    folder = make_shards(tmp_path / "real", 60, 3)
    shard = folder / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.tar"):
        train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", f"data.real.shards={folder}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_headline_recipe_runs_unshrunk(tmp_path: Path) -> None:
    """recipes/wrn28_10_gen1m.yaml, WideResNet-28-10 in bf16, takes real steps over shards of the published layout."""
    for name, n in (("edm_1m", 2000), ("cifar10_train", 600)):
        make_shards(tmp_path / name, n, 5, channels=3, size=32)
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"data.real.shards={tmp_path / 'cifar10_train'}",
        f"data.generated.shards={tmp_path / 'edm_1m'}",
        "train.max_steps=1",
        "data.batch_size=4",
        "data.validation.size=10",
        "threat.num_steps=1",
        "train.validation_attack=cw1",
    ]
    run = train(load_recipe(ROOT / "recipes" / "wrn28_10_gen1m.yaml", overrides))
    checkpoint = open_checkpoint(named_checkpoint(run, "last").folder)
    names = json.loads((ROOT / "tests/golden/wrn28_10_state_names.json").read_text())
    assert {name: list(value.shape) for name, value in checkpoint.tensors("ema").items()} == names
