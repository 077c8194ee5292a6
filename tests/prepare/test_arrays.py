"""Pairs of .npy files."""

import numpy as np
import pytest

from tests.support.preparation import assert_refused, holds, random_images

IMAGES, LABELS = random_images(40, num_classes=4)


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "fortran"])
@pytest.mark.parametrize(
    "labels", [LABELS, LABELS.astype(np.uint8), np.eye(4, dtype=np.int64)[LABELS], np.eye(4)[LABELS]]
)
def test_arrays_come_back(tmp_path, convert, layout, labels):
    """Both layouts, and labels as numbers or one-hot rows."""
    images = {"nhwc": IMAGES, "nchw": IMAGES.transpose(0, 3, 1, 2).copy(), "fortran": np.asfortranarray(IMAGES)}[layout]
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    shards = convert("arrays", tmp_path / "x.npy", tmp_path / "y.npy", "--classes", "a,b,c,d")
    assert holds(shards, IMAGES, LABELS) and shards.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES / 255, LABELS, ("float64", "255")),
        (IMAGES, LABELS[:-1], ("expected [40]",)),
        (IMAGES, LABELS + 1, ("--labels-start 1",)),
        (IMAGES, LABELS.astype(float), ("expected integers",)),
        (IMAGES, np.array([{}] * 40), ("nothing is ever unpickled",)),
        (IMAGES[0], LABELS, ("shape",)),
    ],
)
def test_mistakes_are_sentences(tmp_path, cli, images, labels, words):
    """Types, shapes, objects."""
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    assert_refused(cli, tmp_path, ["arrays", tmp_path / "x.npy", tmp_path / "y.npy"], *words)
