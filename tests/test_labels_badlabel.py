"""BadLabel against a second implementation in the order of its authors' code; unusable scores are sentences."""

import re
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.label_files import load_scores
from nrat_scale.labels import NoiseSpec, corrupt


def _scores(n: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clean labels and the scores of 30 epochs of a model that mostly knows them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, n)
    scores = np.eye(num_classes)[labels]
    for _ in range(30):
        logits = generator.standard_normal((n, num_classes)) * 2 + 3 * np.eye(num_classes)[labels]
        scores += 0.1 * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    return labels, scores


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.57, 1.0])
def test_against_the_authors_order(rate: float) -> None:
    """One image after the other: the candidate of the smallest softmax score first, until the budget is spent."""
    labels, scores = _scores(200, 6, 0)
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    candidates = []
    for row, label in zip(softmax, labels, strict=True):
        smallest, second = sorted(range(6), key=lambda k, row=row: row[k])[:2]
        candidates.append(second if label == smallest else smallest)
    expected = labels.copy()
    for image in sorted(range(200), key=lambda i: softmax[i, candidates[i]])[: round(200 * rate)]:
        expected[image] = candidates[image]
    found = corrupt(labels, "badlabel", rate, 0, 6, scores=scores)
    np.testing.assert_array_equal(found, expected)
    assert (found != labels).sum() == round(200 * rate)


def test_scores_that_underflow_keep_their_order() -> None:
    """exp(-800) is 0 in float64, but the image with the lower score is still the first."""
    scores = np.array([[0.0, -800.0, -10.0], [0.0, -900.0, -10.0]])
    np.testing.assert_array_equal(corrupt(np.array([0, 0]), "badlabel", 0.5, 0, 3, scores=scores), [0, 1])


def test_unusable_scores_are_sentences(tmp_path: Path) -> None:
    """Without a file, for another kind, of another shape or kind of file, or not finite."""
    with pytest.raises(UserError, match=r"badlabel needs data\.real\.noise\.scores: label_scores\.npy of a run with"):
        NoiseSpec("badlabel", 0.2)
    with pytest.raises(UserError, match=r"scores is for the kind badlabel, and data\.real\.noise\.kind is 'symmetric'"):
        NoiseSpec("symmetric", 0.2, scores="z.npy")
    labels, scores = _scores(20, 4, 1)
    with pytest.raises(UserError, match=re.escape("data.real.noise.scores has the shape [20, 3], expected [20, 4].")):
        corrupt(labels, "badlabel", 0.2, 0, 4, scores=scores[:, :3])
    with pytest.raises(UserError, match="needs data"):
        corrupt(labels, "badlabel", 0.2, 0, 4)
    path = tmp_path / "z.npy"
    with pytest.raises(UserError, match=r"There is no file of scores at .*z\.npy \(data\.real\.noise\.scores\)"):
        load_scores(str(path))
    for content in (b"", b"text", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"z\.npy is no \.npy matrix of floats"):
            load_scores(str(path))
    for array in (np.zeros(3), np.zeros((2, 2), np.int64), np.array([[None]], object)):
        np.save(path, array)
        with pytest.raises(UserError, match=r"z\.npy is no \.npy matrix of floats"):
            load_scores(str(path))
    np.savez(tmp_path / "z.npz", scores)
    with pytest.raises(UserError, match=r"z\.npz is no \.npy matrix of floats"):
        load_scores(str(tmp_path / "z.npz"))
    np.save(path, np.array([[0.0, np.nan]]))
    with pytest.raises(UserError, match="not all are finite"):
        load_scores(str(path))
    np.save(path, scores.astype(np.float32))
    np.testing.assert_allclose(load_scores(str(path)), scores, rtol=1e-6)
