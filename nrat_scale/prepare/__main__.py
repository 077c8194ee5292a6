"""Convert an image data set into shards (verified, randomly accessible WebDataset tars), or maintain shards.

    python -m nrat_scale.prepare digits --out data/digits
    python -m nrat_scale.prepare cifar10 data --split train --out data/cifar10/train --download
    python -m nrat_scale.prepare npz 1m.npz --dataset cifar10 --out data/cifar10_1m
    python -m nrat_scale.prepare verify data/cifar10_1m
    python -m nrat_scale.prepare push data/cifar10_1m hf://datasets/USER/REPO

Images are permuted with --seed. The same input and options give the same bytes. --out is whole or absent.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nrat_scale.core.errors import run_cli
from nrat_scale.prepare import download
from nrat_scale.prepare.cifar10n import convert_human_labels
from nrat_scale.prepare.info import info
from nrat_scale.prepare.merge import merge
from nrat_scale.prepare.push import push, push_address
from nrat_scale.prepare.readers import READERS, Argument, Reader, argument
from nrat_scale.prepare.subset import BESIDE, subset
from nrat_scale.prepare.template import write_template
from nrat_scale.prepare.verify import verify
from nrat_scale.prepare.writer import BLOCK_SIZE, SHARD_SIZE, convert

_PROGRAM = "python -m nrat_scale.prepare"


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


_SIZE: dict[str, Any] = {"type": _at_least_one, "metavar": "N"}
_WRITING = (
    argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards"),
    argument("--block-size", default=BLOCK_SIZE, help="images per block (default: %(default)s)", **_SIZE),
    argument("--shard-size", default=SHARD_SIZE, help="images per shard (default: %(default)s)", **_SIZE),
    argument("--seed", type=int, default=0, metavar="N", help="of every random choice (default: %(default)s)"),
    argument("--push", metavar="ADDRESS", help="then upload the shards to hf://datasets/USER/REPO[@REVISION]"),
)
_SELECTION = ("per_class", "without", "by_confidence", "ids", "scores", "keep")
_WHERE = argument("where", metavar="DIR", help="folder of shards, or its address (https://, s3://, hf://)")


def _options(given: argparse.Namespace, *more: str) -> dict[str, Any]:
    options = {name: getattr(given, name) for name in ("block_size", "shard_size", "seed", *more)}
    return {**options, "progress": sys.stderr.isatty()}


class Command(NamedTuple):
    """One command; `run` returns the lines to print."""

    run: Callable[[argparse.Namespace], Iterable[str]]
    summary: str
    arguments: Sequence[Argument]
    examples: Sequence[str]


def _conversion(reader: Reader) -> Command:
    return Command(
        lambda given: [convert(lambda scratch: reader.read(given, scratch), given.out, **_options(given))],
        reader.summary,
        (*reader.arguments, *_WRITING),
        reader.examples,
    )


COMMANDS: dict[str, Command] = {  # besides those of `READERS`
    "cifar10n": Command(
        lambda given: [convert_human_labels(given.file, given.shards, given.out)],
        "convert CIFAR-10N's human labels (CIFAR-10_human.pt) to an npz for data.real.noise.human_labels",
        (
            argument("file", type=Path, metavar="FILE"),
            argument("--shards", type=Path, required=True, metavar="DIR", help="of CIFAR-10's training images"),
            argument("--out", type=Path, required=True, metavar="FILE", help="new npz"),
        ),
        ("CIFAR-10_human.pt --shards data/cifar10/train --out data/cifar10n.npz",),
    ),
    "download": Command(
        lambda given: [download.listing()] if given.list else download.download(given.names, given.to),
        "download published generated data; resumes, and verifies size and sha256",
        (
            argument("names", nargs="*", metavar="NAME", help="a name of --list, or hf://datasets/USER/REPO/FILE"),
            argument("--to", type=Path, default=Path("data/downloads"), metavar="DIR", help="default: %(default)s"),
            argument("--list", action="store_true", help="show the names and their files"),
        ),
        ("--list", "cifar10_1m", "cifar10_20m cifar100_1m --to /big/disk"),
    ),
    "verify": Command(
        lambda given: [verify(given.where)],
        "check every byte of shards, and that they match their index",
        (_WHERE,),
        ("data/cifar10_1m", "hf://datasets/USER/REPO"),
    ),
    "info": Command(
        lambda given: [info(given.where, given.sheet)],
        "describe shards: counts, classes, source files, stored order; a contact sheet",
        (_WHERE, argument("--sheet", type=Path, metavar="FILE.png", help="new image: samples, one row per class")),
        ("data/cifar10_1m --sheet data/sheet.png",),
    ),
    "template": Command(
        lambda given: [write_template(given.where, given.out, given.generated, given.validation)],
        "write a commented recipe that fits shards, and say how to train it",
        (
            argument("where", metavar="ROOT", help="folder of shards (or one with `train` in it), or an address"),
            argument("--generated", metavar="SHARDS", help="generated images for 70 %% of every batch"),
            argument("--validation", metavar="SHARDS", help="images that select the checkpoint (default: held out)"),
            argument("--out", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="default: %(default)s"),
        ),
        ("data/pets", "data/pets/train --validation data/pets/checked --out pets.yaml"),
    ),
    "merge": Command(
        lambda given: [merge(given.folders, given.out)],
        "write the index PARENT/index.json over several folders of shards in PARENT, without copying them",
        (
            argument("folders", type=Path, nargs="+", metavar="DIR", help="in the order of the source ids"),
            argument("--out", type=Path, required=True, metavar="PARENT/index.json", help="new index"),
        ),
        ("data/all/first data/all/second --out data/all/index.json",),
    ),
    "subset": Command(
        lambda given: [subset(given.where, given.out, **_options(given, *_SELECTION))],
        "write some samples of shards, under their source ids: exactly one of --per-class, --ids, --scores",
        (
            _WHERE,
            argument("--per-class", help="N of each class, drawn with --seed", **_SIZE),
            argument("--without", metavar="SHARDS", help="with --per-class: none of another subset of the same shards"),
            argument(
                "--by-confidence",
                nargs="?",
                const=BESIDE,
                metavar="AUDIT",
                help="with --per-class: the N whose label is most probable in an audit (default: DIR-audit), not drawn",
            ),
            argument("--ids", type=Path, metavar="FILE", help="source ids: .npy (integers), or .txt (one per line)"),
            argument("--scores", type=Path, metavar="FILE.npy", help="one number for each source id; see --keep"),
            argument("--keep", metavar="N", help="with --scores: keep the N highest, or a fraction such as 0.8"),
            *_WRITING,
        ),
        (
            "data/cifar10_1m --per-class 500 --out data/cifar10_5k",
            "data/cifar10_5m --by-confidence data/audit --per-class 100000 --out data/cifar10_best",
            "data/cifar10_1m --ids data/kept.txt --out data/kept",
            "data/cifar10_1m --scores data/scores.npy --keep 0.8 --out data/best",
        ),
    ),
    "push": Command(
        lambda given: [push(given.folder, given.address)],
        "verify shards and upload them to the Hugging Face Hub (token from HF_TOKEN or `hf auth login`)",
        (
            argument("folder", type=Path, metavar="DIR"),
            argument("address", metavar="ADDRESS", help="hf://datasets/USER/REPO[@REVISION]"),
        ),
        ("data/cifar10_1m hf://datasets/USER/REPO",),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands: those of `READERS`, and `COMMANDS`."""
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=__doc__, **style)
    parsers = parser.add_subparsers(required=True, metavar="COMMAND", help="`COMMAND --help` shows its options")
    for name, command in ({name: _conversion(reader) for name, reader in READERS.items()} | COMMANDS).items():
        examples = "\n  ".join(["examples:", *(f"{_PROGRAM} {name} {example}" for example in command.examples)])
        added = parsers.add_parser(name, help=command.summary, description=command.summary, epilog=examples, **style)
        for flag, options in command.arguments:
            added.add_argument(flag, **options)
        added.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    given = build_parser().parse_args(argv)
    push_to = getattr(given, "push", None)
    if push_to is not None:
        push_address(push_to)  # checked before a conversion that may take hours
    for line in given.run(given):
        print(line, flush=True)
    if push_to is not None:
        print(push(given.out, push_to))


if __name__ == "__main__":
    run_cli(main)
