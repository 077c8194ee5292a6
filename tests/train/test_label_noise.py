"""Label noise of a run: its files, the rate that it prints, and that a resumed run keeps the labels it began with."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import nrat_scale.labels
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.labels import corrupt
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.train import __main__ as train_cli
from nrat_scale.train.loop import train
from tests.support.runs import RECIPE, digest, make_shards

GENERATED = ["data.generated.noise={kind: symmetric, rate: 0.5, seed: 1}"]


@pytest.fixture(scope="module")
def hundreds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with 100 real images of each class, 57 % of them noisy; 0.57 * 100 is 56.99999999999999 in floats."""
    folder = tmp_path_factory.mktemp("hundreds")
    real, generated = make_shards(folder / "real", 1000, 0), make_shards(folder / "generated", 90, 1)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)).replace("0.4", "0.57"))
    return path


def test_the_number_of_wrong_labels_is_exact(
    hundreds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """57 of 100 in every class, through the command line; half of a batch is real, so 28.5 % of its labels are wrong."""
    train_cli.main([str(hundreds), f"run_dir={tmp_path / 'run'}", "train.max_steps=1"])
    noise = json.loads((tmp_path / "run" / "label_noise.json").read_text())
    assert noise["num_noisy"] == 570 and {row[i] for i, row in enumerate(noise["transition_matrix"])} == {43}
    assert "label noise: symmetric, 57.0 % of the real labels, 28.5 % of a batch's labels" in capsys.readouterr().out


def test_a_run_with_noisy_generated_labels(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files have the noise of both sources, its metrics count generated labels, and it resumes bit for bit."""
    whole = train(load_recipe(recipe_path, [*GENERATED, f"run_dir={tmp_path / 'whole'}"]))
    assert (
        "label noise: symmetric, 44.4 % of the generated labels, 22.2 % of a batch's labels" in capsys.readouterr().out
    )
    for stop in (["train.max_steps=5"], []):
        parts = train(load_recipe(recipe_path, [*GENERATED, f"run_dir={tmp_path / 'parts'}", *stop]))
    assert digest(parts) == digest(whole)
    folder = RunFolder(whole)
    noise, arrays = folder.read_label_noise("generated"), np.load(folder.noise_files("generated")[1])
    assert noise is not None and (noise["rate"], noise["seed"], noise["num_labels"]) == (0.5, 1, 90)
    assert noise["num_noisy"] == 40 == arrays["noisy"].sum(), "4 of the 9 images of a class"
    assert np.array_equal(arrays["given"], corrupt(arrays["clean"], "symmetric", 0.5, 1, 10))
    without = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'without'}"]))
    assert not any("generated" in path.name for path in without.iterdir())
    memorised = [[row["noisy_memorised"] for row in RunFolder(run).read_metrics()[::2]] for run in (whole, without)]
    assert memorised[0] != memorised[1] and None not in memorised[0]
    with pytest.raises(UserError, match=r"generated\.noise\.kind is symmetric there and none here"):
        train(load_recipe(recipe_path, [f"run_dir={whole}"]))


def test_a_resumed_run_keeps_its_labels(
    hundreds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that an older version began, with other counts, goes on as that version would have, and says so once."""
    with monkeypatch.context() as older:
        older.setattr(nrat_scale.labels, "num_flipped", lambda rate, n: int(rate * n))
        whole = train(load_recipe(hundreds, [f"run_dir={tmp_path / 'whole'}"]))
        parts = train(load_recipe(hundreds, [f"run_dir={tmp_path / 'parts'}", "train.max_steps=5"]))
    assert "other noisy labels" not in capsys.readouterr().err
    train(load_recipe(hundreds, [f"run_dir={parts}"]))
    said = capsys.readouterr().err
    assert said.count("other noisy labels are drawn now than when the run began (570 instead of 560 wrong ones)") == 1
    assert digest(parts) == digest(whole)
    for name in ("label_noise.json", "label_noise.npz"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("damage", ["missing", "truncated", "of other images"])
def test_labels_that_are_lost_end_in_a_sentence(
    hundreds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Without its stored labels such a run is refused, and nothing in it changes."""
    with monkeypatch.context() as older:
        older.setattr(nrat_scale.labels, "num_flipped", lambda rate, n: int(rate * n))
        run = train(load_recipe(hundreds, [f"run_dir={tmp_path / 'run'}", "train.max_steps=5"]))
    arrays = run / "label_noise.npz"
    if damage == "of other images":
        np.savez(arrays, clean=np.zeros(1000, np.int64), given=np.zeros(1000, np.int64))
    else:
        arrays.write_bytes(arrays.read_bytes()[:200]) if damage == "truncated" else arrays.unlink()
    with pytest.raises(
        UserError, match=r"began with other real labels .*label_noise\.npz does not hold them.*run_dir=PATH"
    ):
        train(load_recipe(hundreds, [f"run_dir={run}"]))
    assert named_checkpoint(run, "last").step == 5


def test_noise_that_fills_an_empty_class_is_said(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards that were prepared earlier can have a class without images: each label of it that noise makes is wrong."""
    images, names = np.zeros((60, 12, 12, 1), np.uint8), tuple("0123456789")
    labels = np.arange(60) % 8  # none of classes 8 and 9
    shards = write_shards(LabelledArrays(images, labels, "custom", names), tmp_path / "gap", progress=False)
    alone = ["data.generated.shards=null", "train.max_steps=1", f"data.real.shards={shards}"]
    train(load_recipe(recipe_path, [*alone, f"run_dir={tmp_path / 'noisy'}"]))
    said = capsys.readouterr().err
    assert re.search(
        r"has no image of class 8 \('8'\) and 1 more, but data\.real\.noise \(symmetric\) gives \d+ images", said
    )
    quiet = [
        "data.real.noise={kind: none, rate: 0}",
        "data.real.noise={kind: asymmetric, rate: 0.4, class_map: {0: 1}}",
    ]
    for number, noise in enumerate(quiet):
        train(load_recipe(recipe_path, [*alone, noise, f"run_dir={tmp_path / str(number)}"]))
        assert "no image of class" not in capsys.readouterr().err
