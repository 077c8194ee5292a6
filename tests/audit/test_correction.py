"""The corrected estimate recovers known noise, its interval covers it, and what is not identified is said."""

import numpy as np
import pytest

from nrat_scale.audit.correction import HoldOut, correct, plain_estimate, transition

K = 5
NAMES = tuple("abcde")
SHARES = np.array([0.1, 0.3, 0.2, 0.25, 0.15])


def _confusion(accuracy: float, pair: float = 0.0) -> np.ndarray:
    """P(predicted | true): errors spread evenly, and `pair` more of classes 0 and 1 for each other."""
    matrix = np.full((K, K), (1 - accuracy) / (K - 1))
    np.fill_diagonal(matrix, accuracy)
    matrix[0, 0] -= pair
    matrix[1, 1] -= pair
    matrix[0, 1] += pair
    matrix[1, 0] += pair
    return matrix


def _symmetric(rate: float) -> np.ndarray:
    matrix = np.full((K, K), rate / (K - 1))
    np.fill_diagonal(matrix, 1 - rate)
    return matrix


def _asymmetric(rate: float) -> np.ndarray:
    return (1 - rate) * np.eye(K) + rate * np.roll(np.eye(K), 1, axis=1)


def _draw(generator: np.random.Generator, rows: np.ndarray, true: np.ndarray) -> np.ndarray:
    """One class for each of `true`, by its row of probabilities."""
    return (generator.random(len(true))[:, None] > rows.cumsum(axis=1)[true]).sum(axis=1)


def _simulated(seed: int, noise: np.ndarray, confusions: list[np.ndarray], n: int, held_out: int):
    """(counts [F, K, K], hold-out, realised noise rate) of a simulated audit."""
    generator = np.random.default_rng(seed)
    true, fold = generator.choice(K, n, p=SHARES), generator.integers(0, len(confusions), n)
    given = _draw(generator, noise, true)
    counts = np.zeros((len(confusions), K, K), np.int64)
    for number, confusion in enumerate(confusions):
        here = fold == number
        np.add.at(counts[number], (given[here], _draw(generator, confusion, true[here])), 1)
    clean = generator.integers(
        0, K, held_out
    )  # other shares than the data: only the classes themselves must look alike
    predicted = np.column_stack([_draw(generator, confusion, clean) for confusion in confusions])
    return counts, HoldOut(clean, predicted), float((given != true).mean())


def test_exact_counts_give_back_the_transition_matrix():
    """With expected counts instead of samples, the inversion is exact, whatever the classifier's errors."""
    confusion, noise = _confusion(0.8, pair=0.15), _asymmetric(0.3)
    counts = np.rint(2e7 * ((SHARES[:, None] * noise).T @ confusion)).astype(np.int64)
    per_class = np.rint(1e5 * confusion).astype(np.int64)
    true, predicted = np.repeat(np.indices((K, K)).reshape(2, -1), per_class.reshape(-1), axis=1)
    found = correct(counts[None], HoldOut(true, predicted[:, None]), NAMES, 0, 100)
    assert found.estimate is not None
    assert found.estimate.rate == pytest.approx(0.3, abs=1e-5)
    np.testing.assert_allclose(found.estimate.joint, SHARES[:, None] * noise, atol=1e-5)
    np.testing.assert_allclose(transition(found.estimate.joint), noise, atol=1e-4)
    by_given = 1 - (SHARES * 0.7) / (SHARES @ noise)
    np.testing.assert_allclose(found.estimate.by_given, by_given, atol=1e-4)


@pytest.mark.parametrize(
    "noise",
    [np.eye(K), _symmetric(0.05), _symmetric(0.2), _symmetric(0.4), _asymmetric(0.4)],
    ids=("none", "symmetric 0.05", "symmetric 0.2", "symmetric 0.4", "asymmetric 0.4"),
)
def test_unbiased_and_covered(noise):
    """Over 25 draws the mean error is below half a point, and at least nine in ten intervals hold the truth."""
    errors, covered = [], 0
    for seed in range(25):
        confusions = [_confusion(0.85, 0.1), _confusion(0.8)]
        counts, hold_out, truth = _simulated(seed, noise, confusions, 6000, 3000)
        found = correct(counts, hold_out, NAMES, seed, 100).estimate
        assert found is not None
        errors.append(found.rate - truth)
        covered += found.interval[0] <= truth <= found.interval[1]
    assert abs(np.mean(errors)) < 0.005, np.mean(errors)
    assert np.std(errors) < 0.02
    assert covered >= 22


def test_interval_includes_the_hold_out():
    """A smaller hold-out widens the interval, although the data are the same."""
    confusions = [_confusion(0.8)]
    widths = []
    for held_out in (300, 30_000):
        counts, hold_out, _ = _simulated(0, _symmetric(0.2), confusions, 50_000, held_out)
        low, high = correct(counts, hold_out, NAMES, 0, 300).estimate.interval
        widths.append(high - low)
    assert widths[0] > 3 * widths[1]


def test_classifier_that_confuses_two_classes_is_not_identified():
    """A classifier that cannot tell two classes apart says nothing about labels exchanged between them."""
    confusion = _confusion(0.9)
    confusion[0] = confusion[1] = (confusion[0] + confusion[1]) / 2
    counts, hold_out, _ = _simulated(0, _symmetric(0.2), [confusion], 20_000, 10_000)
    found = correct(counts, hold_out, NAMES, 0, 200)
    assert found.estimate is None
    assert "may be singular" in found.reason
    assert found.smallest <= found.error


def test_hold_out_without_a_class_is_not_identified():
    """The confusion of a class that the hold-out lacks is unknown; the reason names the class."""
    counts, hold_out, _ = _simulated(0, _symmetric(0.2), [_confusion(0.9)], 2000, 2000)
    kept = hold_out.true != 3
    found = correct(counts, HoldOut(hold_out.true[kept], hold_out.predicted[kept]), NAMES, 0, 100)
    assert found.estimate is None
    assert "'d'" in found.reason


def test_dependence_on_the_label_would_bias():
    """What the assumption excludes: a classifier that has learnt the wrong labels hides them."""
    generator = np.random.default_rng(0)
    true = generator.integers(0, K, 20_000)
    given = _draw(generator, _symmetric(0.4), true)
    memorised = np.where(generator.random(len(true)) < 0.5, given, _draw(generator, _confusion(0.9), true))
    counts = np.zeros((1, K, K), np.int64)
    np.add.at(counts[0], (given, memorised), 1)
    clean = generator.integers(0, K, 10_000)
    hold_out = HoldOut(clean, _draw(generator, _confusion(0.9), clean)[:, None])
    assert correct(counts, hold_out, NAMES, 0, 100).estimate.rate < 0.3


def test_plain_estimate_counts_the_errors_of_the_classifier():
    """Confident learning's rate of clean labels is that of the classifier's confident errors, not zero."""
    confident = np.rint(1000 * _confusion(0.9)).astype(np.int64)
    found = plain_estimate(confident, confident.sum(axis=1) + 100, 0, 200)
    assert found.rate == pytest.approx(0.1, abs=1e-3)
    assert found.interval[0] < 0.1 < found.interval[1]
    assert found.joint.sum() == pytest.approx(1)
