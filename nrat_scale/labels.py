"""Label noise: a pure function of (clean labels, kind, rate, seed). `NOISES` lists the kinds.

Noise is drawn over a whole data set in *source order*, before any split, so that it depends neither on the permutation of
the shards nor on the held-out images. Every draw is a hash of (seed, image number), independent of generator state and
library versions, except that `instance_dependent` takes normal variates from NumPy.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Self

import numpy as np

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.core.seeds import derive, hash64, uniform01
from nrat_scale.datasets import CIFAR10_MAP, DATASETS, blocks_map
from nrat_scale.label_files import CIFAR10N, HUMAN_SETS, NO_SCORES
from nrat_scale.transition import checked_matrix, load_matrix

REAL_KEY, GENERATED_KEY = "data.real.noise", "data.generated.noise"  # of the recipe
MATRIX = "matrix"  # the kind with a given transition matrix
NONE, UNKNOWN, UNSET = "none", "unknown", "auto"  # kinds that inject nothing: labels as they are stored
BEFORE_AUDIT = "before_audit"  # key of a description whose labels an audit has changed: the counts before that
BEFORE = "labels_before_injection"  # key of a description of label noise; absent if those labels are clean


@dataclass(frozen=True)
class NoiseSpec:
    """Label noise of one source of training images, by default the real one.

    `none` says that the stored labels are right, `unknown` that nobody knows. `auto`, the default, becomes one of the two
    when a run starts (`settled`), and the run's recipe.yaml has the result.

    Raises:
        UserError: a value is unknown, out of range, or contradicts another.
    """

    KEY = REAL_KEY  # the section of the recipe, for messages; not a field

    # A kind of noise to inject (docs/data.md lists them); `none`: the stored labels are clean; `unknown`: nobody knows whether
    # they are; `auto`: `none` for real images of cifar10, cifar100, svhn, tiny_imagenet, mnist, fashion_mnist and digits,
    # `unknown` for all others.
    kind: str = UNSET
    rate: float = 0.0  # fraction of labels to corrupt, in [0, 1]; not used by `cifar10n` and `matrix`
    seed: int = 0  # of the noise alone, so that runs with different training seeds can share one noise
    class_map: dict[int, int] | None = None  # of the asymmetric kinds; by default the published map of the data set
    human_labels: str | None = None  # of `cifar10n`: the .npz of `nrat_scale.prepare cifar10n`, or an .npy of int64 [n]
    human_set: str = "worse"  # key of `HUMAN_SETS`, the labels of the .npz to use; an .npy file has only one set
    # Of `matrix`: for each class a row with the probabilities of its labels, which sum to 1; nested lists, or the path of a
    # JSON file with them or of a CSV file.
    matrix: Any = None
    scores: str | None = None  # of `badlabel`: the label_scores.npy of a run with `objective.refine.kind: scores`

    def __post_init__(self) -> None:
        key = self.KEY
        check_choice(f"{key}.kind", self.kind, (*NOISES, UNKNOWN, UNSET))
        check_choice(f"{key}.human_set", self.human_set, HUMAN_SETS)
        check_value(f"{key}.rate", self.rate, 0.0 <= self.rate <= 1.0, "a fraction of the labels, in [0, 1]")
        if not self.injects and self.rate:
            raise UserError(
                f"{key}.rate is {self.rate} but {key}.kind is '{self.kind}'. Name a kind, such as symmetric."
            )
        if self.kind == "cifar10n" and self.human_labels is None:
            raise UserError(_no_human_labels(key))
        if self.kind == "asymmetric_blocks" and self.class_map:
            raise UserError(_own_map(key))
        if self.kind == "badlabel" and self.scores is None:
            raise UserError(NO_SCORES.format(key))
        if self.kind != "badlabel" and self.scores is not None:
            raise UserError(
                f"{key}.scores is for the kind badlabel, and {key}.kind is '{self.kind}'. Remove one of them."
            )
        self._check_matrix()

    def _check_matrix(self) -> None:
        key = self.KEY
        if (self.kind == MATRIX) != (self.matrix is not None):
            if self.kind == MATRIX:
                raise UserError(_no_matrix(key))
            raise UserError(f"{key}.matrix is set but {key}.kind is '{self.kind}'. Set the kind to {MATRIX}.")
        if self.kind == MATRIX and self.rate:
            raise UserError(
                f"{key}.rate is {self.rate}, but the matrix states how many labels change. Remove the rate."
            )
        if self.matrix is not None and not isinstance(self.matrix, str):
            checked_matrix(self.matrix, f"{key}.matrix")

    @property
    def injects(self) -> bool:
        """Whether labels are changed."""
        return self.kind not in (NONE, UNKNOWN, UNSET)

    def known_before(self, dataset: str) -> bool:
        """Whether the labels are known to be clean before any injection; `dataset` is the name in the shards."""
        return self.kind == NONE or (self.kind != UNKNOWN and dataset in DATASETS)

    def settled(self, dataset: str | None) -> Self:
        """With `none` or `unknown` instead of `auto`; `dataset` is None if the source has no images."""
        kind = NONE if dataset is None or self.known_before(dataset) else UNKNOWN
        return replace(self, kind=kind) if self.kind == UNSET else self


@dataclass(frozen=True)
class GeneratedNoiseSpec(NoiseSpec):
    """Label noise of the generated images.

    Nobody has looked at generated images, so that the labels that they were generated for are never known to be clean:
    `auto` is `unknown`, and a stored `none` means the same.
    """

    KEY = GENERATED_KEY

    def known_before(self, dataset: str) -> bool:
        """False: see the class."""
        return False


def _no_human_labels(key: str) -> str:
    return f"Label noise 'cifar10n' needs {key}.human_labels: {CIFAR10N}, or an .npy file."


def _no_matrix(key: str) -> str:
    return f"Label noise '{MATRIX}' needs {key}.matrix: a row of probabilities for each class, or a JSON or CSV file."


def _own_map(key: str) -> str:
    return f"Label noise 'asymmetric_blocks' has its own class map. Use asymmetric with {key}.class_map."


def corrupt(
    labels: np.ndarray,
    kind: str,
    rate: float,
    seed: int,
    num_classes: int,
    *,
    class_map: dict[int, int] | None = None,
    images: np.ndarray | None = None,
    human_labels: np.ndarray | None = None,
    matrix: Any = None,
    scores: np.ndarray | None = None,
    key: str = REAL_KEY,
) -> np.ndarray:
    """Noisy labels for the clean `labels`.

    Args:
        labels: int [n], clean, in source order, each in [0, num_classes).
        kind: key of `NOISES` (section 8 of docs/objectives.md).
        rate: fraction in [0, 1].
        seed: of the draws.
        num_classes: K.
        class_map: source label -> target label of the asymmetric kinds; by default, if K = 10, CIFAR-10's published map.
        images: uint8 [n, ...], needed by `instance_dependent` only.
        human_labels: int [n], needed by `cifar10n` only.
        matrix: of `matrix` only: [K, K] probabilities by class and label, or the path of a file.
        scores: float [n, K], needed by `badlabel` only.
        key: the section of the recipe that messages name.

    Returns:
        int64 [n], a new array.

    Raises:
        UserError: unknown kind, rate outside [0, 1], labels out of range, a missing or unusable extra argument.
    """
    labels = _checked(labels, num_classes, "labels")
    check_choice("The kind of label noise", kind, NOISES)
    check_value("The label noise rate", rate, 0.0 <= rate <= 1.0, "a fraction of the labels, in [0, 1]")
    # At rate 0 the truncated normal of instance_dependent would still flip labels.
    if rate == 0.0 and kind not in ("cifar10n", MATRIX):
        return labels
    if num_classes < 2:
        raise UserError(f"Label noise needs at least 2 classes, not {num_classes}.")
    extra = {"class_map": class_map, "images": images, "human_labels": human_labels, "matrix": matrix, "scores": scores}
    return NOISES[kind](labels, rate=rate, seed=seed, num_classes=num_classes, key=key, **extra)


def _checked(labels: np.ndarray, num_classes: int, what: str) -> np.ndarray:
    """A copy as int64, if the labels are integers [n] in [0, num_classes)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"The {what} must be integers of shape [n], not {labels.dtype} of shape {list(labels.shape)}.")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        found = f"The {what} range from {labels.min()} to {labels.max()}"
        raise UserError(f"{found}, but with {num_classes} classes they must be in 0..{num_classes - 1}.")
    return labels.astype(np.int64)


