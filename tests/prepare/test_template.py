"""`prepare template`: its recipes load, say what is known of the labels, and train."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from nrat_scale.core.run_folder import RunFolder
from nrat_scale.prepare.dataset import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from tests.support.accelerate import fresh_process  # noqa: F401  (autouse in this file)
from tests.support.small_shards import listing

Cli = Callable[..., SimpleNamespace]


def shards(folder: Path, n: int, shape: tuple[int, int, int], classes: list[str], seed: int = 0) -> Path:
    """`n` random images with each class in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return write_shards((images, np.arange(n) % len(classes)), folder, classes=classes)


def folder_of_images(cli: Cli, folder: Path) -> Path:
    """Shards of 64 x 64 RGB images, from a folder with one subfolder a class."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "a bird: wild"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(14):
            image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            image.save(folder / "pictures" / name / f"{number}.png")
    result = cli("folder", folder / "pictures", "--out", folder / "my pets" / "train")
    assert result.status == 0, result.err
    return folder / "my pets"


def digits(cli: Cli, folder: Path) -> Path:
    assert cli("digits", "--out", folder / "digits").status == 0
    return folder / "digits"


def grey(cli: Cli, folder: Path) -> Path:
    return shards(folder / "007", 60, (8, 8, 1), ["true", "${x}", "null"])


@pytest.mark.parametrize(
    ("make", "name", "model", "kind", "flip", "train_shards"),
    [
        (digits, "digits", "cnn4", "none", False, "digits/train"),
        (folder_of_images, "my-pets", "resnet18_cifar", "unknown", True, "my pets/train"),
        (grey, "007", "cnn4", "unknown", False, "007"),
    ],
)
def test_a_template_trains(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Cli, Path], Path], name: str, model: str, kind: str, flip: bool, train_shards: str,
) -> None:  # fmt: skip
    """Two steps of the unchanged recipe; the printed commands have the names that it gives."""
    monkeypatch.chdir(tmp_path)
    root = make(cli, tmp_path)
    result = cli("template", root, "--out", "mine.yaml")
    assert result.status == 0, result.err
    assert "accelerate launch -m nrat_scale.train mine.yaml" in result.out
    test = tmp_path / "digits" / "test" if name == "digits" else "TEST_SHARDS"
    assert f"evaluate runs/{name} --data {test} " in result.out
    recipe = load_recipe("mine.yaml")
    assert (recipe.run_dir, recipe.model.name, recipe.data.real.shards) == (
        f"runs/{name}", model, str(tmp_path / train_shards),
    )  # fmt: skip
    assert (recipe.data.real.noise.kind, recipe.data.augment.flip) == (kind, flip)
    assert recipe.threat.step * recipe.threat.num_steps > recipe.threat.eps
    short = ["train.max_steps=2", "threat.num_steps=1", "train.validation_attack=pgd1"]
    run = RunFolder(train(load_recipe("mine.yaml", short)))
    assert run.checkpoint(2).is_dir()


def test_further_shards(cli: Cli, tmp_path: Path) -> None:
    """Generated and validation images are in the recipe; a batch has no image twice."""
    names = ["a", "b", "c"]
    root, more, checked = (
        shards(tmp_path / name, n, (8, 8, 3), names, n) for name, n in (("x", 90), ("g", 10), ("v", 12))
    )
    out = tmp_path / "new" / "mine.yaml"
    result = cli("template", root, "--generated", more, "--validation", checked, "--out", out)
    assert result.status == 0, result.err
    data = load_recipe(out).data
    assert (data.generated.shards, data.validation.shards, data.validation.size) == (str(more), str(checked), 12)
    assert data.validation.labels == "given", "nobody has said that they are right"
    generated = data.batch_size * data.shares["generated"]
    assert 1 <= generated <= 10
    raw = yaml.safe_load(out.read_text())
    assert "prepare" not in raw["data"]["real"]


def test_what_cannot_be_done_is_said(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, status 2, and no file."""
    monkeypatch.chdir(tmp_path)
    names = ["a", "b", "c"]
    root = shards(tmp_path / "x", 60, (8, 8, 1), names)
    other = shards(tmp_path / "other", 30, (9, 9, 1), names)
    renamed = shards(tmp_path / "renamed", 30, (8, 8, 1), ["a", "b", "d"])
    images = np.zeros((100, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(100)
    rare = write_shards((images, np.arange(100) // 99), tmp_path / "rare")
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    (tmp_path / "there.yaml").write_text("mine")
    before = listing(tmp_path)
    for arguments, words in (
        ((root, "--out", "there.yaml"), "exists already and is never overwritten"),
        ((root, "--out", "recipe.txt"), "is not a .yaml file"),
        ((tmp_path / "typo",), "There are no shards of the training images"),
        (("pictures",), "python -m nrat_scale.prepare folder pictures --size 32"),
        ((root, "--generated", other), "Give fitting images"),
        ((root, "--validation", other), "Prepare both with the same size"),
        ((root, "--validation", renamed), "class 2 is 'd'"),
        ((root, "--validation", root), "trained on cannot validate"),
        ((rare,), "only 1 of 100 images of class '1'"),
    ):
        result = cli("template", *arguments)
        assert result.status == 2 and words in result.err and "Traceback" not in result.err, (arguments, result.err)
    assert listing(tmp_path) == before
    result = cli("template", rare, "--validation", shards(tmp_path / "v", 10, (8, 8, 1), ["0", "1"], 3))
    assert result.status == 0 and "recipe.yaml" in result.out
