"""How well an audit estimates noise that was injected: cells of Fashion-MNIST by kind, rate and seed, and their table.

python tools/audit_calibration.py --train data/fashion_mnist_train                    all cells that docs/audit lacks
python tools/audit_calibration.py ... --limit 1 --kinds symmetric --rates 0.4         one of them
python tools/audit_calibration.py --table                                             the table of the finished cells

A cell audits 12,000 training images (1,200 of each class, drawn with its seed) in two folds against 10,000 other training images
(1,000 of each class, their labels taken as right), and writes docs/audit/KIND-RATE-seed-SEED.json when it is finished. With --test
the hold-out is these images instead: give another --cells, too. An interrupted cell continues in --work.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.audit import audit
from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.core.files import make_folder, read_json, write_json
from nrat_scale.data.audit_scores import read_audit_scores
from nrat_scale.data.shards import open_shards
from nrat_scale.data.source import noisy_labels
from nrat_scale.labels import NoiseSpec
from nrat_scale.prepare.subset import subset

CELLS = Path(__file__).resolve().parents[1] / "docs" / "audit"
KINDS, RATES, SEEDS = ("symmetric", "asymmetric", "instance_dependent", "matrix"), (0.05, 0.1, 0.2, 0.4), (0, 1, 2)
VERSION = 3  # of a cell: raised when the recipe of the folds or the images change, so that all cells are run again
PER_CLASS, HOLD_OUT_PER_CLASS, FOLDS = 1200, 1000, 2
# Each class and its most similar one, both ways: no map is published for Fashion-MNIST.
PAIRS = {0: 6, 6: 0, 1: 3, 3: 1, 2: 4, 4: 2, 5: 7, 7: 5, 8: 9, 9: 8}
_GROUPS = ((0, 2, 3, 4, 6), (5, 7, 9), (1, 3), (8, 0))  # of classes that people confuse
_HARDNESS = (1.0, 0.6, 1.2, 0.9, 1.2, 0.8, 1.3, 0.9, 0.7, 0.8)  # of each class, relative


@dataclass(frozen=True)
class Cell:
    """One audit of the campaign."""

    kind: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        return f"{self.kind}-{self.rate:g}-seed-{self.seed}"

    @property
    def noise(self) -> NoiseSpec:
        """What is injected."""
        if self.kind == "matrix":
            return NoiseSpec(kind="matrix", seed=self.seed, matrix=human_like(self.rate).tolist())
        class_map = PAIRS if self.kind == "asymmetric" else None
        return NoiseSpec(kind=self.kind, rate=self.rate, seed=self.seed, class_map=class_map)


def human_like(rate: float) -> np.ndarray:
    """A transition matrix [10, 10] with the features of CIFAR-10N: similar classes are confused, some classes more than others.

    Four fifths of the wrong labels of a class are spread over its group, one fifth over all other classes; the mean is `rate`.
    """
    shares = np.asarray(_HARDNESS) / np.mean(_HARDNESS) * rate
    matrix = np.zeros((10, 10))
    for label, share in enumerate(shares.tolist()):
        others = [other for group in _GROUPS if label in group for other in group if other != label]
        near = np.bincount(others, minlength=10) / len(others)
        anywhere = (np.arange(10) != label) / 9
        matrix[label] = share * (0.8 * near + 0.2 * anywhere)
        matrix[label, label] = 1 - share
    return matrix


def cells(kinds: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> Iterator[Cell]:
    """All cells in the order in which they are run, so that an early end leaves whole seeds."""
    for seed in seeds:
        if "none" in kinds:
            yield Cell("none", 0.0, seed)
        for rate in sorted(rates, reverse=True):
            for kind in kinds:
                if kind != "none":
                    yield Cell(kind, rate, seed)


def run_cell(cell: Cell, train: str, work: Path, overrides: Sequence[str], test: str | None = None) -> dict[str, Any]:
    """Audit one cell, in a folder below `work`; returns the content of its file."""
    began = time.perf_counter()
    data, out = work / f"data-{cell.seed}", work / cell.name
    hold_out = work / f"{'other' if test is None else 'test'}-{cell.seed}"
    options: dict[str, Any] = {"seed": cell.seed, "progress": False}
    if not (data / "index.json").is_file():
        subset(train, data, per_class=PER_CLASS, **options)
    if not (hold_out / "index.json").is_file():
        if test is None:
            subset(train, hold_out, per_class=HOLD_OUT_PER_CLASS, without=str(data), **options)
        else:
            subset(test, hold_out, per_class=HOLD_OUT_PER_CLASS, **options)
    asked: dict[str, Any] = {"noise": cell.noise, "out": out, "seed": cell.seed, "overrides": list(overrides)}
    content = audit(data, folds=FOLDS, clean_holdout=hold_out, **asked).content
    record = _record(cell, content) | {"cleanlab": _cleanlab(out, data, cell.noise)}
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def _record(cell: Cell, content: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of its audit.json."""
    corrected, injected = content["corrected"], content["injected"]
    truth = 0.0 if injected is None else injected["rate"]
    fields = ("rate", "unclipped", "interval", "transition")
    record = {
        "version": VERSION,
        "kind": cell.kind,
        "rate": cell.rate,
        "seed": cell.seed,
        "images": content["data"]["num_images"],
        "holdout_images": content["method"]["holdout"]["num_images"],
        "folds": content["method"]["folds"],
        "truth": truth,
        "corrected": {"identified": corrected["identified"], "condition": corrected["condition"]},
        "plain": {name: content["plain"][name] for name in fields if name != "transition"},
        "suspects": {"count": content["suspects"]["count"], **(content["measured_truth"] or {})},
        "accuracy": content["accuracy"],
        "shift": content["shift"],
        "recipe_identity": content["method"]["recipe_identity"],
        "versions": content["versions"],
        "date": content["date"],
    }
    if corrected["identified"]:
        low, high = corrected["interval"]
        record["corrected"] |= {name: corrected[name] for name in fields if name != "transition"}
        record["corrected"]["covers"] = low <= truth <= high
        if injected is not None:
            counts = np.asarray(injected["counts"], np.float64)
            true = counts / counts.sum(axis=1, keepdims=True)
            record["corrected"]["transition_error"] = float(abs(np.asarray(corrected["transition"]) - true).max())
    return record


