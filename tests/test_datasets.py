"""Facts about data sets: tables without typing errors, noise maps with the properties that their papers state."""

import numpy as np
import pytest
from timm.data import ImageNetInfo

from nrat_scale._class_names import CIFAR100, CIFAR100_SUPERCLASSES, TINY_IMAGENET
from nrat_scale.datasets import DATASETS
from nrat_scale.labels import corrupt, transition_matrix

# Fine label -> coarse label, as the pickles of CIFAR-100 pair them.
_COARSE = """
4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13
16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13
"""
coarse_labels = np.array(_COARSE.split(), dtype=int)


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_is_consistent(name):
    """Distinct names, one mean and deviation per channel inside (0, 1), and a map between labels that exist."""
    known = DATASETS[name]
    assert len(set(known.class_names)) == len(known.class_names) >= 10
    assert len(known.mean) == len(known.std) in (1, 3)
    assert all(0 < value < 1 for value in known.mean + known.std)
    labels = range(len(known.class_names))
    assert all(
        source in labels and target in labels and source != target for source, target in known.asymmetric_map.items()
    )


def test_numbers_of_classes():
    """The numbers of classes are the published ones."""
    sizes = {name: len(known.class_names) for name, known in DATASETS.items()}
    assert (sizes["cifar100"], sizes["tiny_imagenet"], sizes["svhn"]) == (100, 200, 10)


def test_cifar100_superclasses_are_the_coarse_labels():
    """Our table of superclasses agrees with the coarse labels from another source."""
    assert len(CIFAR100_SUPERCLASSES) == 20 and coarse_labels.shape == (100,)
    for coarse, names in enumerate(CIFAR100_SUPERCLASSES):
        assert [CIFAR100[fine] for fine in np.flatnonzero(coarse_labels == coarse)] == list(names)


def test_cifar100_map_is_a_cycle_in_every_superclass():
    """Patrini et al. 2017: each class goes to the next of its superclass, circularly; twenty cycles of five."""
    mapped = DATASETS["cifar100"].asymmetric_map
    assert list(mapped) == list(range(100)) and sorted(mapped.values()) == list(range(100))
    for fine, target in mapped.items():
        assert coarse_labels[fine] == coarse_labels[target]
        members = np.flatnonzero(coarse_labels == coarse_labels[fine]).tolist()
        assert target == members[(members.index(fine) + 1) % 5]
    named = {CIFAR100[fine]: CIFAR100[target] for fine, target in mapped.items()}
    assert named["beaver"] == "dolphin" and named["whale"] == "beaver" and named["tractor"] == "lawn_mower"


def test_asymmetric_noise_on_cifar100():
    """`corrupt` follows the map: exactly the given share of each class flips, to a class of the same superclass."""
    clean = np.tile(np.arange(100), 500)
    noisy = corrupt(clean, "asymmetric", 0.4, 0, 100, class_map=DATASETS["cifar100"].asymmetric_map)
    counts = transition_matrix(clean, noisy, 100)
    assert (np.diag(counts) == 300).all()
    assert all(counts[fine, target] == 200 for fine, target in DATASETS["cifar100"].asymmetric_map.items())


def test_tiny_imagenet_classes_are_sorted_classes_of_imagenet():
    """Sorted WordNet ids, each among ImageNet's thousand, so that a mistyped id is noticed."""
    assert list(TINY_IMAGENET) == sorted(set(TINY_IMAGENET)) and len(TINY_IMAGENET) == 200
    thousand = set(ImageNetInfo("imagenet-1k").label_names())
    assert set(TINY_IMAGENET) <= thousand
    assert "n01855672" in TINY_IMAGENET and "n02666347" not in TINY_IMAGENET  # the archive's list, not the other one


def test_data_sets_without_a_published_map_have_none():
    """Asymmetric noise on these data sets needs data.real.noise.class_map."""
    assert not any(DATASETS[name].asymmetric_map for name in ("svhn", "tiny_imagenet", "fashion_mnist"))
