"""What is known about each data set: class names, normalisation, the noise map that its literature uses."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dataset:
    """Facts about one data set.

    Attributes:
        class_names: in label order.
        mean, std: per channel, of [0, 1] pixels.
        asymmetric_map: label -> the label it is confused with (empty where nobody published one).
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    asymmetric_map: dict[int, int] = field(default_factory=dict)


_DIGITS = tuple("0123456789")

# NRAT's map for CIFAR-10: truck->automobile, bird->airplane, deer->horse, cat<->dog; for MNIST: 7->1, 2->7, 5<->6, 3->8.
# The order of CIFAR-10's entries is the one in which the released code applies them (`asymmetric_released`).
CIFAR10_MAP = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
MNIST_MAP = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}

DATASETS: dict[str, Dataset] = {
    "cifar10": Dataset(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (0.4914, 0.4822, 0.4465),
        (0.2471, 0.2435, 0.2616),
        CIFAR10_MAP,
    ),
    "mnist": Dataset(_DIGITS, (0.1307,), (0.3081,), MNIST_MAP),
    "fashion_mnist": Dataset(
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        (0.2860,),
        (0.3530,),
    ),
    "digits": Dataset(_DIGITS, (0.3049,), (0.3757,), MNIST_MAP),
}
