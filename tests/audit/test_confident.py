"""Our confident learning over chunks is cleanlab's over all images at once."""

import numpy as np
import pytest

from nrat_scale.audit.confident import Thresholds, confident_classes, confident_counts
from nrat_scale.audit.correction import calibrated_joint

count = pytest.importorskip("cleanlab.count")


@pytest.mark.parametrize("seed", range(4))
def test_same_as_cleanlab(seed):
    """Thresholds, confident joint and calibrated joint agree, with classes of other sizes and few confident images."""
    generator = np.random.default_rng(seed)
    n, num_classes = 3000, 6
    given = generator.choice(num_classes, n, p=[0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    logits = generator.normal(size=(n, num_classes))
    logits[np.arange(n), given] += generator.choice([0, 2], n)
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)

    thresholds = Thresholds(num_classes)
    for start in range(0, n, 700):
        thresholds.add(given[start : start + 700], probabilities[start : start + 700])
    np.testing.assert_allclose(thresholds.values(), count.get_confident_thresholds(given, probabilities), rtol=1e-6)

    ours = np.zeros((num_classes, num_classes), np.int64)
    for start in range(0, n, 700):
        rows = slice(start, start + 700)
        classes = confident_classes(probabilities[rows], thresholds.values())
        ours += confident_counts(given[rows], classes, num_classes)
    theirs = count.compute_confident_joint(given, probabilities, calibrate=False)
    clipped = ours.copy()
    np.fill_diagonal(clipped, np.maximum(clipped.diagonal(), 1))
    np.testing.assert_array_equal(clipped, theirs)

    joint = count.estimate_joint(given, probabilities, confident_joint=theirs)
    np.testing.assert_allclose(calibrated_joint(ours, np.bincount(given)), joint.T, atol=1e-3)  # cleanlab rounds counts
