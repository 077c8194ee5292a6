"""Convert an image data set into shards: verified, randomly accessible WebDataset tars.

    python tools/shard_dataset.py digits --out data/digits
    python tools/shard_dataset.py cifar10 data --split train --out data/cifar10/train --download
    python tools/shard_dataset.py npz 1m.npz --dataset cifar10 --out data/cifar10_1m
    python tools/shard_dataset.py idx train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --dataset mnist --out data/mnist

The way of an image: a reader below gives a `Source`, whose images stay on disk (memory maps: an npz of 150 GB needs no
more memory than a small one) -> `write_shards` permutes them by --seed and writes blocks -> everything was written
beside --out and is renamed at the end, so --out is whole or not there.

A new format is one reader that returns a `Source`, and one block in `_parser`.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cifar10n import convert_human_labels
from nrat_scale.datasets import DATASETS
from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import fsync_folder, make_folder, temporary_sibling
from nrat_scale.pack import BLOCK_SIZE, SHARD_SIZE, Source, require_new_folder, write_shards
from reader_cifar import SPLITS, read_cifar10, read_cifar100
from reader_images import TINY_SPLITS, read_tiny_imagenet
from reader_mat import read_svhn
from reader_tars import read_tars
from readers import read_digits, read_idx, read_npz

# ---- the command line -----------------------------------------------------------------------------------------------


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _add_kind(
    kinds: Any, kind: str, read: Callable[[argparse.Namespace, Path], dict[str, Source]], summary: str, *examples: str
) -> argparse.ArgumentParser:
    """A subcommand with the common options; `read` gives the sources, named by their folder in --out ("" is --out)."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        kind,
        help=summary,
        description=summary,
        epilog="\n  ".join(["examples:", *(f"python tools/shard_dataset.py {kind} {text}" for text in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(read=read)
    sizes: dict[str, Any] = {"type": _at_least_one, "metavar": "N"}
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    add("--block-size", default=BLOCK_SIZE, help="images in a block (default: %(default)s)", **sizes)
    add("--shard-size", default=SHARD_SIZE, help="images in a shard, in whole blocks (default: %(default)s)", **sizes)
    add("--seed", type=int, default=0, metavar="N", help="of the order in the shards (default: %(default)s)")
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    text = f"names the classes: {', '.join(DATASETS)} (without it: 0, 1, 2, ...)"
    parser.add_argument("--dataset", choices=list(DATASETS), metavar="NAME", help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="KIND", help="`KIND --help` says more")
    npz = _add_kind(
        kinds,
        "npz",
        lambda given, scratch: {"": read_npz(given.files, given.dataset, scratch)},
        "npz files with `image` (uint8 [N, H, W, C] or [N, C, H, W]) and `label` (integers [N], or one-hot [N, K])",
        "1m.npz --dataset cifar10 --out data/cifar10_1m",
        "part0.npz part1.npz part2.npz --out data/parts",
        "hf://datasets/USER/REPO/cifar10/1m.npz --dataset cifar10 --out data/cifar10_1m",
    )
    npz.add_argument(
        "files", nargs="+", metavar="FILE", help="path, or hf://datasets/USER/REPO/FILE; several are parts"
    )
    _add_dataset(npz)
    cifar10 = _add_kind(
        kinds,
        "cifar10",
        lambda given, scratch: {"": read_cifar10(given.root, given.split, download=given.download)},
        "CIFAR-10 as its authors publish it (Python or binary version)",
        "data --split train --out data/cifar10/train --download",
        "data/cifar-10-batches-bin --split test --out data/cifar10/test",
    )
    cifar10.add_argument(
        "root", type=Path, metavar="ROOT", help="holds or is cifar-10-batches-py or cifar-10-batches-bin"
    )
    cifar10.add_argument("--split", choices=SPLITS, required=True)
    cifar10.add_argument("--download", action="store_true", help="fetch it into ROOT (170 MB) unless it is there")
    cifar100 = _add_kind(
        kinds,
        "cifar100",
        lambda given, scratch: {"": read_cifar100(given.root, given.split, download=given.download)},
        "CIFAR-100 as its authors publish it (Python or binary version), with its 100 fine labels",
        "data --split train --out data/cifar100/train --download",
        "data/cifar-100-binary --split test --out data/cifar100/test",
    )
    cifar100.add_argument("root", type=Path, metavar="ROOT", help="holds or is cifar-100-python or cifar-100-binary")
    cifar100.add_argument("--split", choices=SPLITS, required=True)
    cifar100.add_argument("--download", action="store_true", help="fetch it into ROOT (170 MB) unless it is there")
    svhn = _add_kind(
        kinds,
        "svhn",
        lambda given, scratch: {"": read_svhn(given.file)},
        "SVHN's cropped digits (train_32x32.mat, test_32x32.mat, extra_32x32.mat)",
        "train_32x32.mat --out data/svhn/train",
    )
    svhn.add_argument("file", type=Path, metavar="FILE")
    tiny = _add_kind(
        kinds,
        "tiny_imagenet",
        lambda given, scratch: {"": read_tiny_imagenet(given.root, given.split, scratch)},
        "Tiny ImageNet (tiny-imagenet-200.zip, unpacked); classes in the order of their WordNet ids, grey becomes RGB",
        "data --split train --out data/tiny_imagenet/train",
    )
    tiny.add_argument("root", type=Path, metavar="ROOT", help="holds or is tiny-imagenet-200")
    tiny.add_argument("--split", choices=TINY_SPLITS, required=True)
    reshard = _add_kind(
        kinds,
        "reshard",
        lambda given, scratch: {"": read_tars(given.files, given.dataset, scratch)},
        "WebDataset tars of single images (png, jpg, jpeg, webp, npy) with labels (cls, json)",
        "'other/{0000..0010}.tar' --dataset cifar10 --out data/other",
    )
    reshard.add_argument("files", nargs="+", metavar="TAR", help="path; braces are ranges: 'PATH/{0000..0010}.tar'")
    _add_dataset(reshard)
    idx = _add_kind(
        kinds,
        "idx",
        lambda given, scratch: {"": read_idx(given.images, given.labels, given.dataset)},
        "MNIST, Fashion-MNIST and the like: IDX files, plain or .gz",
        "train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --dataset mnist --out data/mnist/train",
    )
    idx.add_argument("images", type=Path, metavar="IMAGES")
    idx.add_argument("labels", type=Path, metavar="LABELS")
    _add_dataset(idx)
    _add_kind(
        kinds,
        "digits",
        lambda given, scratch: {split: read_digits(split, given.seed) for split in ("train", "test")},
        "scikit-learn's handwritten digits, without any download: DIR/train and DIR/test",
        "--out data/digits",
    )
    _add_cifar10n(kinds)
    return parser


def _add_cifar10n(kinds: Any) -> None:
    summary = "CIFAR-10N's human labels (CIFAR-10_human.pt) as an npz for data.real.noise.human_labels"
    example = (
        "python tools/shard_dataset.py cifar10n CIFAR-10_human.pt --shards data/cifar10/train --out data/cifar10n.npz"
    )
    parser = kinds.add_parser(
        "cifar10n", help=summary, description=summary, epilog=f"examples:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=lambda given: print(*convert_human_labels(given.file, given.shards, given.out), sep="\n"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="of CIFAR-10's training images")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new npz")


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`. At the end it is gone, and so are the parents made for it if they are empty."""
    made = [folder for folder in out.parents if not folder.exists()]
    scratch = temporary_sibling(out)
    try:
        make_folder(out.parent)
        with _writing(out):
            scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty, because all went well
                folder.rmdir()


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}). Choose another --out.") from error


def _summary(folder: Path, source: Source) -> str:
    shards = sorted(folder.glob("*.tar"))
    size = sum(path.stat().st_size for path in shards) / 1e6
    return (
        f"{folder}: {source.images.shape[0]} images of {len(source.class_names)} classes ({source.dataset}) in "
        f"{len(shards)} shard{'s'[: len(shards) != 1]}, {size:.1f} MB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    if "run" in arguments:
        arguments.run(arguments)
        return
    out = arguments.out if arguments.out.name else arguments.out.absolute()  # "." has no sibling
    require_new_folder(out)
    with _workplace(out) as scratch:
        sources = arguments.read(arguments, scratch)
        shards = scratch / "shards"
        for split, source in sources.items():
            write_shards(
                source, shards / split, block_size=arguments.block_size, shard_size=arguments.shard_size,
                seed=arguments.seed, progress=sys.stderr.isatty(),
            )  # fmt: skip
        with _writing(out):
            os.replace(shards, out)
            fsync_folder(out.parent)
    for split, source in sources.items():
        print(_summary(out / split, source))


if __name__ == "__main__":
    run_cli(main)
