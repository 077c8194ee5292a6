"""Label noise: how many labels are wrong, to the last one, and CIFAR-100's two asymmetric maps."""

import numpy as np
import pytest

from nrat_scale.datasets import DATASETS
from nrat_scale.labels import corrupt, transition_matrix


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "asymmetric_released", "asymmetric_blocks"])
@pytest.mark.parametrize("n", [100, 500, 5000])
def test_counts_are_exact_decimal_products(kind, n):
    """57 % of 5,000 are 2,850, although 0.57 * 5000 is 2849.9999999999995 in floats; every rate in percent."""
    labels = np.full(n, 9)
    for percent in range(101):
        noisy = corrupt(labels, kind, percent / 100, 0, 10)
        assert (noisy != 9).sum() == percent * n // 100


@pytest.mark.parametrize(
    ("rate", "n", "expected"),
    [
        (0.57, 5000, 2850),
        (np.float64(0.57), 5000, 2850),
        (np.float32(0.57), 5000, 2850),  # prints as 0.57, and is 0.5699999928
        (0.1 + 0.2, 10, 3),
        (1 / 3, 3, 0),  # 0.3333333333333333 as a recipe would write it
        (1e-05, 100_000, 1),
        (0.0145, 2000, 29),  # 28.999999999999996
        (1, 7, 7),
    ],
)
def test_the_rate_is_the_decimal_number_that_it_prints_as(rate, n, expected):
    """Also of NumPy's floats, in scientific notation, with more than two decimals."""
    assert (corrupt(np.zeros(n, np.int64), "symmetric", rate, 0, 10) != 0).sum() == expected


def test_blocks_of_five_label_numbers():
    """CIFAR-100 as in the code of APL: i to i + 1 within 5 j .. 5 j + 4, the last to the first; not Patrini's map."""
    clean = np.tile(np.arange(100), 500)
    counts = transition_matrix(clean, corrupt(clean, "asymmetric_blocks", 0.4, 0, 100), 100)
    assert (np.diag(counts) == 300).all()
    for block in range(0, 100, 5):
        for i in range(5):
            assert counts[block + i, block + (i + 1) % 5] == 200
    patrini = corrupt(clean, "asymmetric", 0.4, 0, 100, class_map=DATASETS["cifar100"].asymmetric_map)
    moved = transition_matrix(clean, patrini, 100)[0].nonzero()[0].tolist()
    assert [DATASETS["cifar100"].class_names[label] for label in moved] == ["apple", "mushroom"]
