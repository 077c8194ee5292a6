"""What readers return: arrays that match, and class names for every label."""

from dataclasses import replace

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Concatenated
from tests.support.preparation import random_source


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
