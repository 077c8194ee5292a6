"""Read run directories for a report. Only the recipe or the metrics must exist, and any value in a file may be absent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.attacks import RELEASED_CODE_WARNING, threat_text
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.spec import REAL
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.evaluate.results import FORMAT, left_out_notes
from nrat_scale.labels import BEFORE, UNKNOWN


def value_at(tree: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` if any part of the path is absent or null."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return default if tree is None else tree


def number_at(tree: Any, path: str) -> float | None:
    """The finite number at a dotted path, None if there is none."""
    value = value_at(tree, path)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def threat_at(tree: dict[str, Any]) -> str:
    """The threat of a recipe or a results.json in text, empty if it has no radius."""
    eps = number_at(tree, "threat.eps")
    norm, space = (str(value_at(tree, f"threat.{key}", old)) for key, old in (("norm", "linf"), ("space", "pixel")))
    return "" if eps is None else threat_text(norm, eps, space)


@dataclass(frozen=True)
class Score:
    """One accuracy in %, its 95 % interval as `[low, high]` (empty if unknown) and the number of images (`?` if unknown)."""

    percent: float
    interval: str
    n: int | str


def read_score(record: Any) -> Score | None:
    """The score in a record of results.json or metrics.jsonl, None if nothing was measured."""
    accuracy, low, high, n = (number_at(record, key) for key in ("accuracy", "low", "high", "n"))
    if accuracy is None:
        return None
    interval = "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
    return Score(100 * accuracy, interval, "?" if n is None else int(n))


@dataclass(frozen=True)
class Row:
    """One evaluated checkpoint: a row of the results table."""

    checkpoint: str  # `best`, `last`, `best = last` or `release`
    epoch: Any  # None if unknown
    weights: Any  # `ema` or `raw`, None if unknown
    scores: dict[str, Score]  # by attack; `worst` is the worst case over all of them
    notes: list[str]  # on parts of AutoAttack that were left out
    flags: list[str]  # reasons to doubt these scores; `Run.warnings` has the one about `threat.space`


def result_rows(results: dict[str, Any]) -> list[Row]:
    """The checkpoints in a results.json, best before last; one row for both if they are the same step."""
    found = value_at(results, "checkpoints", {})
    records = {str(name): record for name, record in found.items() if record and isinstance(record, dict)}
    best_step = value_at(records, "best.step")
    same = best_step is not None and best_step == value_at(records, "last.step")
    rows = []
    for name in sorted(records, key=lambda name: {"best": 0, "last": 1}.get(name, 2)):
        if same and name == "last":
            continue
        record = records[name]
        entries = {**value_at(record, "attacks", {}), "worst": record.get("worst")}
        scores = {str(attack): score for attack, entry in entries.items() if (score := read_score(entry))}
        if any(value_at(other, "attacks", {}).keys() - entries for other in records.values()):
            scores.pop("worst", None)  # over fewer attacks than in another row, hence not comparable
        flags = [str(flag) for flag in record.get("flags") or [] if flag != RELEASED_CODE_WARNING]
        checkpoint = "best = last" if same and name == "best" else name
        notes = left_out_notes(value_at(record, "attacks", {}))
        rows.append(Row(checkpoint, record.get("epoch"), record.get("weights"), scores, notes, flags))
    return rows


@dataclass(frozen=True)
class Run:
    """The content of a run directory; whatever comes from an absent file is empty."""

    name: str  # the end of its path that distinguishes it from the other runs of the report
    path: Path
    recipe: dict[str, Any]
    train: list[dict[str, Any]]  # one row of metrics.jsonl per epoch
    validation: list[dict[str, Any]]  # one row of metrics.jsonl per validation
    best: dict[str, Any]  # best.json
    last: dict[str, Any]  # last.json
    noise: dict[str, dict[str, Any]]  # by source, the description of its label noise; empty if it has none
    class_names: list[Any]
    results: dict[str, Any]  # results.json
    rows: list[Row]  # the evaluated checkpoints in it

    @property
    def best_row(self) -> dict[str, Any]:
        """The validation of the best checkpoint; without a pointer to it, the first with the highest robust accuracy."""
        step = self.best.get("step")
        named = [row for row in self.validation if step is not None and row.get("step") == step]
        if named:
            return named[-1]
        return max(self.validation, key=lambda row: number_at(row, "robust.accuracy") or 0.0, default={})

    def injected_blindly(self, source: str) -> bool:
        """Whether noise was injected into labels of `source` that were not known to be clean."""
        return value_at(self.noise.get(source), BEFORE) == UNKNOWN

    @property
    def clean_term(self) -> str:
        """What the rows of validation call clean labels: those from before the injection, if they may be wrong."""
        apart = value_at(self.recipe, "data.validation.shards")
        blind = not apart and self.injected_blindly(str(value_at(self.recipe, "data.validation.source", REAL)))
        return "labels before injection" if blind else "clean labels"

    @property
    def attack(self) -> str:
        """The title of the attack in validation."""
        name = value_at(self.recipe, "train.validation_attack", "attack")
        return attack_title(str(value_at(self.validation[0], "attack", name) if self.validation else name))

    @property
    def warnings(self) -> list[str]:
        """Reasons not to compare the results with others, or to evaluate again."""
        warnings = []
        if "released_code" in (value_at(tree, "threat.space") for tree in (self.recipe, self.results)):
            warnings.append(RELEASED_CODE_WARNING)
        evaluated, best = value_at(self.results, "checkpoints.best.step"), self.best.get("step")
        if None not in (evaluated, best) and evaluated != best:
            text = f"The results are of step {evaluated}, but the best checkpoint is now step {best}"
            warnings.append(f"{text}. Evaluate the run again.")
        return warnings


def read_run(path: Path, name: str) -> Run:
    """Read a run directory.

    Raises:
        UserError: `path` is not a run, or one of its files is damaged.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file() and not folder.metrics.is_file():
        files = f"it has neither {folder.recipe.name} nor {folder.metrics.name}"
        problem = files if path.is_dir() else "there is no such folder"
        raise UserError(f"{path} is not a run: {problem}. Give a folder that nrat_scale.train has written.")
    optional = (folder.results, folder.pointer("best"), folder.pointer("last"), folder.model)
    results, best, last, model = map(_read_optional, optional)
    noise = {kind: _read_optional(folder.noise_files(kind)[0]) for kind in ("real", "generated")}
    if results and (results.get("format"), results.get("version")) != (FORMAT, 1):
        raise UserError(f"{folder.results} is not an {FORMAT} file of version 1. Delete it and evaluate again.")
    rows = folder.read_metrics()
    train, validation = ([row for row in rows if row.get("kind") == kind] for kind in ("train", "validation"))
    recipe, names = _read_recipe(folder.recipe), value_at(model, "class_names", [])
    return Run(name, path, recipe, train, validation, best, last, noise, names, results, result_rows(results))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each run once, named by the shortest ends of their paths that differ."""
    if not paths:
        raise UserError("No run was given. Name at least one run directory.")
    given = {path.resolve(): path for path in map(Path, paths)}
    depth = 1
    while len({path.parts[-depth:] for path in given}) < len(given):
        depth += 1
    return [read_run(path, "/".join(full.parts[-depth:])) for full, path in given.items()]


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "file") if path.exists() else {}
    except UserError as error:
        raise UserError(f"{error} Delete it; a report does not need it.") from error


def _read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as plain values, without the checks of `load_recipe`, so that runs of other versions can be reported."""
    if not path.exists():
        return {}
    try:
        recipe = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The recipe {path} cannot be read ({first_line(error)}). Restore it.") from error
    if not isinstance(recipe, dict):
        raise UserError(f"The recipe {path} is damaged: it must be a mapping of keys to values. Restore it.")
    return {str(key): value for key, value in recipe.items()}
