"""Tables about one run: common images, gaps, robustness curves, classes, label noise, time."""

import re
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.evaluate.curves import AXES, radius_text
from nrat_scale.evaluate.measures import NOT_ATTACKED
from nrat_scale.evaluate.statistics import accuracy_record
from nrat_scale.report.curves import CLEAN, CURVES
from nrat_scale.report.run import Row, Run, Score, number_at, read_score, signed, value_at
from nrat_scale.report.tables import Cell, Table, attack_columns

LARGEST_MATRIX = 20  # classes; a larger matrix is not readable as a table
_FEWEST_CLASSES = 10  # rows of the table of classes if there are more than LARGEST_MATRIX


def common_table(run: Run) -> Table | None:
    """The accuracies on the images that all attacks saw, if some saw others."""
    rows = [row for row in run.rows if row.common]
    if not rows:
        return None
    attacks = list(dict.fromkeys(attack for row in rows for attack in row.common))
    caption = (
        "Test accuracy in % on the images that all attacks of a checkpoint saw. The worst case counts the images that survive "
        "every attack; compare it with these numbers only."
    )
    head = ("checkpoint", *map(attack_title, attacks))
    return Table("common_images", caption, head, [(row.checkpoint, *map(row.common.get, attacks)) for row in rows])


def gap_table(run: Run) -> Table | None:
    """Best minus last of each test and validation accuracy, if both have the same number of images and are not the same step."""
    if run.best_is_last:
        return None
    best_test, last_test = (row.scores if (row := run.row_of(name)) else {} for name in ("best", "last"))
    pairs = [(f"test, {attack_title(a)}", best_test.get(a), last_test.get(a)) for a in attack_columns(run.rows)]
    for key, label, *_ in CURVES if run.validation else ():
        label = f"validation, {label.replace('robust', run.attack).replace(CLEAN, run.clean_term)}"
        pairs.append((label, read_score(run.best_row.get(key)), read_score(run.validation[-1].get(key))))
    rows: list[tuple[Cell, ...]] = [
        (label, f"{best.percent:.1f}", f"{last.percent:.1f}", signed(best.percent - last.percent))
        for label, best, last in pairs
        if best is not None and last is not None and best.n == last.n
    ]
    caption = "Best minus last checkpoint; a positive gap is accuracy lost to overfitting."
    return Table("gaps", caption, ("accuracy, %", "best", "last", "gap, points"), rows) if rows else None


def _curve_points(run: Run, label: str, axis: str) -> list[tuple[float, Score, dict[str, Any]]]:
    """(eps in units of 1/255, or steps; accuracy; entry) of a curve, in order, over the largest choice of images only."""
    found = []
    for name, entry in value_at(run.record(label), "curves", {}).items():
        of_axis, score = str(name).partition("=")[0], read_score(entry)
        if of_axis == axis and score is not None:
            at = number_at(entry, "eps") if axis == "eps" else number_at(entry, "steps") or 0.0
            if at is not None:
                found.append((at, score, entry))
    largest = max((score.n for _, score, _ in found if isinstance(score.n, int)), default=0)
    return sorted((point for point in found if point[1].n == largest), key=lambda point: point[0])


def strength_curves(run: Run, axis: str) -> dict[str, list[tuple[float, Score]]]:
    """Checkpoint -> (eps or steps, accuracy) of each point of a curve; only checkpoints that have it."""
    found = {row.checkpoint: _curve_points(run, row.label, axis) for row in run.rows}
    return {name: [(at, score) for at, score, _ in points] for name, points in found.items() if points}


def curve_tables(run: Run) -> Iterator[Table]:
    """Accuracy against eps and against steps, a column per checkpoint."""
    for axis in AXES:
        columns = {row.checkpoint: _curve_points(run, row.label, axis) for row in run.rows}
        columns = {name: points for name, points in columns.items() if points}
        if not columns:
            continue
        values = sorted({at for points in columns.values() for at, *_ in points})
        cells = {name: {at: score for at, score, _ in points} for name, points in columns.items()}
        rows: list[tuple[Cell, ...]] = [
            (radius_text(at) if axis == "eps" else f"{at:.0f}", *(cells[name].get(at) for name in cells))
            for at in values
        ]
        first = next(iter(columns.values()))
        entry = first[-1][2]
        step = number_at(entry, "step")
        if axis == "steps":
            what = "the steps of PGD" + ("" if step is None else f" (step length {radius_text(step)})")
        else:
            length = f" of {step / first[-1][0]:.3g} eps" if step and first[-1][0] else ""
            what = f"eps, under PGD with {value_at(entry, 'steps', '?')} steps{length}"
        caption = f"Test accuracy in % against {what}, on one choice of images."
        yield Table(f"accuracy_by_{axis}", caption, (axis, *cells), rows)


