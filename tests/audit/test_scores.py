"""The quality of a label: Bayes' rule with the transition matrix, with as many suspects as wrong labels."""

import numpy as np
import pytest

from nrat_scale.audit.scores import LogOdds, Suspects, deconvolved, label_quality, smoothed

K = 6
NOISE = np.full((K, K), 0.3 / (K - 1)) + (0.7 - 0.3 / (K - 1)) * np.eye(K)


def _labels(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(true, given, exact probabilities of the true class, of the given label), of images of varying difficulty."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, K)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    true = (generator.random(n)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1)
    given = (generator.random(n)[:, None] > NOISE.cumsum(axis=1)[true]).sum(axis=1)
    return true, given, probabilities, probabilities @ NOISE


def test_deconvolution_approaches_the_probabilities_of_the_true_class():
    """It halves the distance at least, keeps probabilities, and changes nothing without noise."""
    _, _, exact, noisy = _labels(0, 2000)
    found = deconvolved(noisy, NOISE)
    assert abs(found - exact).mean() < 0.5 * abs(noisy - exact).mean()
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(deconvolved(exact, np.eye(K)), exact)


def test_quality_is_the_probability_that_the_label_is_right():
    """In each fifth of the qualities the share of right labels is within 0.1 of the mean: ten steps do not converge wholly."""
    true, given, _, noisy = _labels(1, 40_000)
    quality, suggested = label_quality(given, noisy, NOISE)
    for low in np.arange(0, 1, 0.2):
        here = (quality >= low) & (quality < low + 0.2)
        assert (true == given)[here].mean() == pytest.approx(quality[here].mean(), abs=0.1)
    np.testing.assert_array_equal(suggested == given, quality >= 0.5)


def test_shift_gives_the_estimated_rate():
    """With the shift as many labels are below one half as are estimated to be wrong, also of an unsure classifier."""
    true, given, _, noisy = _labels(2, 20_000)
    unsure = np.sqrt(noisy) / np.sqrt(noisy).sum(axis=1, keepdims=True)
    rate, odds = float((true != given).mean()), LogOdds()
    odds.add(label_quality(given, unsure, NOISE)[0])
    quality = label_quality(given, unsure, NOISE, odds.shift(rate))[0]
    assert (quality < 0.5).mean() == pytest.approx(rate, abs=2e-3)
    clean = label_quality(given, unsure, NOISE, odds.shift(1e-4))[0]
    assert (clean < 0.5).sum() <= 40


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4])
def test_no_wrong_label_is_impossible(rate):
    """Frequencies that were estimated as 0 are not taken for certain; rows stay probabilities with the largest share kept."""
    matrix = smoothed(np.eye(K), rate)
    assert (matrix > 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    assert (matrix.argmax(axis=1) == np.arange(K)).all()


def test_worst_suspects_over_chunks():
    """The twenty worst of each given label, whichever chunk they are in, by ascending quality."""
    generator, found = np.random.default_rng(0), Suspects(np.zeros(3, np.int64), [[], [], []])
    quality = generator.random(600).astype(np.float32)
    given = np.arange(600) % 3
    for start in range(0, 600, 100):
        rows = slice(start, start + 100)
        columns = {
            "ids": 1000 + np.arange(600)[rows],
            "given": given[rows],
            "suggested": (given[rows] + 1) % 3,
            "p_given": quality[rows],
            "p_suggested": quality[rows],
            "quality": quality[rows],
            "suspect": quality[rows] < 0.5,
        }
        found.add(columns, start)
    record = found.record()
    assert record["count"] == (quality < 0.5).sum() == sum(record["by_class"])
    for label in range(3):
        expected = sorted(np.flatnonzero(given == label), key=lambda row: quality[row])[:20]
        assert [entry["position"] for entry in record["worst"][str(label)]] == expected
        assert [entry["id"] for entry in record["worst"][str(label)]] == [1000 + row for row in expected]
