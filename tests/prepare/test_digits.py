"""scikit-learn's digits: the real images enlarged, split by class and seed."""

import sys

import numpy as np
import pytest
from PIL import Image

from nrat_scale.data.shards import open_shards
from nrat_scale.prepare import __main__ as command_line
from nrat_scale.prepare.readers.digits import read_digits
from tests.support.preparation import assert_refused, holds


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as the quickstart prepares them."""
    out = tmp_path_factory.mktemp("digits") / "digits"
    command_line.main(["digits", "--out", str(out)])
    return out


def test_digits_are_the_real_ones_enlarged(digits):
    """Every image is scikit-learn's, each pixel as 2 x 2 equal ones; none is lost or duplicated."""
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    enlarged = np.stack(
        [
            np.asarray(Image.fromarray(np.float32(image * 255 / 16)).resize((16, 16), Image.Resampling.NEAREST))
            for image in grey.reshape(-1, 8, 8)
        ]
    )
    found = 0
    for name in ("train", "test"):
        shards = open_shards(digits / name)
        shards.verify()
        order, at = shards.in_source_order(), -1  # ascending original index
        for image, label in zip(shards.images(order)[..., 0], shards.labels(order), strict=True):
            at = next(i for i in range(at + 1, 1797) if np.abs(enlarged[i] - image).max() < 0.51)
            assert labels[at] == label
            found += 1
    assert found == 1797


def test_digits_are_split_by_class_and_by_seed(digits):
    """1,297 and 500, every class in proportion, the same split each time and another one for another seed."""
    train, test = (open_shards(digits / name) for name in ("train", "test"))
    assert (len(train), len(test), train.image_shape, train.dataset) == (1297, 500, (16, 16, 1), "digits")
    counts = np.array([train.class_counts, test.class_counts])
    share = counts.sum(0) * 500 / 1797
    assert np.abs(counts[1] - share).max() < 1
    rounded_up = counts[1] > share
    assert (share % 1)[rounded_up].min() >= (share % 1)[~rounded_up].max()
    (source,) = train.source_files
    assert train.source_files == test.source_files
    assert source["name"] == "sklearn.datasets.load_digits" and len(source["sha256"]) == 64
    again, other = read_digits("test", 0), read_digits("test", 1)
    assert holds(test, again.images, again.labels)
    assert not np.array_equal(again.images, other.images)


def test_digits_need_scikit_learn(tmp_path, cli, monkeypatch):
    """It is an optional dependency: without it, the message says what to install."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_refused(cli, tmp_path, ["digits"], "pip install scikit-learn")