def num_flipped(rate: float, n: int) -> int:
    """The floor of `rate * n` of the decimal number that `rate` prints as: 0.57 of 5,000 is 2,850.

    The product of floats is 2849.9999999999995, because 0.57 has no exact binary form.
    """
    return math.floor(Fraction(str(rate)) * n)


def _pick(members: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """`num_flipped` of the `members`, every subset of that size equally likely."""
    order = np.argsort(hash64(seed, members), kind="stable")
    return np.asarray(members[order[: num_flipped(rate, len(members))]])


def _symmetric(labels: np.ndarray, rate: float, seed: int, num_classes: int, **_: Any) -> np.ndarray:
    noisy = labels.copy()
    for label in range(num_classes):
        chosen = _pick(np.flatnonzero(labels == label), rate, derive(seed, "symmetric", "pick"))
        shift = hash64(derive(seed, "symmetric", "target"), chosen) % np.uint64(num_classes - 1)
        noisy[chosen] = (label + 1 + shift.astype(np.int64)) % num_classes
    return noisy


def _asymmetric(
    labels: np.ndarray,
    rate: float,
    seed: int,
    num_classes: int,
    class_map: dict[int, int] | None,
    key: str,
    both_ways: bool = False,
    from_noisy: bool = False,
    **_: Any,
) -> np.ndarray:
    """Flip `rate` of each source class to its target: of the clean labels, or (`from_noisy`) of those flipped so far."""
    if class_map is None and num_classes != 10:
        unknown = f"Asymmetric noise has no default map for {num_classes} classes"
        raise UserError(f"{unknown}. Give {key}.class_map, for instance {{0: 1, 1: 0}}.")
    class_map = CIFAR10_MAP if class_map is None else class_map
    pairs = [(int(source), int(target)) for source, target in class_map.items()]
    for source, target in pairs:
        if not (0 <= source < num_classes and 0 <= target < num_classes) or source == target:
            entry = f"The asymmetric map entry {source} -> {target}"
            raise UserError(f"{entry} must name two different classes in 0..{num_classes - 1}.")
    if both_ways:
        pairs = sorted({pair for source, target in pairs for pair in ((source, target), (target, source))})
        if len({source for source, _ in pairs}) != len(pairs):
            raise UserError("A bidirectional asymmetric map may name each class in one pair only.")
    noisy = labels.copy()
    for source, target in pairs:
        members = np.flatnonzero((noisy if from_noisy else labels) == source)
        noisy[_pick(members, rate, derive(seed, "asymmetric", source))] = target
    return noisy


def _asymmetric_blocks(labels: np.ndarray, num_classes: int, class_map: Any, key: str, **other: Any) -> np.ndarray:
    """Asymmetric noise within blocks of five label numbers."""
    if class_map is not None:
        raise UserError(_own_map(key))
    if num_classes % 5:
        few = f"Label noise 'asymmetric_blocks' needs a multiple of five classes, not {num_classes}"
        raise UserError(f"{few}. Use asymmetric with {key}.class_map.")
    return _asymmetric(labels, num_classes=num_classes, class_map=blocks_map(num_classes), key=key, **other)


def _human(labels: np.ndarray, num_classes: int, human_labels: np.ndarray | None, key: str, **_: Any) -> np.ndarray:
    if human_labels is None:
        raise UserError(_no_human_labels(key))
    human = _checked(human_labels, num_classes, "human labels")
    if len(human) != len(labels):
        raise UserError(f"There are {len(human)} human labels for {len(labels)} images; they must be the same number.")
    return human


def _given_matrix(labels: np.ndarray, seed: int, num_classes: int, matrix: Any, key: str, **_: Any) -> np.ndarray:
    """Each label drawn independently from the row of its class, as in the code of Patrini et al. (2017)."""
    if matrix is None:
        raise UserError(_no_matrix(key))
    upper = np.cumsum(load_matrix(matrix, f"{key}.matrix", num_classes), axis=1)
    upper /= upper[:, -1:]  # the last is exactly 1, above every draw
    noisy = np.empty_like(labels)
    for start in range(0, len(labels), _CHUNK):
        chunk = slice(start, min(start + _CHUNK, len(labels)))
        draws = uniform01(derive(seed, "matrix"), np.arange(chunk.start, chunk.stop))
        for label in range(num_classes):
            members = labels[chunk] == label
            noisy[chunk][members] = np.searchsorted(upper[label], draws[members], side="right")
    return noisy


def _instance_dependent(
    labels: np.ndarray, rate: float, seed: int, num_classes: int, images: np.ndarray | None, **_: Any
) -> np.ndarray:
    """Part-dependent noise as in Xia et al. 2020, algorithm 2: flip rates q_i ~ TruncNormal(rate, 0.1^2; [0, 1])."""
    if images is None or len(images) != len(labels):
        raise UserError("Label noise 'instance_dependent' needs one image for each label.")
    generator = np.random.Generator(np.random.Philox(derive(seed, "instance_dependent")))
    flip_rate = generator.normal(rate, 0.1, len(labels))
    while (outside := (flip_rate < 0) | (flip_rate > 1)).any():
        flip_rate[outside] = generator.normal(rate, 0.1, int(outside.sum()))
    pixels = int(np.prod(images.shape[1:]))
    projection = generator.standard_normal((num_classes, pixels, num_classes)).astype(np.float32)
    draws = uniform01(derive(seed, "instance_dependent", "draw"), np.arange(len(labels)))
    noisy = labels.copy()
    for label in range(num_classes):
        of_class = np.flatnonzero(labels == label)
        for members in np.array_split(of_class, max(1, len(of_class) // 4096)):  # bounds the memory of float images
            scores = (images[members].reshape(len(members), pixels).astype(np.float32) / 255.0) @ projection[label]
            scores[:, label] = -np.inf
            direction = np.exp(scores - scores.max(axis=1, keepdims=True)).astype(np.float64)
            direction /= direction.sum(axis=1, keepdims=True)
            probability = flip_rate[members, None] * direction
            probability[:, label] = 1.0 - flip_rate[members]
            chosen = (draws[members, None] >= np.cumsum(probability, axis=1)).sum(axis=1)
            # The cumulative sum may end one rounding error below 1; a draw above it keeps its label.
            noisy[members] = np.where(chosen < num_classes, chosen, label)
    return noisy


def _badlabel(
    labels: np.ndarray, rate: float, num_classes: int, scores: np.ndarray | None, key: str, **_: Any
) -> np.ndarray:
    """BadLabel (Zhang et al. 2024): an image's candidate is its class of the smallest z, or of the second if that is its label.

    `scores` are z; of all images, those whose candidate has the smallest log softmax(z) get it, equal ones in source order.
    """
    if scores is None:
        raise UserError(NO_SCORES.format(key))
    if scores.shape != (len(labels), num_classes):
        raise UserError(f"{key}.scores has the shape {list(scores.shape)}, expected {[len(labels), num_classes]}.")
    order = np.argsort(scores, axis=1, kind="stable")
    candidate = np.where(order[:, 0] == labels, order[:, 1], order[:, 0])
    largest = scores.max(1)
    value = scores[np.arange(len(labels)), candidate] - largest - np.log(np.exp(scores - largest[:, None]).sum(1))
    chosen = np.argsort(value, kind="stable")[: num_flipped(rate, len(labels))]
    noisy = labels.copy()
    noisy[chosen] = candidate[chosen]
    return noisy


NOISES: dict[str, Callable[..., np.ndarray]] = {
    "none": lambda labels, **_: labels,
    "symmetric": _symmetric,
    "asymmetric": _asymmetric,
    "asymmetric_released": partial(_asymmetric, from_noisy=True),  # the released code: some flipped labels flip back
    "asymmetric_bidirectional": partial(_asymmetric, both_ways=True),
    "asymmetric_blocks": _asymmetric_blocks,  # CIFAR-100 in the code of APL; its true superclasses are `asymmetric`
    "cifar10n": _human,
    "instance_dependent": _instance_dependent,
    MATRIX: _given_matrix,
    "badlabel": _badlabel,
}


_CHUNK = 1 << 20  # labels of one draw, to bound its memory


def transition_matrix(clean: np.ndarray, given: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, K]: the number of images of clean class i with given label j."""
    counts = np.bincount(clean * num_classes + given, minlength=num_classes * num_classes)
    return np.asarray(counts.reshape(num_classes, num_classes))


def labels_sha256(labels: np.ndarray) -> str:
    """Identifies int [n] labels in source order: sha256 of them as little-endian int64."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def describe_noise(
    clean: np.ndarray, given: np.ndarray, num_classes: int, spec: NoiseSpec, *, known_before: bool = True
) -> dict[str, Any]:
    """The noise as a run stores it: counts, realised rate, transition matrix and a hash of the given labels.

    `clean` are the labels before injection; without `known_before` the description says that they are not known to be clean.
    """
    return {
        "kind": spec.kind,
        "rate": spec.rate,
        "seed": spec.seed,
        **({} if spec.matrix is None else {"matrix": load_matrix(spec.matrix, f"{spec.KEY}.matrix").tolist()}),
        "num_labels": len(clean),
        "num_noisy": int((clean != given).sum()),
        "realised_rate": float((clean != given).mean()) if len(clean) else 0.0,
        "transition_matrix": transition_matrix(clean, given, num_classes).tolist(),
        "sha256": labels_sha256(given),
        **({} if known_before else {BEFORE: UNKNOWN}),
    }
