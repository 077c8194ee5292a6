"""Label noise: exact counts, a pure function of (labels, kind, rate, seed), and mistakes that raise a sentence."""

import hashlib
import itertools
import math
import random
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.datasets import CIFAR10_MAP, DATASETS, MNIST_MAP
from nrat_scale.label_files import load_human_labels
from nrat_scale.labels import (
    NOISES,
    GeneratedNoiseSpec,
    NoiseSpec,
    corrupt,
    describe_noise,
    transition_matrix,
)

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(-(2**40), 2**40)
BALANCED = np.tile(np.arange(10), 5000)  # 50,000 labels, as CIFAR-10 has


def _labels(count: int, num_classes: int, seed: int) -> np.ndarray:
    """Unbalanced labels; some classes may be empty."""
    return np.random.default_rng(seed).integers(0, num_classes, count) ** 2 % num_classes


def _floor(rate: float, n: int) -> int:
    """The floor of the exact product of the decimal number that `rate` prints as."""
    return math.floor(Decimal(str(rate)) * int(n))


def _images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)


def _noisy(kind: str, labels: np.ndarray, rate: float, seed: int = 0, num_classes: int = 10) -> np.ndarray:
    """`corrupt` with the extra arguments that the kind needs."""
    images = _images(len(labels)) if kind == "instance_dependent" else None
    human = (labels + 1) % num_classes if kind == "cifar10n" else None
    matrix = np.full((num_classes, num_classes), 1 / num_classes) if kind == "matrix" else None
    scores = np.random.default_rng(7).random((len(labels), num_classes)) if kind == "badlabel" else None
    extra = {"images": images, "human_labels": human, "matrix": matrix, "scores": scores}
    return corrupt(labels, kind, rate, seed, num_classes, **extra)


# ---- all kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_a_pure_function(kind):
    """Same arguments give the same int64 labels, independent of other generators; the input is not changed."""
    labels = _labels(2000, 10, 1).astype(np.int32)
    kept = labels.copy()
    first = _noisy(kind, labels, 0.3, seed=5)
    random.seed(1)
    np.random.default_rng().random(100)
    torch.manual_seed(1)
    torch.rand(100)
    second = _noisy(kind, labels.astype(np.int64), 0.3, seed=5)
    assert first.dtype == np.int64 and first.shape == labels.shape
    assert np.array_equal(first, second)
    assert np.array_equal(labels, kept) and not np.shares_memory(first, labels)
    assert first.min() >= 0 and first.max() < 10
    if kind not in ("none", "cifar10n", "badlabel"):
        assert not np.array_equal(first, _noisy(kind, labels, 0.3, seed=6))


@pytest.mark.parametrize("kind", NOISES)
def test_result_never_aliases_int64_labels(kind):
    """int64 labels are copied too."""
    labels = np.arange(20) % 10
    noisy = _noisy(kind, labels, 0.0)
    noisy[:] = 0
    assert np.array_equal(labels, np.arange(20) % 10)


