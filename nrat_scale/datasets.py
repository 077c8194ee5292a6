"""Class names, normalisation and published asymmetric noise map of each data set."""

from dataclasses import dataclass, field

from nrat_scale._class_names import CIFAR100, CIFAR100_SUPERCLASSES, TINY_IMAGENET


@dataclass(frozen=True)
class Dataset:
    """Facts about one data set."""

    class_names: tuple[str, ...]  # in label order
    mean: tuple[float, ...]  # per channel, of the training images in [0, 1], rounded as in the literature
    std: tuple[float, ...]
    asymmetric_map: dict[int, int] = field(default_factory=dict)  # empty if no map is published
    hub: str | None = None  # the repository of the data set on the Hugging Face Hub


_DIGITS = tuple("0123456789")

# NRAT's map for CIFAR-10: truck->automobile, bird->airplane, deer->horse, cat<->dog; for MNIST: 7->1, 2->7, 5<->6, 3->8.
# The released code applies CIFAR-10's entries in this order (`asymmetric_released` depends on it).
CIFAR10_MAP = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
MNIST_MAP = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}

# CIFAR-100's map (Patrini et al. 2017): each class to the next of its superclass, the last to the first.
_FOLLOWING = {names[i - 1]: names[i] for names in CIFAR100_SUPERCLASSES for i in range(len(names))}
CIFAR100_MAP = {label: CIFAR100.index(_FOLLOWING[name]) for label, name in enumerate(CIFAR100)}


def blocks_map(num_classes: int) -> dict[int, int]:
    """Each label to the next of its block of five numbers, the last to the first.

    The code of Active Passive Losses (Ma et al. 2020) does this to CIFAR-100 and calls the blocks superclasses. They are
    not: the numbers are alphabetical, so apple goes to aquarium_fish.
    """
    return {label: label // 5 * 5 + (label + 1) % 5 for label in range(num_classes)}


DATASETS: dict[str, Dataset] = {
    "cifar10": Dataset(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (0.4914, 0.4822, 0.4465),
        (0.2471, 0.2435, 0.2616),
        CIFAR10_MAP,
        hub="uoft-cs/cifar10",
    ),
    "cifar100": Dataset(CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), CIFAR100_MAP, "uoft-cs/cifar100"),
    # No noise map is published for SVHN, Tiny ImageNet and Fashion-MNIST.
    "svhn": Dataset(_DIGITS, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), hub="ufldl-stanford/svhn"),
    "tiny_imagenet": Dataset(
        TINY_IMAGENET, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), hub="zh-plus/tiny-imagenet"
    ),
    "mnist": Dataset(_DIGITS, (0.1307,), (0.3081,), MNIST_MAP, "ylecun/mnist"),
    "fashion_mnist": Dataset(
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        (0.2860,),
        (0.3530,),
        hub="zalando-datasets/fashion_mnist",
    ),
    "digits": Dataset(_DIGITS, (0.3049,), (0.3757,), MNIST_MAP),
}
