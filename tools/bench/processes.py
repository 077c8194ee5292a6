"""Training in processes of its own: one against two, start-up time, and where the time of a step goes."""

import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench.step import make_images, spread, write_recipe


def processes(work: Path, rounds: int) -> None:
    """Print the speed of one and two processes (one thread and the same images each), start-up time, and a profile."""
    make_images(work)
    recipe = write_recipe(work, "processes", "resnet18_cifar", "nrat", 8)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for count in (1, 2):
            rates[count].append(_images_per_second(recipe, work / f"run{number}-{count}", count))
    ratios = [two / (2 * one) for one, two in zip(rates[1], rates[2], strict=True)]
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    print(f"images/s: one process {one:.2f}, two {two:.2f}; two / (2 x one) = {spread(ratios)}")
    starts = [_startup_seconds(recipe, work / f"start{number}")[0] for number in range(rounds)]
    print(f"from the command to the end of the first step, batch 8: {statistics.median(starts):.1f} s")
    out = _launch(recipe, work / "profiled", 1, "data.batch_size=16", "train.max_steps=6", flags=["--profile", "4"])
    print(out[out.index("profile of") :].split("\nbest")[0].strip())


def _images_per_second(recipe: Path, run: Path, count: int) -> float:
    out = _launch(recipe, run, count, f"data.batch_size={8 * count}", "train.max_steps=6", "train.log_every=2")
    return float(re.findall(r"([0-9.]+) img/s", out)[-1])


def _launch(recipe: Path, run: Path, count: int, *overrides: str, flags: Iterable[str] = ()) -> str:
    """Train with `count` processes on as many cores; returns the output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "-m", "nrat_scale.train"]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:count])
    done = subprocess.run(
        ["taskset", "-c", cores, *command, str(recipe), f"run_dir={run}", "train.validation_attack=pgd1", *overrides, *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{count} process(es)" in done.stdout, "the launcher must start all processes"
    return done.stdout


def starts(work: Path, model: str, rounds: int, *overrides: str) -> None:
    """Print what starting a run of one step costs: eager, and compiled for the first and a second time.

    CPU seconds are those of the whole run and of the processes that it starts, for machines that other work shares.

    Args:
        overrides: of the recipe, for instance `data.batch_size=128`.
    """
    make_images(work)
    recipe = write_recipe(work, "starts", model, "nrat", 8)
    print(
        "| start | to the end of the first step, s | CPU s of the run | of the former torch.compile | compiled | read |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name, compiled, empty in (
        ("eager", "false", True),
        ("compiled, empty cache", "true", True),
        ("compiled, second start", "true", False),
    ):
        seconds, cpu, line = list[float](), list[float](), ""
        for number in range(rounds):
            cache = work / f"cache{number}"
            run = work / f"{name}{number}".replace(" ", "-")
            assert empty is not any(cache.rglob("fxgraph")), "a second start finds what the first has left"
            before = _cpu_seconds_of_children()
            took, line = _startup_seconds(recipe, run, f"train.compile={compiled}", *overrides, cache=cache)
            seconds.append(took)
            cpu.append(_cpu_seconds_of_children() - before)
        found = re.search(r"(\d+) graphs compiled, (\d+) read from .*, ([0-9.]+) s", line)
        cells = (found[3], found[1], found[2]) if found else ("0", "0", "0")
        each = f" ({', '.join(f'{value:.1f}' for value in seconds)})" if rounds > 1 else ""
        print(
            f"| {name} | {statistics.median(seconds):.1f}{each} | {statistics.median(cpu):.1f} | {' | '.join(cells)} |",
            flush=True,
        )


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _startup_seconds(recipe: Path, run: Path, *overrides: str, cache: Path | None = None) -> tuple[float, str]:
    """(seconds from the command to the end of the first step, what it said about torch.compile)."""
    given = ["data.batch_size=8", "train.max_steps=1", "train.log_every=1", "train.validation_attack=pgd1", *overrides]
    command = [sys.executable, "-m", "nrat_scale.train", str(recipe), f"run_dir={run}", *given]
    environment = {**os.environ} if cache is None else {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    begun, compiled = time.perf_counter(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            compiled = line if line.startswith("torch.compile") else compiled
            if line.startswith("step 1/"):
                break
        seconds = time.perf_counter() - begun
        process.communicate()
    assert process.returncode == 0
    return seconds, compiled