def test_noise_does_not_depend_on_the_global_generators():
    """No noise reads or changes the random state that training uses."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    for kind in NOISES:
        _noisy(kind, BALANCED[:1000], 0.4)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("count", [0, 1])
def test_tiny_data_sets(kind, count):
    """Zero labels and one label are accepted."""
    assert len(_noisy(kind, np.zeros(count, np.int64), 0.5)) == count


def test_kind_none_changes_nothing():
    """The default of a recipe changes no label, and makes no claim before the data set is known."""
    assert np.array_equal(corrupt(BALANCED, "none", 0.0, 0, 10), BALANCED)
    assert (NoiseSpec().kind, NoiseSpec().rate, NoiseSpec().injects) == ("auto", 0.0, False)


# Noise must not change between versions: stored runs name it by (kind, rate, seed) alone.
KNOWN = {
    "symmetric": "0a1c1728f3226621",
    "asymmetric": "16174511b8b7b6ad",
    "asymmetric_released": "bb9fd1cb63b1c7a8",
    "asymmetric_bidirectional": "ac5afe9e57e01c5d",
}


@pytest.mark.parametrize("kind", KNOWN)
def test_known_answer(kind):
    """The labels of seed 0 at rate 0.4 are those of the first version."""
    noisy = corrupt(BALANCED, kind, 0.4, 0, 10)
    assert hashlib.sha256(noisy.astype("<i8").tobytes()).hexdigest()[:16] == KNOWN[kind]


# ---- symmetric ------------------------------------------------------------------------------------------------------


@REPEATABLE
@given(
    count=st.integers(0, 400),
    num_classes=st.integers(2, 12),
    rate=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.2, 0.4, 1.0])),
    seed=SEEDS,
)
def test_symmetric_flips_exactly_the_rate_of_each_class(count, num_classes, rate, seed):
    """floor(rate * n_c) labels of each class, none to itself."""
    labels = _labels(count, num_classes, seed % 1000)
    noisy = corrupt(labels, "symmetric", rate, seed, num_classes)
    for label in range(num_classes):
        members = labels == label
        assert (noisy[members] != label).sum() == _floor(rate, members.sum())
    assert count == 0 or (noisy.min() >= 0 and noisy.max() < num_classes)


def test_symmetric_flips_are_uniform():
    """Each of the other nine classes is equally likely, independent of the position in the data."""
    noisy = corrupt(BALANCED, "symmetric", 0.4, 3, 10)
    counts = transition_matrix(BALANCED, noisy, 10)
    off = counts[~np.eye(10, dtype=bool)].reshape(10, 9)
    assert (off.sum(1) == 2000).all()
    assert ((off - 2000 / 9) ** 2 / (2000 / 9)).sum() < 130  # chi-square, 80 degrees of freedom: p about 3e-4
    by_place = (noisy != BALANCED).reshape(50, 1000).sum(1)
    assert ((by_place - 400) ** 2 / 240).sum() < 100  # 50 places


def test_symmetric_seeds_are_unrelated():
    """Two seeds agree on flipped images, and on targets, as often as chance predicts."""
    one, two = (corrupt(BALANCED, "symmetric", 0.4, seed, 10) for seed in (0, 1))
    both = (one != BALANCED) & (two != BALANCED)
    assert both.mean() == pytest.approx(0.16, abs=0.01)
    assert (one == two)[both].mean() == pytest.approx(1 / 9, abs=0.02)


# ---- asymmetric -----------------------------------------------------------------------------------------------------


@REPEATABLE
@given(count=st.integers(0, 400), rate=st.one_of(st.floats(0, 1), st.just(1.0)), seed=SEEDS, use_default=st.booleans())
def test_asymmetric_flips_clean_labels_by_the_map(count, rate, seed, use_default):
    """floor(rate * n_c) clean labels of each source class flip to its target; other classes do not change."""
    labels = _labels(count, 10, seed % 1000)
    class_map = CIFAR10_MAP if use_default else {0: 1, 1: 0, 7: 9}
    noisy = corrupt(labels, "asymmetric", rate, seed, 10, class_map=None if use_default else class_map)
    for label in range(10):
        given_labels = noisy[labels == label]
        flipped = given_labels != label
        if label in class_map:
            assert flipped.sum() == _floor(rate, len(given_labels))
            assert (given_labels[flipped] == class_map[label]).all()
        else:
            assert not flipped.any()


def test_default_map_is_the_published_one():
    """truck->automobile, bird->airplane, deer->horse, cat<->dog; MNIST 7->1, 2->7, 5<->6, 3->8; none for Fashion-MNIST."""
    names = DATASETS["cifar10"].class_names
    by_name = {names[source]: names[target] for source, target in CIFAR10_MAP.items()}
    assert by_name == {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
    assert MNIST_MAP == {7: 1, 2: 7, 5: 6, 6: 5, 3: 8} == DATASETS["mnist"].asymmetric_map
    assert not DATASETS["fashion_mnist"].asymmetric_map
    noisy = corrupt(BALANCED, "asymmetric", 0.4, 0, 10)
    assert (noisy != BALANCED).sum() == 5 * 2000


def test_asymmetric_released_flips_already_flipped_labels():
    """Pairs are applied one after another: at rate 0.4, 24.1 % of the cats and 18.4 % of all labels are wrong."""
    noisy = corrupt(BALANCED, "asymmetric_released", 0.4, 0, 10)
    wrong = noisy != BALANCED
    cat, dog = 3, 5
    assert wrong[cat == BALANCED].mean() == pytest.approx(0.241, abs=0.01)
    assert wrong.mean() == pytest.approx(0.184, abs=0.001)
    counts = transition_matrix(BALANCED, noisy, 10)
    # 2000 cats became dogs, then 2800 of the 7000 dogs became cats.
    assert counts[:, cat].sum() == 3000 + 2800 and counts[:, dog].sum() == 7000 - 2800
    for source, target in ((9, 1), (2, 0), (4, 7)):
        assert counts[source, target] == 2000 and counts[source, source] == 3000


def test_released_order_is_that_of_the_map():
    """With chained entries a label can flip twice, unlike in `asymmetric`."""
    labels = np.zeros(100, np.int64)
    chain = {0: 1, 1: 2}
    assert (corrupt(labels, "asymmetric_released", 1.0, 0, 3, class_map=chain) == 2).all()
    assert (corrupt(labels, "asymmetric", 1.0, 0, 3, class_map=chain) == 1).all()


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_bidirectional_flips_all_four_pairs_both_ways(rate):
    """Eight classes at the same rate; frog and ship stay clean."""
    noisy = corrupt(BALANCED, "asymmetric_bidirectional", rate, 0, 10)
    counts = transition_matrix(BALANCED, noisy, 10)
    expected = np.diag([5000] * 10)
    for one, other in ((9, 1), (2, 0), (4, 7), (3, 5)):
        for source, target in ((one, other), (other, one)):
            expected[source, target], expected[source, source] = int(rate * 5000), 5000 - int(rate * 5000)
    assert np.array_equal(counts, expected)


def test_bidirectional_map_with_a_class_in_two_pairs_is_refused():
    """0 <-> 1 and 1 <-> 2 give two targets to class 1."""
    with pytest.raises(UserError, match="one pair only"):
        corrupt(BALANCED, "asymmetric_bidirectional", 0.4, 0, 10, class_map={0: 1, 1: 2})


# ---- human and instance-dependent -----------------------------------------------------------------------------------


def test_cifar10n_returns_the_human_labels(tmp_path):
    """Rate and seed have no effect; the file is read without unpickling."""
    human = _labels(len(BALANCED), 10, 3)
    np.save(tmp_path / "human.npy", human)
    given_labels = corrupt(
        BALANCED, "cifar10n", 0.0, 0, 10, human_labels=load_human_labels(str(tmp_path / "human.npy"), "worse")
    )
    assert np.array_equal(given_labels, human) and not np.shares_memory(given_labels, human)
    assert np.array_equal(given_labels, corrupt(BALANCED, "cifar10n", 0.9, 7, 10, human_labels=human))


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_instance_dependent_rate_and_dependence_on_images(rate):
    """About `rate` of all labels are wrong; the image decides which ones, and their targets."""
    count = 10_000
    labels, images = np.arange(count) % 10, _images(count)
    noisy = corrupt(labels, "instance_dependent", rate, 0, 10, images=images)
    flipped = noisy != labels
    assert flipped.mean() == pytest.approx(rate, abs=0.02)
    other = corrupt(labels, "instance_dependent", rate, 0, 10, images=images[::-1])
    assert not np.array_equal(noisy, other)
    # Identical images of a class share one distribution of targets, unlike under symmetric noise.
    same = corrupt(labels, "instance_dependent", rate, 0, 10, images=np.repeat(images[:1], count, axis=0))
    for label in range(10):
        targets = same[(labels == label) & (same != label)]
        assert np.bincount(targets, minlength=10).max() > 0.3 * len(targets)


def test_instance_dependent_flips_follow_the_drawn_rates():
    """At rate 1 few labels are kept (q_i is N(1, 0.1) truncated at 1); at rate 0 all are."""
    labels, images = np.arange(4000) % 10, _images(4000)
    low, high = (corrupt(labels, "instance_dependent", rate, 0, 10, images=images) for rate in (0.0, 1.0))
    half_normal = 0.1 * np.sqrt(2 / np.pi)  # the mean of |N(0, 0.1)|
    assert np.array_equal(low, labels)
    assert (high != labels).mean() == pytest.approx(1 - half_normal, abs=0.015)


def test_instance_dependent_noise_covers_large_classes():
    """The scores of a large class are computed in pieces, and all pieces have the same rate."""
    labels, images = np.zeros(9000, np.int64), _images(9000)
    noisy = corrupt(labels, "instance_dependent", 0.4, 0, 3, images=images)
    by_piece = (noisy != labels).reshape(9, 1000).mean(1)
    assert by_piece == pytest.approx(np.full(9, 0.4), abs=0.06)


# ---- rates 0 and 1, errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "asymmetric_released", "asymmetric_bidirectional"])
def test_rates_zero_and_one(kind):
    """Rate 0 keeps every label; rate 1 keeps none of the classes that the kind flips."""
    assert np.array_equal(corrupt(BALANCED, kind, 0.0, 0, 10), BALANCED)
    noisy = corrupt(BALANCED, kind, 1.0, 0, 10)
    kept = {int(label) for label in np.unique(BALANCED[noisy == BALANCED])}
    # Released code at rate 1: all cats become dogs and then, with the dogs, cats.
    frog_ship = {6, 8}
    expected = {
        "symmetric": set(),
        "asymmetric": frog_ship | {0, 1, 7},
        "asymmetric_released": frog_ship | {0, 1, 7, 3},
        "asymmetric_bidirectional": frog_ship,
    }
    assert kept == expected[kind]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "symetric"}, "Did you mean 'symmetric'"),
        ({"kind": "gaussian blur"}, "Known: asymmetric, "),
        ({"rate": 1.5}, r"rate is 1\.5; .*\[0, 1\]"),
        ({"rate": -0.1}, r"\[0, 1\]"),
        ({"rate": float("nan")}, r"\[0, 1\]"),
        ({"labels": np.array([0, 10])}, "range from 0 to 10, but with 10 classes they must be in 0..9"),
        ({"labels": np.array([-1, 3])}, "range from -1 to 3"),
        ({"labels": np.array([0.0, 1.0])}, "must be integers of shape .*float64"),
        ({"labels": np.array([True, False])}, "must be integers .*bool"),
        ({"labels": np.zeros((2, 2), np.int64)}, r"must be integers of shape \[n\], not int64 of shape \[2, 2\]"),
        ({"num_classes": 1, "labels": np.zeros(3, np.int64)}, "at least 2 classes"),
        ({"kind": "asymmetric", "num_classes": 7, "labels": np.arange(7)}, "no default map for 7 classes.*class_map"),
        ({"kind": "asymmetric", "class_map": {0: 10}}, "0 -> 10 must name two different classes in 0..9"),
        ({"kind": "asymmetric", "class_map": {-1: 3}}, "-1 -> 3 must name two different classes"),
        ({"kind": "asymmetric_released", "class_map": {4: 4}}, "4 -> 4 must name two different classes"),
        ({"kind": "asymmetric_blocks", "class_map": {0: 1}}, "has its own class map.*data.real.noise.class_map"),
        ({"kind": "asymmetric_blocks", "num_classes": 12}, "needs a multiple of five classes, not 12"),
        ({"kind": "cifar10n"}, "data.real.noise.human_labels"),
        ({"kind": "cifar10n", "key": "data.generated.noise"}, "data.generated.noise.human_labels"),
        ({"kind": "cifar10n", "human_labels": np.zeros(9, np.int64)}, "9 human labels for 10 images"),
        ({"kind": "cifar10n", "human_labels": np.full(10, 10)}, "human labels range from 10 to 10"),
        ({"kind": "cifar10n", "human_labels": np.zeros(10)}, "human labels must be integers"),
        ({"kind": "instance_dependent"}, "needs one image for each label"),
        ({"kind": "instance_dependent", "images": _images(9)}, "needs one image for each label"),
        (
            {"kind": "instance_dependent", "num_classes": 1, "labels": np.zeros(3, np.int64), "images": _images(3)},
            "at least 2 classes",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    """Unknown kinds and impossible rates, labels or maps raise a sentence that says what was expected."""
    defaults = {"labels": np.arange(10), "kind": "symmetric", "rate": 0.4, "seed": 0, "num_classes": 10}
    with pytest.raises(UserError, match=message):
        corrupt(**{**defaults, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "symetric", "rate": 0.2}, "Did you mean 'symmetric'"),
        ({"kind": "symmetric", "rate": 1.5}, r"rate is 1\.5; .*\[0, 1\]"),
        ({"kind": "none", "rate": 0.2}, "kind is 'none'.*Name a kind"),
        ({"kind": "cifar10n"}, "data.real.noise.human_labels"),
        ({"human_set": "worst"}, "human_set is 'worst'. Did you mean 'worse'"),
        ({"kind": "asymmetric_blocks", "class_map": {0: 1}}, "has its own class map"),
    ],
)
def test_a_spec_checks_itself(arguments, message):
    """A recipe with contradicting or unknown noise fails before any data are read, and names the section of its noise."""
    with pytest.raises(UserError, match=message) as of_real:
        NoiseSpec(**arguments)
    with pytest.raises(UserError) as of_generated:
        GeneratedNoiseSpec(**arguments)
    assert str(of_generated.value) == str(of_real.value).replace("data.real.noise", "data.generated.noise")


# ---- what a run stores ----------------------------------------------------------------------------------------------


@REPEATABLE
@given(count=st.integers(0, 300), num_classes=st.integers(1, 9), seed=st.integers(0, 1000))
def test_transition_matrix_counts_pairs(count, num_classes, seed):
    """Entry (i, j): images of clean class i that carry label j."""
    clean, noisy = _labels(count, num_classes, seed), _labels(count, num_classes, seed + 1)
    counts = transition_matrix(clean, noisy, num_classes)
    for i, j in itertools.product(range(num_classes), repeat=2):
        assert counts[i, j] == sum(a == i and b == j for a, b in zip(clean, noisy, strict=True))


def test_description_of_the_noise():
    """Counts, realised rate, matrix and a hash of the labels."""
    spec = NoiseSpec("symmetric", 0.4, 7)
    noisy = corrupt(BALANCED, spec.kind, spec.rate, spec.seed, 10)
    description = describe_noise(BALANCED, noisy, 10, spec)
    matrix = description.pop("transition_matrix")
    assert np.array_equal(matrix, transition_matrix(BALANCED, noisy, 10))
    assert description == {
        "kind": "symmetric",
        "rate": 0.4,
        "seed": 7,
        "num_labels": 50_000,
        "num_noisy": 20_000,
        "realised_rate": 0.4,
        "sha256": hashlib.sha256(noisy.astype("<i8").tobytes()).hexdigest(),
    }
    changed = noisy.copy()
    changed[0] = (changed[0] + 1) % 10
    assert describe_noise(BALANCED, changed, 10, spec)["sha256"] != description["sha256"]
    assert describe_noise(BALANCED[:0], BALANCED[:0], 10, spec)["realised_rate"] == 0.0
