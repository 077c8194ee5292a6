"""The noise rate without the classifier's own errors, by inverting its confusion on a clean hold-out.

Y* is an image's true class, Y its given label, P the class that the classifier predicts. Assumed are

    (1) P does not depend on Y given Y*: the classifier has not seen the label (it is out of sample), and which labels are
        wrong depends on the class alone (class-conditional noise);
    (2) an image of a class looks the same in the data and in the hold-out: P(P | Y*) is equal in both.

With Q[i, j] = P(Y* = i, Y = j), C[i, m] = P(P = m | Y* = i) and N[j, m] = P(Y = j, P = m), (1) and the law of total probability
give N = Q' C. The hold-out estimates C, the data N, and neither needs a model of the other: Q' = N C^-1. The rows of C sum to 1,
hence so do those of C^-1, and the estimate keeps the shares of the given labels exactly. The noise rate is 1 - trace(Q).

N is unbiased and enters linearly. C is unbiased and its inverse is not, with a bias of the order of 1 / (hold-out images of a
class), far below the interval's width. Nothing is clipped before the interval: with clean labels, the estimate scatters around 0.
With K folds, C is the mean of the folds' confusions weighted by their images: the folds are drawn at random.

The same inversion is the basis of label-shift correction (Lipton et al. 2018, "Detecting and correcting for label shift with
black box predictors") and of forward correction with a known transition matrix (Patrini et al. 2017).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nrat_scale.core.errors import quoted

REPLICATES = 1000


@dataclass(frozen=True)
class HoldOut:
    """What the classifiers predict on images whose labels are right."""

    true: np.ndarray  # int [n]
    predicted: np.ndarray  # int [n, F], by the classifier of each fold

    def accuracy(self, weights: np.ndarray) -> float:
        """The mean accuracy of the classifiers, weighted by `weights` [F]."""
        return float((self.predicted == self.true[:, None]).mean(axis=0) @ weights)


@dataclass(frozen=True)
class Estimate:
    """A joint distribution of true and given labels, with 95 % intervals."""

    joint: np.ndarray  # float [K, K]: true class by given label; sums to 1; entries of `corrected` may be below 0
    rate: float  # share of wrong labels, 1 - trace; of `corrected` it may be below 0
    interval: tuple[float, float]
    by_given: np.ndarray  # float [K]: share of the labels j that are wrong
    by_given_interval: np.ndarray  # float [K, 2]


@dataclass(frozen=True)
class Correction:
    """The corrected estimate, or why there is none."""

    estimate: Estimate | None
    reason: str | None  # None if identified
    condition: float | None  # condition number of the confusion; None without one
    smallest: float | None  # its smallest singular value, and the sampling error that it must exceed
    error: float | None


def correct(
    counts: np.ndarray, hold_out: HoldOut, names: tuple[str, ...], seed: int, replicates: int = REPLICATES
) -> Correction:
    """The joint distribution of true and given labels, without the classifier's errors.

    The interval is that of a percentile bootstrap that resamples data and hold-out together. The estimate is not identified
    if the hold-out lacks a class, or if the smallest singular value of C is within the sampling error of C (the 95 % quantile of
    its bootstrap deviation in the spectral norm): a singular confusion is then compatible with the hold-out.

    Args:
        counts: int [F, K, K]: images of each fold by given label and predicted class.
        hold_out: true and predicted classes.
        names: class names, for the reason.
    """
    num_classes = counts.shape[1]
    per_class = np.bincount(hold_out.true, minlength=num_classes)
    if (per_class < 2).any():
        first = int(np.flatnonzero(per_class < 2)[0])
        return Correction(
            None, f"the hold-out has {per_class[first]} images of {quoted(names[first])}", None, None, None
        )
    weights = counts.sum(axis=(1, 2)) / counts.sum()

    def resampled() -> Iterator[np.ndarray]:  # the same replicates again: they are not kept
        return _confusions(hold_out, weights, num_classes, np.random.default_rng([seed, 0]), replicates)

    confusion = next(resampled())
    singular = np.linalg.svd(confusion, compute_uv=False)
    condition = float(singular[0] / max(singular[-1], 1e-12))
    error = float(np.quantile([np.linalg.norm(one - confusion, 2) for one in islice(resampled(), 1, None)], 0.95))
    if singular[-1] <= error:
        reason = (
            f"the classifier confuses classes so much that the confusion on the hold-out may be singular (smallest singular "
            f"value {singular[-1]:.3f}, sampling error {error:.3f})"
        )
        return Correction(None, reason, condition, float(singular[-1]), error)
    observed = counts.sum(axis=0)
    tables = _tables(observed, np.random.default_rng([seed, 1]), replicates)
    pairs = zip(tables, islice(resampled(), 1, None), strict=True)
    joints = (_joint(table, one) for table, one in pairs)
    return Correction(_estimate(_joint(observed, confusion), joints), None, condition, float(singular[-1]), error)


def _joint(counts: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """Q [K, K] = (N C^-1)'."""
    return np.linalg.solve(confusion.T, counts.T / counts.sum())


