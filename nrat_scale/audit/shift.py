"""How far the audited images differ from the hold-out, as far as the classifier can tell.

If the images of each class look alike in both, the hold-out's classes in the shares that the correction estimates reproduce the
data's histogram of (predicted class, confidence). The shares are fitted to the predicted classes, so that the confidences are
free to contradict. Label noise changes no image and cancels.
"""

from typing import Any

import numpy as np

BINS = 10  # of confidence, the highest probability
_REPLICATES = 200


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """int64 [n] in [0, BINS): the bin of each confidence in [0, 1]."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def histogram(predicted: np.ndarray, confidence: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, BINS]: images by predicted class and confidence."""
    cells = np.bincount(predicted * BINS + confidence_bins(confidence), minlength=num_classes * BINS)
    return np.asarray(cells.reshape(num_classes, BINS))


def measure_shift(
    data: np.ndarray, hold_out: np.ndarray, shares: np.ndarray, confidences: tuple[float, float], seed: int
) -> dict[str, Any]:
    """The distance of the data from the hold-out, and what chance alone gives.

    Args:
        data: int [K, BINS], `histogram` of the data.
        hold_out: float [K, K, BINS], those of the hold-out by true class, averaged over the models.
        shares: float [K], estimated shares of the true classes in the data.
        confidences: the mean confidence on the data, and on the hold-out with these shares.

    Returns:
        `distance`: total variation, in [0, 1]; `by_chance`: its 95 % quantile without a shift; `beyond_chance`;
        `confidence_difference`: mean confidence on the data minus that on the hold-out, an estimate of how much more or less
        accurate the classifier is there (Guillory et al. 2021). By about as much the corrected rate is too low or too high.
    """
    shares = np.maximum(shares, 0) / np.maximum(shares, 0).sum()
    by_class = hold_out.reshape(len(hold_out), -1)
    sizes = np.rint(by_class.sum(axis=1)).astype(np.int64)
    by_class = by_class / np.maximum(by_class.sum(axis=1, keepdims=True), 1e-12)
    expected = shares @ by_class
    total = int(data.sum())
    distance = _variation(data.reshape(-1) / total, expected)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(_REPLICATES):
        pairs = zip(sizes.tolist(), by_class, strict=True)
        again = np.stack([generator.multinomial(size, row) / max(size, 1) if size else row for size, row in pairs])
        drawn.append(_variation(generator.multinomial(total, expected / expected.sum()) / total, shares @ again))
    chance = float(np.quantile(drawn, 0.95))
    return {
        "distance": distance,
        "by_chance": chance,
        "beyond_chance": distance > chance,
        "confidence_data": confidences[0],
        "confidence_holdout": confidences[1],
        "confidence_difference": confidences[0] - confidences[1],
    }


def _variation(one: np.ndarray, other: np.ndarray) -> float:
    return float(abs(one - other).sum() / 2)
