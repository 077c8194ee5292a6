"""Results and metrics as tidy tables: one row per measurement, one column per quantity; a pandas DataFrame if installed."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.evaluate.results import FORMAT
from nrat_scale.report.run import Run, read_run, value_at
from nrat_scale.report.tables import spreadsheet_cell

COLUMNS = (
    "run", "checkpoint", "weights", "epoch", "objective", "dataset", "attack", "title", "norm", "eps", "step", "steps",
    "restarts", "n", "correct", "accuracy", "low", "high", "seconds", "flags",
)  # fmt: skip


def results(*paths: str | Path) -> Any:
    """The evaluations in run directories, releases or results.json files: one row per checkpoint and attack.

    Columns: run, checkpoint, weights, epoch, objective, dataset, attack (`worst` is the worst case over the attacks before
    it), title, norm, eps, step and steps of the attack, restarts, n, correct, accuracy in [0, 1], low and high of its 95 %
    Wilson interval, seconds, and flags (reasons to doubt the numbers of the checkpoint, joined by a space).

    Returns:
        A pandas DataFrame, or without pandas a list of dictionaries; absent values are None.

    Raises:
        UserError: there are no results at a path, or they are damaged.
    """
    records = []
    for path in map(Path, _given(paths)):
        file = path if path.is_file() else RunFolder(path).results
        if not file.is_file():
            raise UserError(
                f"{path} has no results{'' if path.exists() else ': it does not exist'}. Evaluate it first: "
                f"python -m nrat_scale.evaluate {path} --data TEST_SHARDS"
            )
        found = read_json(file, "results")
        if found.get("format") != FORMAT:
            raise UserError(f"{file} is not a results file of nrat_scale.")
        records += _result_records(path.name if path.is_dir() else path.stem, found)
    return _table(records, COLUMNS)


def metrics(*paths: str | Path) -> Any:
    """The rows of metrics.jsonl of run directories, in order.

    Columns: run, kind (`train`, `validation`, `guard`; `partial` for the steps of an epoch in which training stopped), epoch,
    step, and the numbers of the row; those of a validation are natural_accuracy, robust_accuracy, ..._low, ..._high, ..._n.

    Returns:
        A pandas DataFrame, or without pandas a list of dictionaries; absent values are None.

    Raises:
        UserError: a path is not a run.
    """
    records = []
    for path in map(Path, _given(paths)):
        run = read_run(path, path.name)
        records += [{"run": run.name, **_flat(row)} for row in RunFolder(path).read_metrics()]
    names = dict.fromkeys(["run", "kind", "epoch", "step", *(key for record in records for key in record)])
    return _table(records, tuple(names))


def result_records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of `results` of runs that are read already."""
    return [record for run in runs for record in _result_records(run.name, run.results)]


def csv_text(records: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The records as CSV (RFC 4180, but with bare newlines); absent values are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([spreadsheet_cell(record.get(name)) for name in columns] for record in records)
    return file.getvalue()


def _given(paths: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    if not paths:
        raise UserError("No path was given. Name a run directory.")
    return paths


def _result_records(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    threat = value_at(found, "threat", {})
    records = []
    for checkpoint, record in value_at(found, "checkpoints", {}).items():
        if not isinstance(record, dict):
            continue
        shared = {"run": name, "checkpoint": str(checkpoint), "dataset": value_at(found, "data.dataset")}
        shared |= {key: record.get(key) for key in ("weights", "epoch", "objective")}
        shared["flags"] = " ".join(map(str, record.get("flags") or []))
        entries = {**value_at(record, "attacks", {}), "worst": record.get("worst")}
        for attack, entry in entries.items():
            if isinstance(entry, dict):
                of_threat = {key: entry.get(key, threat.get(key)) for key in ("norm", "eps")}
                measured = {key: entry.get(key) for key in COLUMNS if key in entry}
                records.append(
                    {**measured, **shared, **of_threat, "attack": str(attack), "title": attack_title(str(attack))}
                )
    return [{name: record.get(name) for name in COLUMNS} for record in records]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl with `natural: {accuracy: ...}` as natural_accuracy."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= {f"{key}_{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _table(records: list[dict[str, Any]], columns: tuple[str, ...]) -> Any:
    whole = [{name: record.get(name) for name in columns} for record in records]
    try:
        import pandas
    except ImportError:
        return whole
    return pandas.DataFrame(whole, columns=list(columns))
