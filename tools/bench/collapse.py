"""How often training collapses to one class, with and without the recipe's remedies, and what they cost in accuracy."""

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json, write_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.evaluate.statistics import wilson

# What undoes the remedies of a recipe.
BASE = ["objective.warm_start=0", "optim.per=epoch", "guard.action=none"]
# Row of one run: variant, seed, overrides, steps, training accuracy of the last epoch, rewinds; test accuracies if asked.
Row = dict[str, Any]
_CHANCES = 1.5  # a run has collapsed if it ends with at most this many times the accuracy of chance
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the last one is used and is too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def parse_seeds(text: str) -> list[int]:
    """`0-3,7` as [0, 1, 2, 3, 7]; raises `UserError` for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        numbers = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else range(0)
        if not numbers:
            raise UserError(f"'{text}' is not a list of seeds. Write for instance 0-19 or 0-3,7.")
        seeds += numbers
    return seeds


def collapse(work: Path, recipe: Path, overrides: Sequence[str], seeds: dict[str, list[int]], given: Any) -> None:
    """Train each seed of each variant (`remedy`, `base`) in a process of its own, and print a row each and the counts.

    Args:
        given: `out`, a file of finished rows, which are not repeated; `runs`, a folder for the runs instead of `work`;
            `data`, test shards to evaluate on, or None; `images`, how many of them.
    """
    finished = read_json(given.out, "file of finished runs") if given.out and given.out.is_file() else {}
    rows: list[Row] = finished.get("runs", [])
    print(
        "| variant | seed | steps | training accuracy | rewinds | collapsed | natural | PGD-20 |",
        f"|{8 * '---|'}",
        sep="\n",
    )
    for seed in sorted({seed for several in seeds.values() for seed in several}):
        for variant in (name for name, several in seeds.items() if seed in several):
            wanted = {"recipe": recipe.name, "variant": variant, "seed": seed, "overrides": list(overrides)}
            row = next((row for row in rows if wanted.items() <= row.items()), None)
            if row is None or (given.data and "natural" not in row):
                rows = [other for other in rows if other is not row]
                run = (given.runs or work) / f"{recipe.stem}-{variant}-{seed}"
                row = {**wanted, **_run(run, recipe, variant, seed, overrides, given)}
                rows.append(row)
                if given.out:
                    write_json(given.out, {"runs": rows})
            print(_line(row), flush=True)
    mine = [row for row in rows if row["recipe"] == recipe.name and row["overrides"] == list(overrides)]
    for sentence in summary(mine):
        print(sentence)


def _run(run: Path, recipe: Path, variant: str, seed: int, overrides: Sequence[str], given: Any) -> Row:
    changes = [*(BASE if variant == "base" else ()), f"seed={seed}", f"data.real.noise.seed={seed}", *overrides]
    _command("nrat_scale.train", recipe, f"run_dir={run}", *changes)
    metrics = RunFolder(run).read_metrics()
    last = [row for row in metrics if row["kind"] == "train"][-1]
    accuracy = last["natural_accuracy"] if last["natural_accuracy"] is not None else last["robust_accuracy"]
    classes = len(json.loads(RunFolder(run).model.read_text())["class_names"])
    row = {
        "steps": last["step"],
        "training_accuracy": round(accuracy, 4),
        "rewinds": sum(row["kind"] == "guard" for row in metrics),
        "collapsed": accuracy <= _CHANCES / classes,
    }
    if given.data:
        attacks = ["--attacks", "natural,pgd20", "--checkpoint", "last", "--images", given.images]
        _command("nrat_scale.evaluate", run, "--data", given.data, *attacks)
        measured = json.loads(RunFolder(run).results.read_text())["checkpoints"]["last"]["attacks"]
        row |= {name: round(100 * measured[name]["accuracy"], 2) for name in ("natural", "pgd20")}
    return row


def _command(module: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{module} {' '.join(map(str, arguments))} failed: {done.stderr.strip()}")


def _line(row: Row) -> str:
    tested = (f"{row[name]:.1f}" if name in row else "-" for name in ("natural", "pgd20"))
    cells = row["variant"], row["seed"], row["steps"], f"{100 * row['training_accuracy']:.1f} %", row["rewinds"]
    return f"| {' | '.join(map(str, (*cells, 'yes' if row['collapsed'] else 'no', *tested)))} |"


def summary(rows: Sequence[Row]) -> list[str]:
    """Collapses of each variant with a 95 % Wilson interval, and the differences of the seeds that both variants have."""
    sentences = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        count, rewound = sum(row["collapsed"] for row in mine), sum(row["rewinds"] > 0 for row in mine)
        low, high = (100 * bound for bound in wilson(count, len(mine)))
        interval = f"{100 * count / len(mine):.0f} %, 95 % interval {low:.0f} to {high:.0f} %"
        sentences.append(f"{variant}: {count} of {len(mine)} runs collapsed ({interval}); {rewound} were rewound")
    for name in ("natural", "pgd20"):
        by_seed: dict[str, dict[int, float]] = {
            variant: {row["seed"]: row[name] for row in rows if row["variant"] == variant and name in row}
            for variant in ("remedy", "base")
        }
        both = sorted(by_seed["remedy"].keys() & by_seed["base"].keys())
        if len(both) > 1:
            differences = [by_seed["remedy"][seed] - by_seed["base"][seed] for seed in both]
            mean, half = paired(differences)
            sentences.append(
                f"{name}: remedy minus base {mean:+.2f} points, 95 % interval {mean - half:+.2f} to {mean + half:+.2f} "
                f"(Student's t, {len(both)} seeds: {', '.join(f'{value:+.1f}' for value in differences)})"
            )
    return sentences


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two paired differences, and half the width of its 95 % interval by Student's t."""
    n = len(differences)
    return statistics.mean(differences), _T[min(n - 1, len(_T)) - 1] * statistics.stdev(differences) / math.sqrt(n)
