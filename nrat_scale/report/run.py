"""Read run directories for a report. Only the recipe or the metrics must exist, and any value in a file may be absent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.attacks import RELEASED_CODE_WARNING, PhaseSpec, ThreatSpec, attack_text, threat_text
from nrat_scale.collapse import catastrophic_epochs
from nrat_scale.core.errors import UserError, first_line, missing_folder
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder, runs_in
from nrat_scale.data.spec import REAL
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.evaluate.gallery import Gallery, read_galleries
from nrat_scale.evaluate.results import (
    FORMAT,
    Outcome,
    Predictions,
    left_out_notes,
    read_arrays,
    read_predictions,
)
from nrat_scale.evaluate.statistics import worst_case
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


def trained_attack(recipe: dict[str, Any]) -> str:
    """The attack of training in text, such as `10 steps of 2/255`; empty if there is none, or it is not known."""
    given = value_at(recipe, "threat")
    known = given.items() if isinstance(given, dict) else ()
    fields = {key: value for key, value in known if key in ThreatSpec.__dataclass_fields__ and value is not None}
    try:
        phases = [PhaseSpec(**phase) for phase in fields.pop("schedule", [])]
        threat = ThreatSpec(**fields, schedule=phases)
    except (UserError, TypeError, AttributeError):  # of a version with other keys or kinds of values
        return ""
    return attack_text(threat) if threat.num_steps else ""


@dataclass(frozen=True)
class Score:
    """A quantity in % or percentage points with its 95 % interval (None if unknown) and the number of images (`?` if unknown)."""

    percent: float
    low: float | None
    high: float | None
    n: int | str
    is_difference: bool = False  # shown with its sign
    starred: bool = False  # a difference beyond chance

    @property
    def text(self) -> str:
        """`62.0`, or with its sign, `+7.0`."""
        text = signed(self.percent) if self.is_difference else f"{self.percent:.1f}"
        return f"{text}*" if self.starred else text

    @property
    def interval(self) -> str:
        """`[57.7, 66.1]`, empty if unknown."""
        if self.low is None or self.high is None:
            return ""
        return "[{}, {}]".format(*((signed(x) if self.is_difference else f"{x:.1f}") for x in (self.low, self.high)))


def signed(points: float) -> str:
    """A difference in percentage points: `+7.0`, `−3.0`, `0.0`."""
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def read_score(record: Any) -> Score | None:
    """The score in a record of results.json or metrics.jsonl, None if nothing was measured."""
    accuracy, low, high, n = (number_at(record, key) for key in ("accuracy", "low", "high", "n"))
    if accuracy is None:
        return None
    known = None if low is None else 100 * low, None if high is None else 100 * high
    return Score(100 * accuracy, *known, "?" if n is None else int(n))


@dataclass(frozen=True)
class Row:
    """One evaluated checkpoint: a row of the results table."""

    checkpoint: str  # `best`, `last`, `best = last` or `release`
    epoch: Any  # None if unknown
    weights: Any  # `ema` or `raw`, None if unknown
    scores: dict[str, Score]  # by attack; `worst` is the worst case over all of them
    notes: list[str]  # on parts of AutoAttack that were left out
    flags: list[str]  # reasons to doubt these scores; `Run.warnings` has the one about `threat.space`
    label: str = ""  # its name in results.json
    # If the attacks saw different images: the accuracies on those that all saw, with their `worst`; else empty.
    common: dict[str, Score] = field(default_factory=dict)


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
        entries = value_at(record, "attacks", {})
        scores = {str(attack): score for attack, entry in entries.items() if (score := read_score(entry))}
        worst, apart, common = read_score(record.get("worst")), value_at(record, "worst.on_common", {}), {}
        if any(value_at(other, "attacks", {}).keys() - entries.keys() for other in records.values()):
            worst = None  # over fewer attacks than in another row, hence not comparable
        if worst is not None and apart:
            common = {str(attack): score for attack, entry in apart.items() if (score := read_score(entry))}
            common["worst"] = worst
        elif worst is not None and {score.n for score in scores.values()} == {worst.n} and _same_choice(entries):
            scores["worst"] = worst  # otherwise over other images than the scores beside it
        flags = [str(flag) for flag in record.get("flags") or [] if flag != RELEASED_CODE_WARNING]
        checkpoint = "best = last" if same and name == "best" else name
        notes = left_out_notes(value_at(record, "attacks", {}))
        facts = record.get("epoch"), record.get("weights")
        rows.append(Row(checkpoint, *facts, scores, notes, flags, name, common))
    return rows


def _same_choice(entries: Mapping[str, Any]) -> bool:
    """Whether attacks on equally many images saw the same ones."""
    return len({str(value_at(entry, "seed", 0)) for entry in entries.values()}) == 1


def _with_worst_cases(results: dict[str, Any], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """`results` with each worst case computed from the outcome of each image: earlier versions did not store `on_common`."""
    checkpoints = {}
    for label, record in value_at(results, "checkpoints", {}).items():
        names = list(value_at(record, "attacks", {})) if isinstance(record, dict) else []
        if record and names and all(f"{label}/{name}" in outcomes for name in names):
            record = {**record, "worst": worst_case({name: outcomes[f"{label}/{name}"] for name in names})}
        checkpoints[label] = record
    return {**results, "checkpoints": checkpoints} if checkpoints else results


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
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # of each image, by `<label>/<attack>`
    predictions: dict[str, Predictions] = field(default_factory=dict)
    galleries: dict[str, Gallery] = field(default_factory=dict)  # by label
    timing: list[dict[str, Any]] = field(default_factory=list)  # rows of timing.jsonl
    data: dict[str, Any] = field(default_factory=dict)  # data.json

    def record(self, label: str) -> dict[str, Any]:
        """The record of a checkpoint in results.json; empty if there is none."""
        found = value_at(self.results, "checkpoints", {}).get(label)
        return found if isinstance(found, dict) else {}

    def row_of(self, checkpoint: str) -> Row | None:
        """The row of a checkpoint; `best = last` is that of both."""
        both = "best = last" if checkpoint in ("best", "last") else checkpoint
        return next((row for row in self.rows if row.checkpoint in (checkpoint, both)), None)

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
    def best_is_last(self) -> bool:
        """Whether the best checkpoint is known to be the last one."""
        return self.best.get("step") is not None and self.best.get("step") == self.last.get("step")

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
        if epochs := catastrophic_epochs([*self.train, *self.validation]):
            what = f"Catastrophic overfitting after epoch {epochs[0]}" + (
                f" and {len(epochs) - 1} more" if epochs[1:] else ""
            )
            warnings.append(
                f"{what}: the model withstands the attack of training, and {self.attack} breaks nearly all images."
            )
        return warnings


def read_run(path: Path, name: str) -> Run:
    """Read a run directory.

    Raises:
        UserError: `path` is not a run, or one of its files is damaged.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"{missing_folder(path)} Give a folder that nrat_scale.train has written.")
    if not folder.recipe.is_file() and not folder.metrics.is_file():
        if runs := runs_in(path):
            raise UserError(f"{path} is not a run, but holds runs. Name some: {' '.join(map(str, runs))}.")
        problem = f"it has neither {folder.recipe.name} nor {folder.metrics.name}"
        raise UserError(f"{path} is not a run: {problem}. Give a folder that nrat_scale.train has written.")
    optional = (folder.results, folder.pointer("best"), folder.pointer("last"), folder.model)
    results, best, last, model = map(_read_optional, optional)
    noise = {kind: _read_optional(folder.noise_files(kind)[0]) for kind in ("real", "generated")}
    if results and (results.get("format"), results.get("version")) != (FORMAT, 1):
        raise UserError(f"{folder.results} is not an {FORMAT} file of version 1. Delete it and evaluate again.")
    rows = folder.read_metrics()
    train, validation = ([row for row in rows if row.get("kind") == kind] for kind in ("train", "validation"))
    recipe, names = _read_recipe(folder.recipe), value_at(model, "class_names", [])
    outcomes = read_arrays(folder.results) if results else {}
    results = _with_worst_cases(results, outcomes)
    return Run(
        name,
        path,
        recipe,
        train,
        validation,
        best,
        last,
        noise,
        names,
        results,
        result_rows(results),
        outcomes,
        read_predictions(folder.results) if results else {},
        read_galleries(folder.results),
        folder.read_timing(),
        _read_optional(folder.data),
    )


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
