"""Benchmarks that anyone can run: ratios taken in one run, alternating.

    python tools/bench.py data                feeding: images per core-second against the usual loaders, and memory
    python tools/bench.py plan                an index of 50 million images: time to open, memory, time of a batch's ids
    python tools/bench.py convert             1,000,000 images of an npz -> shards: core-seconds and memory
    python tools/bench.py step                the training step against the textbook one: speed, forwards, equality; parts
    python tools/bench.py precision           the attack's final loss in bf16 and fp16 against float32, for every objective
    python tools/bench.py processes           one process against two; where the time of a step goes; start-up
    python tools/bench.py soak --minutes 10   two processes on remote shards: memory, descriptors, threads over time

Everything is made in a temporary folder (--work for another place) and removed at the end.
"""

import argparse
import datetime
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import bench_data
import bench_step
from nrat_scale.core.errors import run_cli


def machine() -> str:
    """One line that says what ran: date, processor, cores, versions."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return (
        f"{datetime.date.today()}, {name}, {len(__import__('os').sched_getaffinity(0))} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the temporary files (several GB)")
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    data = kinds.add_parser("data", help="feeding a batch of 358 generated and 154 real images")
    data.add_argument("--images", type=int, default=200_000, help="generated images (default: %(default)s)")
    data.add_argument("--rounds", type=int, default=3, help="alternations (default: %(default)s)")
    kinds.add_parser("plan", help="an index of 50 million images")
    convert = kinds.add_parser("convert", help="npz -> shards")
    convert.add_argument("--images", type=int, default=1_000_000, help="images (default: %(default)s)")
    step = kinds.add_parser("step", help="the training step")
    step.add_argument("--models", nargs="+", default=["resnet18_cifar", "wrn28_10_silu"])
    step.add_argument("--rounds", type=int, default=10, help="alternations (default: %(default)s)")
    step.add_argument("--batch", type=int, nargs="+", default=[32, 8], help="images, for each model (default: 32 8)")
    precision = kinds.add_parser("precision", help="attacks in low precision")
    precision.add_argument("--steps", type=int, default=40, help="of training before (default: %(default)s)")
    processes = kinds.add_parser("processes", help="one process and two")
    processes.add_argument("--rounds", type=int, default=3, help="alternations (default: %(default)s)")
    soak = kinds.add_parser("soak", help="memory, descriptors and threads over time")
    soak.add_argument("--minutes", type=float, default=10.0)
    contender = kinds.add_parser("contender")  # one row of `data`, in a process of its own
    contender.add_argument("name", choices=list(bench_data.CONTENDERS))
    contender.add_argument("folder", type=Path)
    rank = kinds.add_parser("soak-rank")  # one process of `soak`
    rank.add_argument("url")
    rank.add_argument("cache")
    rank.add_argument("rank", type=int)
    rank.add_argument("seconds", type=float)
    given = parser.parse_args(argv)
    if given.kind == "contender":
        bench_data.run_contender(given.name, given.folder)
        return
    if given.kind == "soak-rank":
        bench_data.run_soak_rank(given.url, given.cache, given.rank, given.seconds)
        return
    print(f"# {given.kind}: {machine()}", flush=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        if given.kind == "data":
            bench_data.data(Path(work), given.images, given.rounds)
        elif given.kind == "plan":
            bench_data.plan(Path(work))
        elif given.kind == "convert":
            bench_data.convert(Path(work), given.images)
        elif given.kind == "step":
            bench_step.step(Path(work), given.models, given.rounds, dict(zip(given.models, given.batch, strict=True)))
        elif given.kind == "precision":
            bench_step.precision(Path(work), given.steps)
        elif given.kind == "processes":
            bench_step.processes(Path(work), given.rounds)
        else:
            bench_data.soak(Path(work), given.minutes)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_cli(main)
