"""Read scikit-learn's handwritten digits, split into training and test images and enlarged."""

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import manifest_entry
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.prepare.input import Classes, LabelledArrays

_NUM_TEST = 500


def read_digits(split: str, seed: int) -> LabelledArrays:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey values 0..16) as uint8 [n, 16, 16, 1].

    Args:
        split: "train" (1,297) or "test" (500), stratified by class, in scikit-learn's order.
        seed: of the split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    grey, labels = load_digits(return_X_y=True)
    grey = np.ascontiguousarray(grey.reshape(-1, 8, 8), dtype="<f8")
    labels = np.ascontiguousarray(labels, dtype="<i8")
    facts = {"name": "sklearn.datasets.load_digits", **manifest_entry(grey.tobytes() + labels.tobytes())}
    rows = np.flatnonzero(_is_test(labels, seed) == (split == "test"))
    # Each pixel becomes 2 x 2 equal ones, which is exact and keeps the contrast that interpolation would lower.
    images = np.rint(grey[rows] * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    return LabelledArrays.of(images[..., None], labels[rows], Classes("digits"), [facts])


def _is_test(labels: np.ndarray, seed: int) -> np.ndarray:
    """bool [N], `_NUM_TEST` of them True: each class in proportion; the largest remainders are rounded up."""
    rank = hash64(derive(seed, "digits test split"), np.arange(len(labels)))
    share = np.bincount(labels) * _NUM_TEST / len(labels)
    take = np.floor(share).astype(np.int64)
    take[np.argsort(take - share, kind="stable")[: _NUM_TEST - take.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for label, count in enumerate(take):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(rank[members], kind="stable")[:count]]] = True
    return chosen
