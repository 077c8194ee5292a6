"""What readers return: arrays that match, and class names for every label."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Concatenated
from tests.support.preparation import assert_refused, encoded, random_source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.zeros((70, 8, 6), np.uint8)}, r"\[N, H, W, C\]"),
        ({"images": np.zeros((70, 8, 6, 4), np.uint8)}, "1 or 3 channels"),
        ({"images": np.zeros((0, 8, 6, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "N > 0"),
        ({"images": np.zeros((69, 8, 6, 3), np.uint8)}, "69 images but 70 labels"),
        ({"class_names": ("only", "two")}, "--dataset"),
        ({"labels": np.full(70, -1)}, "-1"),
    ],
)
def test_images_labels_and_classes_must_match(change, words):
    """Shapes, lengths and labels are checked before anything is written."""
    with pytest.raises(UserError, match=words):
        replace(random_source(), **change)


def test_concatenated_arrays_read_as_one():
    """Any rows, in any order and repeated, as numpy would give them."""
    parts = [random_source(n, seed=n).images for n in (3, 1, 5)]
    whole, rows = np.concatenate(parts), np.array([8, 0, 3, 3, 2, 4])
    assert Concatenated(parts).shape == whole.shape
    assert np.array_equal(Concatenated(parts)[rows], whole[rows])


# ---- class numbers ----------------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)


def _npz(folder, labels):
    np.savez(folder / "in.npz", image=IMAGES, label=labels)
    return ["npz", folder / "in.npz"]


def _idx(folder, labels):
    (folder / "images").write_bytes(struct.pack(">4I", 0x803, *IMAGES.shape) + IMAGES.tobytes())
    (folder / "labels").write_bytes(struct.pack(">2I", 0x801, len(labels)) + bytes(labels.tolist()))
    return ["idx", folder / "images", folder / "labels"]


def _tar(folder, labels):
    with webdataset.TarWriter(str(folder / "in.tar")) as writer:
        for number, (image, label) in enumerate(zip(IMAGES, labels, strict=True)):
            writer.write({"__key__": f"{number:04d}", "png": encoded(image, "PNG"), "cls": str(label)})
    return ["reshard", folder / "in.tar"]


READERS = pytest.mark.parametrize("write", [_npz, _idx, _tar])


@READERS
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(12) % 4 + 1, ("the label 0,", "--labels-start 1", "--classes")),
        (np.arange(12) % 3 * 2, ("the labels 1, 3,", "without gaps", "--classes")),
        (np.arange(12) % 2 + 7, ("labels 0, 1, 2, 3, 4, ...", "without gaps")),
        (np.where(np.arange(12) == 5, 200, 0), ("labels 1, 2, 3, 4, 5, ...", "go up to 200")),
    ],
)
def test_a_gap_in_the_labels_is_refused(tmp_path, cli, write, labels, words):
    """Labels 1..K must not become K + 1 classes, the first of which label noise would fill."""
    assert_refused(cli, tmp_path, write(tmp_path, labels), *words)


@READERS
def test_labels_from_one(tmp_path, convert, write):
    """`--labels-start 1` gives labels 0..K-1, and keeps the numbers as names."""
    shards = convert(*write(tmp_path, np.arange(12) % 4 + 1), "--labels-start", 1)
    assert np.array_equal(shards.labels(shards.in_source_order()), np.arange(12) % 4)
    assert shards.class_names == ("1", "2", "3", "4")


@READERS
def test_named_classes(tmp_path, convert, cli, write):
    """`--classes` names all classes; one without images is kept, with a warning."""
    arguments = write(tmp_path, np.arange(12) % 2 * 2 + 1)
    options = ("--labels-start", 1, "--classes", "cat, dog,bird")
    shards = convert(*arguments, *options)
    assert shards.class_names == ("cat", "dog", "bird") and list(shards.class_counts) == [6, 0, 6]
    result = cli(*arguments, *options, "--out", tmp_path / "again")
    assert result.status == 0 and "warning: No image has the label 2 (class 'dog')" in result.err


@READERS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--classes", "a,b,c"), ("--labels-start 1",)),
        (("--classes", "a,b", "--labels-start", 1), ("expected",)),
        (("--classes", "a,b,a"), ("'a' twice",)),
        (("--classes", "a,,b"), ("empty",)),
        (("--classes", "a,b,c", "--dataset", "mnist"), ("Omit one",)),
        (("--labels-start", 2), ("--labels-start is 2", "Give 1")),
        (("--labels-start", -1), ("No image has the label",)),
    ],
)
def test_class_options_that_do_not_fit(tmp_path, cli, write, options, words):
    """Names and start must fit the labels 1..3 of the file."""
    if write is _tar and options == ("--labels-start", 2):
        words = ("is 1, expected a class number in 2..",)
    assert_refused(cli, tmp_path, [*write(tmp_path, np.arange(12) % 3 + 1), *options], *words)


def test_one_hot_labels_state_the_number_of_classes(tmp_path, cli):
    """A column without images is a gap, not a class fewer."""
    assert_refused(cli, tmp_path, _npz(tmp_path, np.eye(5, dtype=int)[np.arange(12) % 4]), "the label 4,")
