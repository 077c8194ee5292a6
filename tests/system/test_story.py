"""Whole runs: train, resume, evaluate, report, release, load; two processes; refusals."""

import json
import shutil
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
from tests.support.accelerate import new_process
from tests.support.launched import launched
from tests.support.runs import RECIPE, ROOT, digest, make_shards, torchrun


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    make_shards(folder / "test", 40, 2)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


@pytest.fixture(scope="module")
def whole(recipe_path: Path) -> Path:
    """The run of the recipe without interruption."""
    with new_process():
        return train(load_recipe(recipe_path, [f"run_dir={recipe_path.parent / 'whole'}"]))


@pytest.mark.medium
def test_the_whole_story(recipe_path: Path, whole: Path, tmp_path: Path) -> None:
    """A run is trained, evaluated, reported, released and loaded; the loaded model is the evaluated one."""
    run = shutil.copytree(whole, tmp_path / "run")
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
    """An objective of each family trains with AWP and accumulation; its loss is finite."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"objective.name={objective}", "train.epochs=1", "train.accumulate=2"]
    run = train(load_recipe(recipe_path, [*overrides, "awp.gamma=0.005", "awp.warmup_epochs=0"]))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(row["loss"])
    assert (row["robust_accuracy"] is None) == (objective == "natural")


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions(recipe_path: Path, tmp_path: Path, precision: str) -> None:
    """bf16 autocast saves float32 weights, float64 saves float64 ones."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"precision={precision}", "train.epochs=1"]
    run = train(load_recipe(recipe_path, overrides))
    weight = named_checkpoint(run, "last").tensors("model")["classifier.weight"]
    assert weight.dtype == (torch.float64 if precision == "fp64" else torch.float32)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_equals_an_undisturbed_one(
    recipe_path: Path, whole: Path, tmp_path: Path, optimizer: str
) -> None:
    """A run that is stopped twice and resumed ends with the bits of one that was never stopped."""
    parts, name = tmp_path / "parts", f"optim.name={optimizer}"
    for overrides in (["train.max_steps=3"], ["train.max_steps=7"], []):
        train(load_recipe(recipe_path, [f"run_dir={parts}", name, *overrides]))
    if optimizer != "sgd":  # the recipe's
        whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}", name]))
    assert digest(parts) == digest(whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    recipe_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run names a damaged newest checkpoint, resumes from the one before, and ends with the same bits."""
    run = tmp_path / "run"
    train(load_recipe(recipe_path, [f"run_dir={run}", "train.max_steps=8"]))
    newest = named_checkpoint(run, "last").folder
    damaged = bytearray((newest / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "model.safetensors").write_bytes(damaged)
    train(load_recipe(recipe_path, [f"run_dir={run}"]))
    assert f"{newest} is damaged: model.safetensors" in capsys.readouterr().out
    assert digest(run) == digest(whole)


def test_a_finished_run_is_left_alone(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Starting a complete run again changes nothing."""
    overrides = [f"run_dir={tmp_path / 'run'}", "train.epochs=1"]
    run = train(load_recipe(recipe_path, overrides))
    before = digest(run)
    train(load_recipe(recipe_path, overrides))
    assert "complete" in capsys.readouterr().out
    assert digest(run) == before


def test_run_directories_are_never_mixed(recipe_path: Path, tmp_path: Path) -> None:
    """The directory of another recipe, or a folder that is not a run, is refused and left unchanged."""
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


def test_a_nan_loss_ends_the_run_without_a_checkpoint(recipe_path: Path, tmp_path: Path) -> None:
    """A loss that becomes NaN ends the run with advice; no checkpoint contains the step."""
    overrides = [f"run_dir={tmp_path / 'run'}", "optim.lr=1e30", "optim.schedule=constant", "objective.name=trades"]
    with pytest.raises(FloatingPointError, match=r"(?i)lower.*(optim\.lr|learning rate)"):
        train(load_recipe(recipe_path, overrides))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.medium
def test_two_processes_see_the_same_images_and_agree(recipe_path: Path, tmp_path: Path) -> None:
    """Two processes train the model of one process, in float64 up to the order of summation."""
    overrides = ["precision=fp64", "train.epochs=2", "awp.gamma=0.005", "awp.warmup_epochs=1", "resume=never"]
    result = torchrun([str(recipe_path), *overrides, f"run_dir={tmp_path / 'two'}"])
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout, "the launcher started one process only"
    train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'one'}"]))
    one, two = (named_checkpoint(tmp_path / name, "last").tensors("model") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=15", "error: data.batch_size 15 does not divide by 2 processes"),
        ("data.real.shards=nowhere", "error: There are no shards of data.real.shards at nowhere"),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(recipe_path: Path, tmp_path: Path, override: str, message: str) -> None:
    """A user's mistake is one message of all ranks, without a traceback, and creates no run directory."""
    with launched([str(recipe_path), f"run_dir={tmp_path / 'run'}", override], processes=2) as launch:
        assert launch.wait() == [2, 2]
        printed = launch.text("err", 0) + launch.text("err", 1)
    assert printed.count(message) == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_user_errors_end_with_status_2(recipe_path: Path, tmp_path: Path) -> None:
    """The command ends with status 2 and one message without a traceback, and creates no run directory."""
    with launched([str(recipe_path), f"run_dir={tmp_path / 'run'}", "data.real.shards=nowhere"]) as launch:
        assert launch.wait() == [2]
        printed = launch.text("err")
    assert "nowhere" in printed
    assert "make real shards\n  make generated shards" in printed
    assert "Traceback" not in printed
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
    """A wrong value is named before anything is written."""
    with pytest.raises(UserError) as caught:
        main([str(recipe_path), f"run_dir={tmp_path / 'run'}", override])
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_created_is_named(recipe_path: Path, tmp_path: Path) -> None:
    """The message names the file that is in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'file' / 'run'}"]))


def test_a_damaged_shard_is_named(recipe_path: Path, tmp_path: Path) -> None:
    """Training refuses and names a shard with one flipped bit."""
    folder = make_shards(tmp_path / "real", 60, 3)
    shard = folder / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.tar"):
        train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", f"data.real.shards={folder}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_the_recipe_for_gpus_takes_a_step(tmp_path: Path) -> None:
    """recipes/wrn28_10_gen1m.yaml trains WideResNet-28-10 in bf16 on shards of the published layout."""
    for name, n in (("edm_1m", 2000), ("cifar10_train", 600)):
        make_shards(tmp_path / name, n, 5, channels=3, size=32)
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"data.real.shards={tmp_path / 'cifar10_train'}",
        f"data.generated.shards={tmp_path / 'edm_1m'}",
        "train.max_steps=1",
        "data.batch_size=2",
        "data.validation.size=10",
        "threat.num_steps=1",
        "threat.step=8/255",
        "train.validation_attack=cw1",
    ]
    run = train(load_recipe(ROOT / "recipes" / "wrn28_10_gen1m.yaml", overrides))
    checkpoint = open_checkpoint(named_checkpoint(run, "last").folder)
    names = json.loads((ROOT / "tests/golden/wrn28_10_state_names.json").read_text())
    assert {name: list(value.shape) for name, value in checkpoint.tensors("ema").items()} == names
