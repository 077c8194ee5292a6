"""Finished cells: one training with its evaluation, read from `cell.json` files.

A cell lies in `OUT/EDITION/cells/METHOD/NOISE-RATE/seed-S/cell.json`, or, if it is committed, in
`docs/reproduction/EDITION/METHOD/NOISE-RATE/seed-S.json`.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.attacks import RELEASED_CODE_WARNING
from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import read_json
from nrat_scale.evaluate.statistics import wilson
from nrat_scale.report.run import number_at, value_at

VERSION = 1  # of cell.json
_MOST_IMAGES = 10**8  # above it a count is damaged; NumPy would allocate it
RELEASED = "released_code"  # `space` of cells in the released code's threat space
CHECKPOINTS = ("best", "last")
CURVES_WARNING = (
    "These curves are measured on the test images (--curves test), as the paper's are. "
    "Best checkpoints are selected on held-out training images all the same."
)


@dataclass(frozen=True, order=True)
class Setting:
    """What is trained, up to the seed."""

    method: str  # id of the grid file, such as `trades_apl` or `nrat-lam3`
    noise: str  # kind of label noise, `none` for clean labels
    rate: float

    @property
    def folder(self) -> str:
        """`nrat/symmetric-0.4`."""
        return f"{self.method}/{self.noise}-{self.rate:g}"

    @property
    def noise_text(self) -> str:
        """`clean` or `symmetric 0.4`."""
        return "clean" if self.noise == "none" or not self.rate else f"{self.noise} {self.rate:g}"


@dataclass(frozen=True)
class Measured:
    """A cell that was run. The outcomes of an attack are bool [n], True for an image that was classified correctly."""

    path: Path
    edition: str
    setting: Setting
    seed: int
    space: str
    error: str | None  # why it failed; a failed cell has no outcomes
    recipe_hash: str
    outcomes: dict[tuple[str, str], np.ndarray]  # by checkpoint and attack
    facts: dict[str, Any]  # the whole file

    @property
    def finished(self) -> bool:
        return self.error is None

    def protocol(self, measure: str) -> tuple[str, str, str]:
        """Test images, threat and settings of an attack: accuracies are compared only if these are equal."""
        data, threat = (str(value_at(self.facts, f"evaluation.{key}", "")) for key in ("data", "threat"))
        return data, threat, json.dumps(value_at(self.facts, f"evaluation.keys.{measure}", {}), sort_keys=True)

    @property
    def split(self) -> str:
        """Which images the learning curve is measured on: `held-out` or `test`."""
        return (
            "test"
            if any(row.get("split") == "test" for row in self.curve)
            else str(self.facts.get("curves", "held-out"))
        )

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Rows of the learning curve."""
        return [row for row in value_at(self.facts, "curve", []) if isinstance(row, dict)]

    def number(self, path: str) -> float | None:
        """The number at a dotted path of the file, None if it has none."""
        return number_at(self.facts, path)

    @property
    def stamps(self) -> list[str]:
        """What must be printed with every number of this cell."""
        stamps = [RELEASED_CODE_WARNING] if self.space == RELEASED else []
        return stamps + ([CURVES_WARNING] if self.split == "test" else [])


def read_cells(*folders: Path) -> list[Measured]:
    """All cells below the folders, sorted by edition, setting and seed; a cell found twice is taken from the first folder.

    Raises:
        UserError: a folder is missing, a file is damaged, or one cell was found with two recipes.
    """
    found: dict[tuple[Any, ...], Measured] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder} with results. Run a grid first: python -m nrat_scale.reproduce."
            )
        for path in sorted({*folder.rglob("cell.json"), *folder.rglob("seed-*.json")}):
            cell = read_cell(path)
            key = (cell.edition, cell.setting, cell.seed, cell.space, cell.split)
            other = found.get(key)
            if other is not None and other.finished and cell.finished and other.recipe_hash != cell.recipe_hash:
                raise UserError(
                    f"{other.path} and {path} are results of one cell with different recipes or evaluations "
                    f"({quoted(other.recipe_hash)} and {quoted(cell.recipe_hash)}). Remove one of them."
                )
            if other is None or (cell.finished and not other.finished):
                found[key] = cell
    return [found[key] for key in sorted(found)]


def read_cell(path: Path) -> Measured:
    """One cell.json; raises `UserError` if it is missing, damaged or of another version."""
    facts = read_json(path, "results of a cell")
    if facts.get("version") != VERSION:
        raise UserError(
            f"The results of a cell {path} have version {quoted(facts.get('version'))}; expected {VERSION}."
        )
    _check_types(path, facts)
    texts = [facts.get(key) for key in ("edition", "method", "noise", "space", "status")]
    rate, seed = number_at(facts, "rate"), facts.get("seed")
    if not all(isinstance(text, str) and text for text in texts) or rate is None or not isinstance(seed, int):
        raise _damaged(path, "edition, method, noise, rate, seed, space or status is missing")
    edition, method, noise, space, status = map(str, texts)
    error = None if status == "finished" else str(facts.get("error") or status)
    outcomes = {} if error else dict(_outcomes(path, facts))
    if error is None and not outcomes:
        raise _damaged(path, "it is finished and has no results")
    setting, recipe_hash = Setting(method, noise, rate), str(facts.get("recipe_hash"))
    return Measured(path, edition, setting, seed, space, error, recipe_hash, outcomes, facts)