def _predicted(run: Run, row: Row) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Attack -> labels and predicted classes, if every image was attacked."""
    found = {attack: run.predictions.get(f"{row.label}/{attack}") for attack in attack_columns([row])}
    return {
        attack: pair
        for attack, pair in found.items()
        if pair is not None and len(pair[0]) and pair[0].min() >= 0 and not (pair[1] == NOT_ATTACKED).any()
    }


def class_count(run: Run, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """The number of classes: that of the names, or of what occurs."""
    return max([len(run.class_names), *(int(max(map(np.max, pair))) + 1 for pair in pairs.values())])


def _class_name(run: Run, number: int) -> str:
    names = [str(name) for name in run.class_names]
    return str(number) if number >= len(names) or names[number] == str(number) else f"{number} {names[number]}"


def class_table(run: Run, row: Row) -> Table | None:
    """Accuracy by class under each attack whose predictions are stored; for many classes those that are broken most."""
    pairs = _predicted(run, row)
    if not pairs:
        return None
    order = {}
    rows: dict[int, tuple[Cell, ...]] = {}
    for number in range(count := class_count(run, pairs)):
        scores = []
        for labels, predicted in pairs.values():
            of_class = labels == number
            scores.append(read_score(accuracy_record((predicted == labels)[of_class])) if of_class.any() else None)
        if any(scores):
            rows[number] = (_class_name(run, number), *scores)
            order[number] = min(score.percent for score in scores if score is not None)
    shown, which = list(rows), ""
    if count > LARGEST_MATRIX:
        shown = sorted(shown, key=lambda number: order[number])[:_FEWEST_CLASSES]
        which = f" The {len(shown)} least robust of {count} classes."
    caption = f"Test accuracy in % by class of the {row.checkpoint} checkpoint, with 95 % Wilson intervals.{which}"
    return Table("classes", caption, ("class", *map(attack_title, pairs)), [rows[number] for number in shown])


def confusion_tables(run: Run, row: Row) -> Iterator[Table]:
    """Confusion matrices: natural, and under the attack that left the fewest images of the largest choice."""
    pairs = _predicted(run, row)
    if not pairs or class_count(run, pairs) > LARGEST_MATRIX:
        return
    most = max(len(labels) for labels, _ in pairs.values())
    attacked = [a for a, (labels, _) in pairs.items() if a != "natural" and len(labels) == most]
    strongest = sorted(attacked, key=lambda a: float((pairs[a][0] == pairs[a][1]).mean()))[:1]
    for attack in [a for a in ("natural", *strongest) if a in pairs]:
        labels, predicted = pairs[attack]
        counts = np.zeros((class_count(run, pairs),) * 2, int)
        np.add.at(counts, (labels, predicted), 1)
        how = "without an attack" if attack == "natural" else f"under {attack_title(attack)}"
        caption = f"Test images ({len(labels)}) by class (row) and predicted class (column), {how}, {row.checkpoint} checkpoint."
        yield matrix(
            run,
            "confusion_natural" if attack == "natural" else "confusion_attacked",
            caption,
            counts.tolist(),
            "label \\ predicted",
        )


def matrix(run: Run, name: str, caption: str, counts: list[list[Any]], corner: str) -> Table:
    """A square table of counts with the names of the classes."""
    named = len(run.class_names) == len(counts)
    rows: list[tuple[Cell, ...]] = [
        (_class_name(run, i) if named else str(i), *map(_count, line)) for i, line in enumerate(counts)
    ]
    return Table(name, caption, (corner, *map(str, range(len(counts)))), rows, is_matrix=True)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def noise_table(run: Run, source: str) -> Table | None:
    """The transition matrix of the label noise of a source; None without noise, and for many classes."""
    counts = value_at(run.noise[source], "transition_matrix", [])
    if not number_at(run.noise[source], "realised_rate") or not 0 < len(counts) <= LARGEST_MATRIX:
        return None
    blind = run.injected_blindly(source)
    of_row = "class before injection" if blind else "clean class"
    caption = f"Number of images of each {of_row} (row) by their given label (column)."
    name = "label_noise" if source == "real" else f"label_noise_{source}"
    return matrix(run, name, caption, counts, f"{'before' if blind else 'clean'} \\ given")


def timing_table(run: Run) -> Table | None:
    """A row per start of the training: hardware, epochs, throughput, time; None without timing.jsonl."""
    parts: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for row in run.timing:
        if row.get("kind") == "start":
            parts.append((row, []))
        elif parts:
            parts[-1][1].append(row)
    rows: list[tuple[Cell, ...]] = [
        (_minute(value_at(start, "time", "?")), *_timing(start, rest)) for start, rest in parts
    ]
    caption = (
        "Hardware and time of each start of the training. Throughput is the median over epochs, without validations."
    )
    head: tuple[str, ...] = (
        "started (UTC)",
        "hardware",
        "precision",
        "epochs",
        "images/s",
        "training",
        "validation",
        "peak memory, GiB",
    )
    head = head if any(row[-1] is not None for row in rows) else head[:-1]
    return Table("timing", caption, head, [row[: len(head)] for row in rows]) if rows else None


def _minute(time: str) -> str:
    """`2026-11-26 19:35` of a time in ISO format; other text as it is."""
    found = re.match(r"([0-9-]{10})T([0-9:]{5})", str(time))
    return f"{found[1]} {found[2]}" if found else str(time)


def _timing(start: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Cell, ...]:
    epochs, validations = ([row for row in rows if row.get("kind") == kind] for kind in ("epoch", "validation"))
    processes, threads = value_at(start, "processes", 1), value_at(start, "threads")
    hardware = f"{processes} × {value_at(start, 'device_name', '?')}" + (
        f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    )
    speeds = [speed for row in epochs if (speed := number_at(row, "images_per_second")) is not None]
    memory = max((n for row in epochs if (n := number_at(row, "peak_memory_bytes")) is not None), default=None)
    return (
        hardware,
        str(value_at(start, "precision", "?")),
        len(epochs),
        f"{statistics.median(speeds):.0f}" if speeds else None,
        *(duration(sum(number_at(row, "seconds") or 0.0 for row in part)) for part in (epochs, validations)),
        None if memory is None else f"{memory / 2**30:.1f}",
    )


def duration(seconds: float) -> str:
    """`12.3 s`, `4.5 min` or `6.7 h`."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
