"""The Tiny ImageNet reader: exactly the published images, or one plain sentence."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.readers.tiny_imagenet import TINY_PER_CLASS
from tests.support.preparation import assert_refused, holds


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """tiny-imagenet-200 with one image for each class and split; the first one is grey."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    names = DATASETS["tiny_imagenet"].class_names
    generator = np.random.default_rng(0)
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(names)))
    lines = []
    for number, name in enumerate(reversed(names)):
        image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image = image.convert("L") if name == names[0] else image
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
        image.save(folder / "train" / name / "images" / f"{name}_0.JPEG", "JPEG")
        image.save(folder / "val" / "images" / f"val_{number}.JPEG", "JPEG", quality=60)
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def one_per_class(monkeypatch):
    for split in TINY_PER_CLASS:
        monkeypatch.setitem(TINY_PER_CLASS, split, 1)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_tiny_imagenet_comes_back_exactly(published, convert, one_per_class):
    """Classes by their sorted ids, in any order of wnids.txt; grey becomes RGB; val in the order of its list."""
    names = DATASETS["tiny_imagenet"].class_names
    train = convert("tiny_imagenet", published, "--split", "train")
    assert holds(
        train,
        np.stack([_pixels(published / "train" / name / "images" / f"{name}_0.JPEG") for name in names]),
        np.arange(200),
    )
    assert train.dataset == "tiny_imagenet" and train.class_names == names
    val = convert("tiny_imagenet", published.parent, "--split", "val")
    expected = np.stack([_pixels(published / "val" / "images" / f"val_{number}.JPEG") for number in range(200)])
    assert holds(val, expected, np.arange(200)[::-1])
    assert [file["name"][:24] for file in train.source_files] == ["wnids.txt", "tiny-imagenet-200/train "]
    assert train.source_files[1] != val.source_files[1]


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


FIRST = "n01443537"
TINY_MISTAKES = {
    "nothing there": (lambda d: shutil.rmtree(d), "val", "There is no list of classes"),
    "other classes": (lambda d: (d / "wnids.txt").write_text(f"{FIRST}\n"), "train", "does not list the 200 classes"),
    "classes damaged": (lambda d: (d / "wnids.txt").write_bytes(b"\xff\xfe"), "val", "damaged"),
    "no validation images": (lambda d: shutil.rmtree(d / "val"), "val", "There is no folder of validation images"),
    "no classes": (lambda d: (d / "wnids.txt").unlink(), "val", "There is no list of classes"),
    "list damaged": (lambda d: (d / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe"), "val", "damaged"),
    "class missing": (lambda d: shutil.rmtree(d / "train" / FIRST), "train", FIRST),
    "class too many": (lambda d: (d / "train" / "n00000000").mkdir(), "train", "n00000000"),
    "image lost": (lambda d: (d / "train" / FIRST / "images" / f"{FIRST}_0.JPEG").unlink(), "train", "0 images"),
    "odd file": (lambda d: (d / "train" / FIRST / "images" / "._a").touch(), "train", "nothing else belongs"),
    "image empty": (lambda d: (d / "train" / FIRST / "images" / f"{FIRST}_0.JPEG").write_bytes(b""), "train", "not a readable JPEG"),
    "a PNG": (lambda d: Image.new("RGB", (64, 64)).save(d / "val" / "images" / "val_0.JPEG", "PNG"), "val", "not a readable JPEG"),
    "too small": (lambda d: Image.new("RGB", (64, 63)).save(d / "val" / "images" / "val_0.JPEG"), "val", "64 x 63, expected 64 x 64"),
    "four colours": (lambda d: Image.new("CMYK", (64, 64)).save(d / "val" / "images" / "val_0.JPEG"), "val", "mode CMYK"),
    "validation image lost": (lambda d: (d / "val" / "images" / "val_7.JPEG").unlink(), "val", "Line 8"),
    "unknown class": (lambda d: _append(d / "val" / "val_annotations.txt", "val_0.JPEG\tn0\n"), "val", "Line 201"),
    "listed twice": (lambda d: _append(d / "val" / "val_annotations.txt", f"val_0.JPEG\t{FIRST}\n"), "val", "listed twice"),
    "not listed": (lambda d: (d / "val" / "images" / "val_x.JPEG").touch(), "val", "has no line"),
    "path in the list": (
        lambda d: _append(d / "val" / "val_annotations.txt", f"../../wnids.txt\t{FIRST}\n"), "val", "missing or listed twice",
    ),
    "list too large": (lambda d: os.truncate(d / "val" / "val_annotations.txt", 1 << 25), "val", "too many to be one"),
    "classes too large": (lambda d: os.truncate(d / "wnids.txt", 1 << 25), "train", "too many to be one"),
    "no list": (lambda d: (d / "val" / "val_annotations.txt").unlink(), "val", "There is no list of labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY_MISTAKES)
def test_tiny_imagenet_mistakes(published, tmp_path, cli, one_per_class, name):
    """Whatever is missing, unexpected or not as published is named."""
    damage, split, words = TINY_MISTAKES[name]
    shutil.copytree(published, tmp_path / "tiny")
    damage(tmp_path / "tiny")
    assert_refused(cli, tmp_path, ["tiny_imagenet", tmp_path / "tiny", "--split", split], words)


def test_published_numbers_of_images_are_expected(published, cli, tmp_path):
    """500 of each class: a folder with lost files is not converted."""
    assert_refused(cli, tmp_path, ["tiny_imagenet", published, "--split", "train"], "expected 500 as published")
