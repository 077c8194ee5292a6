"""Tables that compare runs: accuracies with the runs as columns, paired differences, mean and deviation over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.evaluate.results import Outcome
from nrat_scale.evaluate.statistics import beyond_chance, paired, paired_interval
from nrat_scale.recipe import stored_values
from nrat_scale.report.run import Run, Score, threat_at, value_at
from nrat_scale.report.tables import Cell, Table, attack_columns

# Fields of an entry in results.json that say which attack it was; two entries are compared if all are equal.
_ATTACK_FIELDS = (
    "attack", "attack_version", "components", "norm", "eps", "space", "step", "steps", "restarts", "source",
    "without_images_broken_by", "seed", "attacks",
)  # fmt: skip


def checkpoints(runs: Sequence[Run]) -> list[str]:
    """The evaluated checkpoints of all runs; `best = last` alone if it is the only one."""
    names = dict.fromkeys(row.checkpoint for run in runs for row in run.rows)
    if "best = last" in names and names.keys() & {"best", "last"}:
        names = dict.fromkeys(["best", "last", *(name for name in names if name != "best = last")])
    order = {"best": 0, "best = last": 0, "last": 1}
    return sorted(names, key=lambda name: order.get(name, 2))


def _attacks(runs: Sequence[Run], checkpoint: str) -> list[str]:
    """The attacks that any run met, in the order of the results table."""
    rows = [row for run in runs if (row := run.row_of(checkpoint))]
    measured = {attack for row in rows for attack in row.scores}
    return [attack for attack in attack_columns(rows) if attack in measured]


def accuracy_table(runs: Sequence[Run]) -> Table:
    """Checkpoints and attacks as rows, runs as columns."""
    rows: list[tuple[Cell, ...]] = []
    for checkpoint in checkpoints(runs):
        for attack in _attacks(runs, checkpoint):
            scores = [row.scores.get(attack) if (row := run.row_of(checkpoint)) else None for run in runs]
            if attack == "worst" and not _comparable(
                [run for run in runs if _entry(run, checkpoint, attack)], checkpoint, attack
            ):
                continue  # over different attacks
            rows.append((checkpoint, attack_title(attack), *scores))
    caption = "Test accuracy in %, its 95 % Wilson interval and the number of images n."
    return Table("accuracies", caption, ("checkpoint", "attack", *(run.name for run in runs)), rows)


def difference_table(runs: Sequence[Run]) -> Table | None:
    """Each other run minus the first one, image by image; None if no outcome of two runs can be paired."""
    first, *others = runs
    rows: list[tuple[Cell, ...]] = []
    for checkpoint in checkpoints(runs):
        for attack in _attacks([first], checkpoint):
            cells = [_difference(first, other, checkpoint, attack) for other in others]
            if any(cells):
                rows.append((checkpoint, attack_title(attack), *cells))
    caption = (
        f"Accuracy minus that of {first.name} in points, on the images that both were tested on (n), with the 95 % interval of "
        "paired proportions (Newcombe 1998). A star marks differences beyond chance (McNemar's exact test, 5 %)."
    )
    head = ("checkpoint", "attack", *(run.name for run in others))
    return Table("differences", caption, head, rows) if rows else None


def _difference(first: Run, other: Run, checkpoint: str, attack: str) -> Score | None:
    if not _comparable([first, other], checkpoint, attack):
        return None
    one, two = _outcome(other, checkpoint, attack), _outcome(first, checkpoint, attack)
    if one is None or two is None:
        return None
    pair = paired(one, two)
    if not pair.n:
        return None
    low, high = paired_interval(pair)
    more, fewer = sorted((pair.only_first_broke, pair.only_second_broke), reverse=True)
    points = 100 * (pair.right - pair.other_right) / pair.n
    return Score(points, 100 * low, 100 * high, pair.n, is_difference=True, starred=beyond_chance(more, fewer))


def _entry(run: Run, checkpoint: str, attack: str) -> dict[str, Any]:
    row = run.row_of(checkpoint)
    record = run.record(row.label) if row else {}
    found = record.get("worst") if attack == "worst" else value_at(record, "attacks", {}).get(attack)
    return found if isinstance(found, dict) else {}


def _comparable(runs: Sequence[Run], checkpoint: str, attack: str) -> bool:
    """Whether all of `runs` were attacked alike on the same test images."""
    described = {
        repr([value_at(run.results, "data.fingerprint", run.path), threat_at(run.results)])
        + repr([_entry(run, checkpoint, attack).get(name) for name in _ATTACK_FIELDS])
        for run in runs
    }
    return len(described) == 1


def _outcome(run: Run, checkpoint: str, attack: str) -> Outcome | None:
    """The outcome of each image; of the worst case, on the images that all attacks saw."""
    row = run.row_of(checkpoint)
    if row is None or attack not in row.scores:
        return None
    if attack != "worst":
        return run.outcomes.get(f"{row.label}/{attack}")
    found = [run.outcomes.get(f"{row.label}/{name}") for name in row.scores if name != "worst"]
    known = [outcome for outcome in found if outcome is not None]
    if len(known) < len(found):
        return None
    # `worst` is a score of the row only if all attacks saw the same images.
    ids = known[0][0]
    right = [one[1][np.argsort(one[0])] for one in known]
    return np.sort(ids), np.logical_and.reduce(right)


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of at least two runs whose recipes differ in their seeds and in nothing else."""
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        if run.recipe:
            values, seeds = stored_values(run.recipe)
            groups.setdefault(repr(sorted(values.items(), key=str)), {}).setdefault(
                repr(sorted(seeds.items(), key=str)), run
            )
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def seed_table(runs: Sequence[Run]) -> Table | None:
    """Mean and standard deviation over seeds; None if no two runs differ in seeds only."""
    rows: list[tuple[Cell, ...]] = []
    for group in seed_groups(runs):
        for checkpoint in checkpoints(group):
            for attack in _attacks(group, checkpoint):
                found = [row.scores.get(attack) if (row := run.row_of(checkpoint)) else None for run in group]
                scores = [score for score in found if score is not None]
                same = len({score.n for score in scores}) == 1 and _comparable(group, checkpoint, attack)
                if len(scores) == len(group) and same:
                    values = [score.percent for score in scores]
                    numbers = f"{statistics.mean(values):.2f}", f"{statistics.stdev(values):.2f}"
                    names = ", ".join(run.name for run in group)
                    rows.append((names, checkpoint, attack_title(attack), *numbers, len(group), scores[0].n))
    caption = (
        "Runs whose recipes differ in seeds only: mean and standard deviation (n − 1 in its denominator) of their test "
        "accuracies. Unlike the intervals above, it includes the variation between trainings."
    )
    head = ("runs", "checkpoint", "attack", "mean, %", "standard deviation, points", "number of runs", "images")
    return Table("seeds", caption, head, rows) if rows else None
