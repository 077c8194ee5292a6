"""Confident learning (Northcutt et al. 2021) over chunks of probabilities, as cleanlab computes it over all at once."""

import numpy as np


class Thresholds:
    """The mean probability of each class over the images that have its label (eq. 2), summed chunk by chunk."""

    def __init__(self, num_classes: int) -> None:
        self.labels = np.zeros(num_classes, np.int64)  # images by given label
        self._sums = np.zeros(num_classes)

    def add(self, given: np.ndarray, probabilities: np.ndarray) -> None:
        """Add images: labels int [n], probabilities float [n, K]."""
        num_classes = len(self.labels)
        own = probabilities[np.arange(len(given)), given].astype(np.float64)
        self._sums += np.bincount(given, own, num_classes)
        self.labels += np.bincount(given, minlength=num_classes)

    def values(self) -> np.ndarray:
        """float [K]; 2, which no probability reaches, for a class without labels."""
        return np.where(self.labels > 0, self._sums / np.maximum(self.labels, 1), 2.0)


def confident_classes(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """int [n]: the most probable of the classes whose threshold an image reaches; -1 if it reaches none."""
    above = probabilities >= thresholds - 1e-6
    # cleanlab takes the most probable class of all if several are reached, which can be one that is not.
    several = above.sum(axis=1) > 1
    best = np.where(several, probabilities.argmax(axis=1), above.argmax(axis=1))
    return np.where(above.any(axis=1), best, -1)


def confident_counts(given: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """int [K, K]: images by given label and confident class, without those that are in none."""
    sure = classes >= 0
    cells = np.bincount(given[sure] * num_classes + classes[sure], minlength=num_classes**2)
    return np.asarray(cells.reshape(num_classes, num_classes))
