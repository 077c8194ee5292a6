"""Read a run directory for a report; every file but the recipe or the metrics may be absent."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json

_TITLES = {"natural": "natural", "aa": "AutoAttack", "aa-apgd": "APGD", "fgsm": "FGSM", "worst": "worst case"}


# ---- reading a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One evaluated checkpoint (`best`, `last`, `best = last`, `release`) and its record in results.json."""

    checkpoint: str
    record: dict[str, Any]

    def score(self, attack: str) -> dict[str, Any]:
        """Accuracy, low, high and n under `attack` (`worst`: under all of them); empty where it was not run."""
        return as_dict(
            self.record.get("worst") if attack == "worst" else as_dict(self.record.get("attacks")).get(attack)
        )

    @property
    def flags(self) -> list[str]:
        """What makes these numbers doubtful, in sentences."""
        flags = self.record.get("flags")
        return [str(flag) for flag in flags] if isinstance(flags, list) else []


@dataclass(frozen=True)
class Run:
    """What a run directory says. `best` and `last` are the pointers in checkpoints/; an absent file is empty."""

    name: str
    path: Path
    recipe: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    best: dict[str, Any]
    last: dict[str, Any]
    noise: dict[str, Any]
    class_names: list[Any]
    results: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        """The evaluated checkpoints."""
        return summary_table(self.results)

    @property
    def best_row(self) -> dict[str, Any]:
        """The validation of the best checkpoint: that of best.json, else the first of the highest robust accuracy."""
        named = [row for row in self.validation if "step" in self.best and row.get("step") == self.best["step"]]
        ranked = sorted(self.validation, key=lambda row: -accuracy_percent(row.get("robust"), -1.0))
        return next(iter([*reversed(named), *ranked]), {})

    @property
    def attack(self) -> str:
        """The attack of the validation."""
        rows: list[Any] = [*self.validation, {"attack": get_path(self.recipe, "train.validation_attack", "attack")}]
        return attack_title(str(get_path(rows[0], "attack", "attack")))

    @property
    def space(self) -> str:
        """The threat space of evaluation or training, whichever is not the standard one."""
        spaces = [str(get_path(tree, "threat.space", "pixel")) for tree in (self.results, self.recipe)]
        return next((space for space in spaces if space != "pixel"), "pixel")


def read_run(path: Path, name: str) -> Run:
    """Read a run directory; files that a run need not have yet may be absent.

    Raises:
        UserError: there is no run at `path`, or one of its files is damaged.
    """
    way_out = "Give a folder that nrat_scale.train has written."
    if not path.is_dir():
        raise UserError(f"There is no run directory {path}. {way_out}")
    if not any((path / file).is_file() for file in ("recipe.yaml", "metrics.jsonl")):
        raise UserError(f"{path} is not a run: it has neither recipe.yaml nor metrics.jsonl. {way_out}")
    rows = _read_metrics(path / "metrics.jsonl")
    results = _read_optional(path / "results.json", "Delete it and run nrat_scale.evaluate again.")
    if results and (results.get("format"), results.get("version")) != ("nrat_scale.results", 1):
        raise UserError(f"{path / 'results.json'} is no nrat_scale.results of version 1. Delete it and evaluate again.")
    best, last, noise, model = (
        _read_optional(path / file, "Delete it; the report does without.")
        for file in ("checkpoints/best.json", "checkpoints/last.json", "label_noise.json", "model.json")
    )
    train, validation = ([row for row in rows if row.get("kind") == kind] for kind in ("train", "validation"))
    recipe, names = _read_recipe(path / "recipe.yaml"), get_path(model, "class_names", [])
    return Run(name, path, recipe, train, validation, best, last, noise, names, results)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several runs, each once, named by the shortest ends of their paths that tell them apart."""
    if not paths:
        raise UserError("No run was given. Name at least one run directory.")
    unique = list({path.resolve(): path for path in map(Path, paths)}.items())
    depth, names = 0, [""]
    while len(set(names)) < len(unique) or not depth:
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path, _ in unique]
    return [read_run(given, name) for (_, given), name in zip(unique, names, strict=True)]


def _read_optional(path: Path, way_out: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_json(path, "file")
    except UserError as error:
        raise UserError(f"{error} {way_out}") from error


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        recipe = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The recipe {path} cannot be read ({' '.join(str(error).split())}). Restore it.") from error
    if not isinstance(recipe, dict):
        raise UserError(f"The recipe {path} is damaged: it must be a mapping of keys to values. Restore it.")
    return {str(key): value for key, value in recipe.items()}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line without its end is what a killed run leaves, and is passed over."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Restore it.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode()) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(
                f"{path} is damaged: line {number} is not a JSON object. Remove that line or restore the file."
            )
    return rows


# ---- values, each of which may be absent ----------------------------------------------------------------------------


def as_dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def get_path(tree: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` where a part of it is absent or null."""
    for key in path.split("."):
        tree = as_dict(tree).get(key)
    return default if tree is None else tree


def finite_number(value: Any) -> float | None:
    """`value` where it is a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def accuracy_percent(score: Any, default: float = math.nan) -> float:
    accuracy = finite_number(get_path(score, "accuracy"))
    return default if accuracy is None else 100 * accuracy


def printable(value: Any) -> str:
    """Text without control characters and lone surrogates (file names that are no UTF-8)."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def short_number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fraction_text(value: Any) -> str:
    """`8/255 (0.0314)`; 0.3, which is no multiple of 1/255, as it is."""
    number = finite_number(value)
    if number is None:
        return str(value)
    k = round(255 * number)
    return f"{k}/255 ({number:.3g})" if k and abs(255 * number - k) < 1e-3 else short_number(number)


# ---- rows of accuracies ---------------------------------------------------------------------------------------------


def summary_table(results: dict[str, Any]) -> list[Row]:
    """The evaluated checkpoints of a results.json, best before last; one row where they are the same step."""
    records = {str(name): record for name, record in as_dict(results.get("checkpoints")).items() if as_dict(record)}
    best, last = records.pop("best", {}), records.pop("last", {})
    if best and last and best.get("step") is not None and best.get("step") == last.get("step"):
        records = {"best = last": best, **records}
    else:
        records = {**({"best": best} if best else {}), **({"last": last} if last else {}), **records}
    return [Row(name, record) for name, record in records.items()]


def attack_title(attack: str) -> str:
    """`pgd20` as PGD-20, `aa` as AutoAttack."""
    if attack.startswith("transfer-"):
        return f"{attack_title(attack.removeprefix('transfer-'))}, transferred"
    match = re.fullmatch(r"(pgd|cw)([0-9]+)(?:x([0-9]+))?", attack)
    if match is None:
        return _TITLES.get(attack, attack)
    return f"{match[1].upper()}-{match[2]}" + (f", {match[3]} starts" if match[3] else "")
