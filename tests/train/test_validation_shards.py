"""Validation images of their own (`data.validation.shards`): which labels they have, what is refused, what is recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.shards import open_shards
from nrat_scale.data.training_data import open_training_data
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.merge import merge
from nrat_scale.recipe import load_recipe
from nrat_scale.release import __main__ as release_cli
from nrat_scale.report import __main__ as report_cli
from nrat_scale.train.loop import train
from tests.support.runs import RECIPE, digest, make_shards
from tests.support.small_shards import write_small

SHORT = ["train.epochs=2", "data.epoch_samples=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that validates on 60 images of `checked`."""
    folder = tmp_path_factory.mktemp("apart")
    real, generated = make_shards(folder / "real", 120, 0, shift=3), make_shards(folder / "generated", 90, 1)
    make_shards(folder / "checked", 60, 7)
    make_shards(folder / "test", 40, 5)
    text = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated))
    (folder / "apart.yaml").write_text(text.replace("{size: 20}", f"{{shards: {folder / 'checked'}, labels: clean}}"))
    return folder


def test_validation_of_other_shards(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All training images are trained on; the labels are those of the other shards, which never get noise."""
    recipe = load_recipe(folder / "apart.yaml", [*SHORT, f"run_dir={tmp_path / 'run'}"])
    data = open_training_data(recipe.data, 0)
    checked = open_shards(folder / "checked")
    assert [len(source) for source in data.sources] == [120, 90]
    assert data.validation().labels.tolist() == checked.labels(np.arange(60)).tolist()
    run = train(recipe)
    assert f"validation: 60 of the 60 images of {folder / 'checked'}" in capsys.readouterr().out
    row = RunFolder(run).read_metrics()[-1]
    assert row["robust"]["n"] == 60 and row["natural_clean"] == row["natural"] and row["labels"] == "clean"
    stored = json.loads((run / "data.json").read_text())
    assert stored["validation"]["fingerprint"] == checked.fingerprint
    assert (stored["validation"]["num_held_out"], stored["real"]["num_held_out"]) == (60, 0)
    given = load_recipe(folder / "apart.yaml", ["data.validation.labels=given", "data.validation.size=20"])
    chosen = open_training_data(given.data, 0).validation()
    assert chosen.clean_labels is None, "given labels of own images make no claim"
    assert np.bincount(chosen.labels).tolist() == [2] * 10, "stratified"


def test_generated_images_alone_can_be_validated_apart(folder: Path, tmp_path: Path) -> None:
    """`data.validation.source` has no effect then, and needs no shards."""
    alone = ["data.real.shards=null", "data.real.noise={kind: none, rate: 0}", *SHORT, f"run_dir={tmp_path / 'run'}"]
    assert RunFolder(train(load_recipe(folder / "apart.yaml", alone))).read_metrics()[-1]["robust"]["n"] == 60


def test_a_resumed_run_needs_the_same_images(folder: Path, tmp_path: Path) -> None:
    """It ends with the same bits; with other validation or training images it is refused, and nothing changes."""
    shards = tmp_path / "checked"
    shutil.copytree(folder / "checked", shards)
    recipe = folder / "apart.yaml"
    here = [*SHORT, f"data.validation.shards={shards}"]
    whole = train(load_recipe(recipe, [*here, f"run_dir={tmp_path / 'whole'}"]))
    parts = train(load_recipe(recipe, [*here, f"run_dir={tmp_path / 'parts'}", "train.max_steps=3"]))
    assert digest(train(load_recipe(recipe, [*here, f"run_dir={parts}"]))) == digest(whole)
    shutil.rmtree(shards)
    make_shards(shards, 60, 8)
    before = digest(whole)
    with pytest.raises(UserError, match=r"began with other validation images than data\.validation\.shards has now"):
        train(load_recipe(recipe, [*here, f"run_dir={whole}"]))
    assert digest(whole) == before
    elsewhere = [*SHORT, f"run_dir={parts}"]
    with pytest.raises(UserError, match=r"data\.validation\.shards is .* there and .* here"):
        train(load_recipe(recipe, elsewhere))


def test_images_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    """Other shapes, other classes, and images that are trained on, also as a part of a merged index."""
    make_shards(tmp_path / "larger", 40, 1, size=14)
    images = np.zeros((20, 12, 12, 1), np.uint8)
    for name, classes in (("renamed", tuple("012345678X")), ("more", (*"0123456789", "ten"))):
        write_small(tmp_path / name, LabelledArrays(images, np.arange(20) % 10, "custom", classes))
    shutil.copytree(folder / "real", tmp_path / "all" / "real")
    make_shards(tmp_path / "all" / "other", 30, 9)
    merge([tmp_path / "all" / "real", tmp_path / "all" / "other"], tmp_path / "all" / "index.json")
    wrong = {
        tmp_path / "larger": r"images of shape \[14, 14, 1\], but .* has \[12, 12, 1\]",
        tmp_path / "renamed": r"class 9 is 'X' in data\.validation\.shards .* and '9' in data\.real\.shards",
        tmp_path / "more": "class 10 is 'ten' in .* and missing in",
        folder / "real": r"share 1 of 1 shards.* trained on cannot validate",
        folder / "generated": r"data\.generated\.shards .* share",
        tmp_path / "all": "share 1 of 2 shards",
        tmp_path / "typo": r"There are no shards of data\.validation\.shards at",
    }
    for path, words in wrong.items():
        with pytest.raises(UserError, match=words):
            train(load_recipe(folder / "apart.yaml", [f"data.validation.shards={path}", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_the_other_commands_know_the_validation_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation refuses them, report and card name them, and a release has no local path."""
    run, released = tmp_path / "run", tmp_path / "release"
    train(load_recipe(folder / "apart.yaml", [*SHORT, f"run_dir={run}"]))
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: evaluate_cli.main([str(run), "--data", str(folder / "checked"), "--attacks", "natural"]))
    assert end.value.code == 2
    assert "has the validation images that selected the checkpoint" in capsys.readouterr().err
    evaluate_cli.main([str(run), "--data", str(folder / "test"), "--attacks", "natural"])
    report_cli.main([str(run)])
    release_cli.main([str(run), "--to", str(released)])
    assert f"on 60 images of {folder.name}/checked, apart from the training data (clean labels)" in " ".join(
        (run / "report.html").read_text().split()
    )
    card = (released / "README.md").read_text()
    assert "accuracy on 60 images of `checked`, none of them trained on" in card
    assert "selected on images apart from the training images" in card
    assert str(folder) not in "".join(
        path.read_text() for path in released.rglob("*") if path.suffix in (".md", ".yaml", ".json")
    )
