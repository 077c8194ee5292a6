"""Convert an image data set into shards: verified, randomly accessible WebDataset tars; look after shards.

    python tools/shard_dataset.py digits --out data/digits
    python tools/shard_dataset.py cifar10 data --split train --out data/cifar10/train --download
    python tools/shard_dataset.py npz 1m.npz --dataset cifar10 --out data/cifar10_1m
    python tools/shard_dataset.py reshard 'other/{0000..0010}.tar' --dataset cifar10 --out data/other
    python tools/shard_dataset.py idx train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --dataset mnist --out data/mnist
    python tools/shard_dataset.py verify data/cifar10_1m
    python tools/shard_dataset.py push data/cifar10_1m hf://datasets/USER/REPO

The way of an image: a reader below gives a `Source`, whose images stay on disk (memory maps: an npz of 150 GB needs no
more memory than a small one) -> `write_shards` permutes them by --seed and writes blocks -> everything was written
beside --out (in .OUT.unfinished) and is renamed at the end, so --out is whole or not there. The same command goes on where
a killed one stopped: finished shards are verified and kept.

A new format is one reader that returns a `Source`, and one block in `_parser`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import run_cli
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare import info as info_module
from nrat_scale.prepare import merge_subset
from nrat_scale.prepare import push as push_module
from nrat_scale.prepare import verify as verify_module
from nrat_scale.prepare.cifar10n import convert_human_labels
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.cifar import SPLITS, read_cifar10, read_cifar100
from nrat_scale.prepare.readers.digits import read_digits
from nrat_scale.prepare.readers.idx import read_idx
from nrat_scale.prepare.readers.npz import read_npz
from nrat_scale.prepare.readers.svhn import read_svhn
from nrat_scale.prepare.readers.tars import read_tars
from nrat_scale.prepare.readers.tiny_imagenet import TINY_SPLITS, read_tiny_imagenet
from nrat_scale.prepare.staging import hidden_sibling, unfinished
from nrat_scale.prepare.writer import BLOCK_SIZE, SHARD_SIZE, write_into

# ---- the command line -----------------------------------------------------------------------------------------------


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _add_command(
    kinds: Any, kind: str, run: Callable[[argparse.Namespace], str], summary: str, *examples: str
) -> argparse.ArgumentParser:
    """A subcommand with its help; `run` does it and returns what to print."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        kind,
        help=summary,
        description=summary,
        epilog="\n  ".join(["examples:", *(f"python tools/shard_dataset.py {kind} {text}" for text in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(kind=kind, run=run)
    return parser


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """The options of every subcommand that writes shards."""
    sizes: dict[str, Any] = {"type": _at_least_one, "metavar": "N"}
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    add("--block-size", default=BLOCK_SIZE, help="images in a block (default: %(default)s)", **sizes)
    add("--shard-size", default=SHARD_SIZE, help="images in a shard, in whole blocks (default: %(default)s)", **sizes)
    add("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default: %(default)s)")
    add("--jobs", default=1, help="processes that write shards (default: %(default)s); changes no byte", **sizes)
    add("--push", metavar="ADDRESS", help="then upload them: hf://datasets/USER/REPO[@REVISION]")


def _add_kind(
    kinds: Any,
    kind: str,
    read: Callable[[argparse.Namespace, Path], dict[str, LabelledArrays]],
    summary: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """A format; `read` gives the sources, named by their folder in --out ("" is --out)."""
    parser = _add_command(kinds, kind, _convert, summary, *examples)
    parser.set_defaults(read=read)
    _add_writing(parser)
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
    _add_admin(kinds)
    return parser


def _add_admin(kinds: Any) -> None:
    """The subcommands for shards that exist."""
    place: dict[str, Any] = {"metavar": "DIR", "help": "folder of shards, or its address (https://, s3://, hf://)"}
    verify = _add_command(
        kinds,
        "verify",
        lambda given: verify_module.verify(given.where),
        "check every byte of shards, and that they are what their index says",
        "data/cifar10_1m",
        "hf://datasets/USER/REPO",
    )
    verify.add_argument("where", **place)
    info = _add_command(
        kinds,
        "info",
        lambda given: info_module.info(given.where, given.sheet),
        "what is in shards: counts, classes, source files, order; a contact sheet",
        "data/cifar10_1m --sheet data/sheet.png",
    )
    info.add_argument("where", **place)
    info.add_argument("--sheet", type=Path, metavar="FILE.png", help="new image with samples, one row for each class")
    merge = _add_command(
        kinds,
        "merge",
        lambda given: merge_subset.merge(given.folders, given.out),
        "one index over several folders of shards that lie below it; nothing is copied",
        "data/all/first data/all/second --out data/all/index.json",
    )
    merge.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="in the order of the source ids")
    merge.add_argument(
        "--out", type=Path, required=True, metavar="PARENT/index.json", help="new index; every DIR lies in PARENT"
    )
    subset = _add_command(
        kinds,
        "subset",
        _subset,
        "some samples of shards, under their source ids: exactly one of --per-class, --ids, --scores",
        "data/cifar10_1m --per-class 500 --out data/cifar10_5k",
        "data/cifar10_1m --ids data/kept.txt --out data/kept",
        "data/cifar10_1m --scores data/scores.npy --keep 0.8 --out data/best",
    )
    subset.add_argument("where", **place)
    subset.add_argument("--per-class", type=_at_least_one, metavar="N", help="N of each class, drawn with --seed")
    subset.add_argument("--ids", type=Path, metavar="FILE", help="source ids: .npy (integers), or .txt (one a line)")
    subset.add_argument("--scores", type=Path, metavar="FILE.npy", help="one number for each source id; see --keep")
    subset.add_argument("--keep", metavar="N", help="with --scores: keep the N highest, or a fraction such as 0.8")
    _add_writing(subset)
    push = _add_command(
        kinds,
        "push",
        lambda given: push_module.push(given.folder, given.address),
        "verify shards and upload them to the Hugging Face Hub (token from HF_TOKEN or `hf auth login`)",
        "data/cifar10_1m hf://datasets/USER/REPO",
    )
    push.add_argument("folder", type=Path, metavar="DIR")
    push.add_argument("address", metavar="ADDRESS", help="hf://datasets/USER/REPO[@REVISION]")


def _add_cifar10n(kinds: Any) -> None:
    parser = _add_command(
        kinds,
        "cifar10n",
        lambda given: "\n".join(convert_human_labels(given.file, given.shards, given.out)),
        "CIFAR-10N's human labels (CIFAR-10_human.pt) as an npz for data.real.noise.human_labels",
        "CIFAR-10_human.pt --shards data/cifar10/train --out data/cifar10n.npz",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="of CIFAR-10's training images")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new npz")


def _subset(given: argparse.Namespace) -> str:
    return merge_subset.subset(
        given.where, given.out, per_class=given.per_class, ids=given.ids, scores=given.scores, keep=given.keep,
        seed=given.seed, block_size=given.block_size, shard_size=given.shard_size, jobs=given.jobs,
        progress=sys.stderr.isatty(),
    )  # fmt: skip


def _summary(folder: Path, source: LabelledArrays) -> str:
    shards = sorted(folder.glob("*.tar"))
    size = sum(path.stat().st_size for path in shards) / 1e6
    return (
        f"{folder}: {source.images.shape[0]} images of {len(source.class_names)} classes ({source.dataset}) in "
        f"{len(shards)} shard{'s'[: len(shards) != 1]}, {size:.1f} MB"
    )


# Neither changes what is written: another start may go on with other ones.
_WITHOUT_EFFECT = ("out", "jobs", "download", "push")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the command line decides the images beside the input files, which are known by their hashes."""
    return {
        key: value
        for key, value in vars(arguments).items()
        if key not in _WITHOUT_EFFECT and isinstance(value, str | int | float | None)
    }


def _convert(arguments: argparse.Namespace) -> str:
    with unfinished(arguments.out) as work:
        sources = arguments.read(arguments, work.scratch)
        for split, source in sources.items():
            write_into(
                work, source, split, block_size=arguments.block_size, shard_size=arguments.shard_size,
                seed=arguments.seed, jobs=arguments.jobs, options=_options(arguments), progress=sys.stderr.isatty(),
            )  # fmt: skip
    return "\n".join(_summary(arguments.out / split, source) for split, source in sources.items())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    address = getattr(arguments, "push", None)
    if address is not None:
        push_module.parse_address(address)  # a mistake in it must not cost a conversion
    try:
        print(arguments.run(arguments), flush=True)
    except KeyboardInterrupt:
        if hasattr(arguments, "out") and (kept := hidden_sibling(arguments.out.absolute())).exists():
            print(f"What is finished stays in {kept}: the same command goes on with it.", file=sys.stderr)
        raise
    if address is not None:
        print(push_module.push(arguments.out, address))


if __name__ == "__main__":
    run_cli(main)
