"""The shift between data and hold-out: none is not beyond chance, with any noise and class shares; a real one is."""

import numpy as np
import pytest

from nrat_scale.audit.shift import BINS, histogram, measure_shift

K = 4
SHARES = np.array([0.4, 0.3, 0.2, 0.1])


def _predictions(generator: np.random.Generator, true: np.ndarray, sureness: float) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, confidence) of a classifier whose confidence is around `sureness`."""
    confidence = np.clip(generator.beta(20 * sureness, 20 * (1 - sureness), len(true)), 0.26, 1)
    right = generator.random(len(true)) < confidence
    return np.where(right, true, (true + generator.integers(1, K, len(true))) % K), confidence


def _measured(seed: int, sureness: float) -> dict:
    generator = np.random.default_rng(seed)
    true = generator.choice(K, 8000, p=SHARES)
    clean = generator.integers(0, K, 4000)
    predicted, confidence = _predictions(generator, clean, 0.8)
    held_out = np.stack([histogram(predicted[clean == i], confidence[clean == i], K) for i in range(K)])
    ours, sure = _predictions(generator, true, sureness)
    means = float(sure.mean()), float(SHARES @ [confidence[clean == i].mean() for i in range(K)])
    return measure_shift(histogram(ours, sure, K), held_out, SHARES, means, seed)


def test_no_shift_is_within_chance():
    """With images of the same classes, at most a few of 20 draws are called a shift: the bound is a 95 % quantile."""
    found = [_measured(seed, 0.8) for seed in range(20)]
    assert sum(one["beyond_chance"] for one in found) <= 4
    assert abs(np.mean([one["confidence_difference"] for one in found])) < 0.005


@pytest.mark.parametrize("sureness", [0.7, 0.88])
def test_less_or_more_certain_predictions_are_a_shift(sureness):
    """Images that the classifier is less or more sure about differ beyond chance, by the difference in confidence."""
    found = _measured(0, sureness)
    assert found["beyond_chance"]
    assert found["distance"] > 2 * found["by_chance"]
    assert found["confidence_difference"] == pytest.approx(sureness - 0.8, abs=0.02)


def test_confidence_of_one_is_in_the_last_bin():
    """The bins cover [0, 1], both ends included."""
    counts = histogram(np.array([0, 1]), np.array([1.0, 0.0]), 2)
    assert counts[0, BINS - 1] == 1
    assert counts[1, 0] == 1


def test_counts_averaged_over_models_are_not_rounded():
    """With a few images of a class and several models, cells hold parts of an image: the same histogram is no shift."""
    generator = np.random.default_rng(0)
    held_out = generator.integers(0, 3, (K, K, BINS)) / 5
    shares = held_out.sum(axis=(1, 2)) / held_out.sum()
    data = np.rint(held_out.sum(axis=0) * 5000).astype(np.int64)
    assert measure_shift(data, held_out, shares, (0.8, 0.8), 0)["distance"] < 1e-6