# Parts of cell.json that may be absent, but must have these types.
_TYPES = {
    **dict.fromkeys(("recipe", "evaluation", "noise_realised", "cost", "versions"), dict),
    **dict.fromkeys(("results", "flags"), dict),
    **{f"results.{checkpoint}": dict for checkpoint in CHECKPOINTS},
    **{f"flags.{checkpoint}": list for checkpoint in CHECKPOINTS},
    **dict.fromkeys(("curve", "memorisation", "evaluation.attacks"), list),
}


def _check_types(path: Path, facts: dict[str, Any]) -> None:
    for key, kind in _TYPES.items():
        value = value_at(facts, key)
        if value is not None and not isinstance(value, kind):
            raise _damaged(path, f"{key} is {quoted(value)}")
    for key in ("curve", "memorisation"):
        if not all(isinstance(row, dict) for row in facts.get(key) or []):
            raise _damaged(path, f"{key} has rows that are no objects")
    if not all(isinstance(name, str) for name in value_at(facts, "evaluation.attacks", [])):
        raise _damaged(path, "evaluation.attacks has entries that are no names")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"The results of a cell {path} are damaged: {reason}. Restore the file, or remove it and run the cell again."
    )


def _outcomes(path: Path, facts: dict[str, Any]) -> Iterable[tuple[tuple[str, str], np.ndarray]]:
    for checkpoint in CHECKPOINTS:
        for attack, record in value_at(facts, f"results.{checkpoint}", {}).items():
            count, correct = value_at(record, "n"), value_at(record, "correct")
            if type(count) is not int or not 0 < count <= _MOST_IMAGES:
                raise _damaged(path, f"the outcomes of {quoted(attack)} are of {quoted(count)} images")
            try:
                packed = base64.b64decode(str(value_at(record, "outcomes", "")), validate=True)
                right = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)
            except (binascii.Error, ValueError, TypeError) as error:
                raise _damaged(path, f"the outcomes of {quoted(attack)} cannot be read") from error
            if len(packed) != -(-count // 8) or int(right.sum()) != correct:
                raise _damaged(path, f"the outcomes of {quoted(attack)} do not match its counts")
            yield (checkpoint, str(attack)), right


@dataclass(frozen=True)
class Summary:
    """One number of a table: an accuracy in %, over the seeds of a setting."""

    mean: float
    low: float  # 95 % Wilson interval of n images at the mean accuracy: of the choice of test images only
    high: float
    n: int
    deviation: float | None  # standard deviation over seeds (denominator S - 1), None for one seed
    seeds: tuple[int, ...]
    printed: float | None = None  # the paper's number

    @property
    def text(self) -> str:
        """`61.8 ± 0.4`, or `61.8` for one seed."""
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")

    @property
    def interval(self) -> str:
        """`[58.7, 64.8]`."""
        return f"[{self.low:.1f}, {self.high:.1f}]"


def summarise(cells: Sequence[Measured], checkpoint: str, measure: str, printed: float | None = None) -> Summary | None:
    """The accuracy over the seeds of one setting, None if no cell has it.

    Raises:
        UserError: the seeds were evaluated differently.
    """
    found = [cell for cell in cells if (checkpoint, measure) in cell.outcomes]
    if not found:
        return None
    first, rights = found[0], [cell.outcomes[checkpoint, measure] for cell in found]
    for cell, right in zip(found, rights, strict=True):
        if cell.protocol(measure) != first.protocol(measure) or len(right) != len(rights[0]):
            raise UserError(
                f"{first.path} and {cell.path} are seeds of one cell that were evaluated differently. Evaluate one again."
            )
    n, each = len(rights[0]), [100 * float(right.mean()) for right in rights]
    mean = float(np.mean(each))
    low, high = wilson(mean / 100 * n, n)
    deviation = float(np.std(each, ddof=1)) if len(each) > 1 else None
    return Summary(mean, 100 * low, 100 * high, n, deviation, tuple(cell.seed for cell in found), printed)


def by_setting(
    cells: Iterable[Measured], edition: str, space: str = "pixel", split: str = "held-out"
) -> dict[Setting, list[Measured]]:
    """The finished cells of an edition by setting."""
    groups: dict[Setting, list[Measured]] = {}
    for cell in cells:
        if cell.finished and (cell.edition, cell.space, cell.split) == (edition, space, split):
            groups.setdefault(cell.setting, []).append(cell)
    return groups


def strongest_attack(cells: Iterable[Measured]) -> str:
    """What stands for AutoAttack in these cells: `aa`, or the parts of it that were run, such as `aa:apgd-ce+apgd-t`."""
    names = {attack for cell in cells for _, attack in cell.outcomes if attack.partition(":")[0] == "aa"}
    return "aa" if "aa" in names else min(names, default="aa")