def _cleanlab(out: Path, data: Path, noise: NoiseSpec) -> dict[str, Any]:
    """Suspects of cleanlab's `find_label_issues` with its defaults, on the same probabilities."""
    from cleanlab.filter import find_label_issues

    shards, scores = open_shards(data), read_audit_scores(out)
    given = np.asarray(scores.given, np.int64)
    parts = [np.load(path, allow_pickle=False)[:, 0] for path in sorted((out / "probabilities").glob("*.npy"))]
    suspect = find_label_issues(given, np.concatenate(parts), n_jobs=1)
    clean = noisy_labels(shards, noise)[1] if noise.injects else given
    wrong, hits = clean != given, int((suspect & (clean != given)).sum())
    return {
        "count": int(suspect.sum()),
        "precision": hits / int(suspect.sum()) if suspect.any() else None,
        "recall": hits / int(wrong.sum()) if wrong.any() else None,
    }


def is_finished(path: Path) -> bool:
    """Whether `path` is a finished cell of this version."""
    return path.is_file() and read_json(path, "finished cell").get("version") == VERSION


def table(folder: Path) -> str:
    """A Markdown table of the finished cells in `folder`: one row for each kind and rate; what was not run says so."""
    head = (
        "| noise | rate | cells | truth | corrected | largest error | interval covers | plain | "
        "precision, recall | cleanlab precision, recall | accuracy |"
    )
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for kind, rate in [("none", 0.0), *((kind, rate) for kind in KINDS for rate in RATES)]:
        paths = [folder / f"{Cell(kind, rate, seed).name}.json" for seed in SEEDS]
        found = [read_json(path, "finished cell") for path in paths if is_finished(path)]
        lines.append(f"| {kind} | {rate:g} | {len(found)} | {_row(found)} |")
    return "\n".join(lines)


def _row(found: list[dict[str, Any]]) -> str:
    if not found:
        return "not run | | | | | | | "
    identified = [cell for cell in found if cell["corrected"]["identified"]]
    errors = [cell["corrected"]["unclipped"] - cell["truth"] for cell in identified]
    covered = sum(cell["corrected"]["covers"] for cell in identified)
    columns = [
        _points([cell["truth"] for cell in found]),
        _points([cell["corrected"]["unclipped"] for cell in identified]),
        f"{100 * max(errors, key=abs):+.1f}" if errors else "not identified",
        f"{covered} of {len(found)}",
        _points([cell["plain"]["rate"] for cell in found]),
        f"{_mean(found, 'suspects', 'precision')}, {_mean(found, 'suspects', 'recall')}",
        f"{_mean(found, 'cleanlab', 'precision')}, {_mean(found, 'cleanlab', 'recall')}",
        _points([cell["accuracy"]["holdout"] for cell in found]),
    ]
    return " | ".join(columns)


def _points(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else "-"


def _mean(found: list[dict[str, Any]], group: str, name: str) -> str:
    values = [cell[group][name] for cell in found if cell[group].get(name) is not None]
    return f"{np.mean(values):.2f}" if values else "-"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="keys of the recipe of the folds")
    add("--train", default="data/fashion_mnist_train", help="shards of Fashion-MNIST's training images")
    add("--test", help="shards of its test images, as hold-out instead of other training images")
    add("--kinds", type=lambda text: text.split(","), default=["none", *KINDS])
    add("--rates", type=lambda text: [float(part) for part in text.split(",")], default=list(RATES))
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=list(SEEDS))
    add("--limit", type=int, help="run at most so many cells")
    add("--work", type=Path, default=Path("audits/calibration"), help="folder of unfinished cells")
    add("--cells", type=Path, default=CELLS, help="folder of the finished cells")
    add("--table", action="store_true", help="print the table of the finished cells and run none")
    given = parser.parse_intermixed_args(argv)
    if given.table:
        print(table(given.cells))
        return
    if unknown := sorted(set(given.kinds) - {"none", *KINDS}):
        raise UserError(f"--kinds names '{unknown[0]}'; expected none, {', '.join(KINDS)}.")
    make_folder(given.cells)
    waiting = list(cells(given.kinds, given.rates, given.seeds))
    waiting = [cell for cell in waiting if not is_finished(given.cells / f"{cell.name}.json")]
    for number, cell in enumerate(waiting[: given.limit]):
        print(f"cell {number + 1} of {len(waiting[: given.limit])}: {cell.name}", flush=True)
        record = run_cell(cell, given.train, given.work, given.overrides, given.test)
        write_json(given.cells / f"{cell.name}.json", record)
        shutil.rmtree(given.work / cell.name)
        print(json.dumps({key: record[key] for key in ("truth", "corrected", "suspects", "cleanlab")}), flush=True)


if __name__ == "__main__":
    run_cli(main)