def _confusions(
    hold_out: HoldOut, weights: np.ndarray, num_classes: int, generator: np.random.Generator, replicates: int
) -> Iterator[np.ndarray]:
    """C [K, K], then `replicates` of it, with the images of each class drawn again.

    Images with the same true class and the same predictions are exchangeable, so that a replicate is a multinomial draw of
    their counts, whatever the number of images is.
    """
    pattern = hold_out.true
    for column in hold_out.predicted.T:  # numbered again after each model, so that the numbers stay small
        pattern = np.unique(pattern * num_classes + column, return_inverse=True)[1].reshape(-1)
    _, rows, counts = np.unique(pattern, return_index=True, return_counts=True)
    true, predicted = hold_out.true[rows], hold_out.predicted[rows]
    votes = np.zeros((len(rows), num_classes))
    for fold, weight in enumerate(weights):
        votes[np.arange(len(rows)), predicted[:, fold]] += weight
    of_class = [np.flatnonzero(true == label) for label in range(num_classes)]
    sizes = [int(counts[here].sum()) for here in of_class]

    def confusion(drawn: list[np.ndarray]) -> np.ndarray:
        parts = zip(drawn, of_class, sizes, strict=True)
        return np.stack([number @ votes[here] / size for number, here, size in parts])

    yield confusion([counts[here] for here in of_class])
    for _ in range(replicates):
        parts = zip(of_class, sizes, strict=True)
        yield confusion([generator.multinomial(size, counts[here] / size) for here, size in parts])


def _tables(counts: np.ndarray, generator: np.random.Generator, replicates: int) -> Iterator[np.ndarray]:
    """`replicates` of the table `counts` [R, C], with its images drawn again."""
    cells = np.flatnonzero(counts)
    values = counts.reshape(-1)[cells]
    total = int(values.sum())
    for _ in range(replicates):
        table = np.zeros(counts.size, np.int64)
        table[cells] = generator.multinomial(total, values / total)
        yield table.reshape(counts.shape)


def plain_estimate(confident: np.ndarray, labels: np.ndarray, seed: int, replicates: int = REPLICATES) -> Estimate:
    """Confident learning's joint distribution, which includes the classifier's errors.

    The bootstrap holds the classes that the images are confidently in as they are: the thresholds are means over all labels
    of a class, and vary little.

    Args:
        confident: int [K, K]: images by given label and confident class (`confident.confident_counts`).
        labels: int [K]: all images by given label.
    """
    generator = np.random.default_rng([seed, 2])
    unsure = labels - confident.sum(axis=1)
    tables = _tables(np.column_stack([confident, unsure]), generator, replicates)
    joints = (calibrated_joint(table[:, :-1], table.sum(axis=1)) for table in tables)
    return _estimate(calibrated_joint(confident, labels), joints)


def calibrated_joint(confident: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Q [K, K], true class by given label: each row of the confident counts scaled to its labels (Northcutt et al. 2021, eq. 3).

    At least one image of each class counts as right, as in cleanlab.
    """
    counts = confident.astype(np.float64)
    np.fill_diagonal(counts, np.maximum(counts.diagonal(), 1))
    scaled = counts / counts.sum(axis=1, keepdims=True) * labels[:, None]
    return (scaled / scaled.sum()).T


def _estimate(joint: np.ndarray, replicates: Iterator[np.ndarray]) -> Estimate:
    def rates(one: np.ndarray) -> np.ndarray:
        """float [1 + K]: the noise rate, and that of each given label."""
        right, labels = one.diagonal(), one.sum(axis=0)
        by_given = 1 - np.divide(right, labels, out=np.ones_like(right), where=labels > 0)
        return np.concatenate([[1 - right.sum()], by_given])

    drawn = np.stack([rates(one) for one in replicates])
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    found = rates(joint)
    return Estimate(
        joint, float(found[0]), (float(low[0]), float(high[0])), found[1:], np.column_stack([low, high])[1:]
    )


def transition(joint: np.ndarray) -> np.ndarray:
    """T [K, K], T[i, j] = P(given j | true i), as probabilities: what is below 0 in a joint distribution becomes 0."""
    clipped = np.maximum(joint, 0)
    shares = clipped.sum(axis=1, keepdims=True)
    return np.where(shares > 0, clipped / np.where(shares > 0, shares, 1), np.eye(len(joint)))
