"""Benchmarks: ratios of alternating measurements within one run.

    python tools/bench data                feeding: images per core-second against the usual loaders, and memory
    python tools/bench plan                an index of 50 million images: time to open, memory, time of a batch's ids
    python tools/bench convert             1,000,000 images of an npz -> shards: core-seconds and memory
    python tools/bench step                the training step against the textbook one: speed, forwards, equality; parts
    python tools/bench step --gpu          on one GPU: textbook, ours, ours with each lever switched; checks; under 4 minutes
    python tools/bench precision           the attack's final loss in bf16 and fp16 against float32, for every objective
    python tools/bench autoattack          AutoAttack by our evaluation against a direct call: images/s, different outcomes
    python tools/bench processes           one process against two; where the time of a step goes; start-up
    python tools/bench start               seconds to the first step: eager, compiled, compiled for a second time
    python tools/bench soak --minutes 10   two processes on remote shards: memory, descriptors, threads over time
    python tools/bench collapse recipes/fashion_mnist.yaml train.max_steps=300 --seeds 0-19
                                           runs that collapse to one class, with and without the recipe's remedies

Temporary files go to a folder (inside --work if given) that is removed at the end.
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `python tools/bench` puts tools/bench on the path instead of tools

from bench import loaders
from bench.against_package import autoattack, autoattack_profile
from bench.collapse import collapse, parse_seeds
from bench.data import convert, data, plan, run_contender, run_plan
from bench.gpu import step_gpu
from bench.precision import precision
from bench.processes import processes, starts
from bench.soak import run_soak, soak
from bench.step import step
from nrat_scale.attacks import parse_fraction
from nrat_scale.core.errors import run_cli


def machine() -> str:
    """Date, processor, cores and versions, in one line."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return (
        f"{datetime.date.today()}, {name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `run` takes a working folder and the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the temporary files (several GB)")
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")

    def add(name: str, run: Callable[..., Any], about: str, rounds: int | None = None) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=about)
        kind.set_defaults(run=run)
        if rounds is not None:
            kind.add_argument("--rounds", type=int, default=rounds, help="alternations (default: %(default)s)")
        return kind

    feed = add(
        "data",
        lambda work, given: data(work, given.images, given.rounds),
        "batches of 358 generated and 154 real images",
        3,
    )
    feed.add_argument("--images", type=int, default=200_000, help="generated images (default: %(default)s)")
    add("plan", lambda work, given: plan(work), "an index of 50 million images")
    conversion = add("convert", lambda work, given: convert(work, given.images), "npz -> shards")
    conversion.add_argument("--images", type=int, default=1_000_000, help="images (default: %(default)s)")
    _add_step_options(add("step", _step, "the training step", 10))
    low = add("precision", lambda work, given: precision(work, given.steps), "attacks in low precision")
    low.add_argument("--steps", type=int, default=40, help="training steps before (default: %(default)s)")
    against = "AutoAttack by our evaluation against a direct call of the package"
    _add_autoattack_options(add("autoattack", _autoattack, against))
    add("processes", lambda work, given: processes(work, given.rounds), "one process and two", 3)
    begun = add("start", _start, "seconds from the command to the first step, eager and compiled", 1)
    begun.add_argument("--model", default="resnet18_cifar", help="(default: %(default)s)")
    begun.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as data.batch_size=128")
    long = add("soak", lambda work, given: soak(work, given.minutes), "memory, descriptors and threads over time")
    long.add_argument("--minutes", type=float, default=10.0)
    collapsing = "runs that collapse to one class, with and without the recipe's remedies"
    _add_collapse_options(add("collapse", _collapse, collapsing))
    return parser.parse_args(argv)


def _add_step_options(kind: argparse.ArgumentParser) -> None:
    add = kind.add_argument
    add("--models", nargs="+", default=["resnet18_cifar", "wrn28_10_silu"])
    add("--batch", type=int, nargs="+", default=[32, 8], help="images, for each model (default: 32 8)")
    add("--gpu", action="store_true", help="WRN-28-10 at 512, ResNet-18 at 128 and 512 images: each lever, on one GPU")
    add("--seconds", type=float, default=230.0, help="budget of --gpu (default: %(default)s)")
    add("--out", type=Path, default=Path("step_gpu.json"), help="of --gpu (default: %(default)s)")


def _add_autoattack_options(kind: argparse.ArgumentParser) -> None:
    add = kind.add_argument
    add("--model", default="resnet18_cifar", help="of 32 x 32 images (default: %(default)s)")
    add("--images", type=int, default=256, help="(default: %(default)s)")
    add("--batch-size", type=int, default=256, help="of evaluation blocks (default: %(default)s)")
    add("--steps", type=int, default=60, help="training steps before (default: %(default)s)")
    add("--eps", type=parse_fraction, default=8 / 255, help="radius (default: 8/255)")
    add("--profile", action="store_true", help="no comparison: share of forward, backward and the attack's own work")
    add("--out", type=Path, help="JSON file (default: none)")
    add("overrides", nargs="*", metavar="key=value", help="of the recipe, such as optim.lr=0.1")


def _add_collapse_options(kind: argparse.ArgumentParser) -> None:
    add = kind.add_argument
    add("recipe", type=Path, metavar="RECIPE")
    add("overrides", nargs="*", metavar="key=value", help="of every run")
    add("--seeds", default="0-19", help="with the remedies; also of label noise (default: %(default)s)")
    add("--base-seeds", default="", help="without them (default: none)")
    add("--data", type=Path, metavar="SHARDS", help="test images: also measure natural and PGD-20 accuracy")
    add("--images", type=int, default=1000, help="of them (default: %(default)s)")
    add("--runs", type=Path, help="folder of the runs, which stay and are resumed (default: temporary)")
    add("--out", type=Path, help="JSON file of finished runs, which are not repeated")


def _autoattack(work: Path, given: argparse.Namespace) -> None:
    run = autoattack_profile if given.profile else autoattack
    run(work, given.model, given.images, given.batch_size, given.steps, given.out, *given.overrides, eps=given.eps)


def _start(work: Path, given: argparse.Namespace) -> None:
    starts(work, given.model, given.rounds, *given.overrides)


def _step(work: Path, given: argparse.Namespace) -> None:
    if given.gpu:
        step_gpu(work, given.out, given.seconds)
    else:
        step(work, given.models, given.rounds, dict(zip(given.models, given.batch, strict=True)))


def _collapse(work: Path, given: argparse.Namespace) -> None:
    collapse(work, given.recipe, given.overrides, _variants(given), given)


def _variants(given: argparse.Namespace) -> dict[str, list[int]]:
    named = {"remedy": given.seeds, "base": given.base_seeds}
    return {variant: parse_seeds(seeds) for variant, seeds in named.items() if seeds}


# Measurements that need a process of their own: `python tools/bench NAME ARGUMENTS`, started by the benchmarks.
INNER: dict[str, Callable[..., None]] = {
    "loader-files": lambda kind, folder: loaders.write(kind, Path(folder)),
    "contender": lambda name, folder: run_contender(name, Path(folder)),
    "plan-process": lambda folder: run_plan(Path(folder)),
    "soak-process": lambda url, cache, rank, seconds: run_soak(url, cache, int(rank), float(seconds)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in INNER:
        INNER[argv[0]](*argv[1:])
        return
    given = parse(argv)
    print(f"# {given.kind}: {machine()}", flush=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        given.run(Path(work), given)


if __name__ == "__main__":
    run_cli(main)
