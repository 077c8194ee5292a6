"""Cells on disk: where each lies, what state it is in, and which process works on it.

OUT/EDITION/cells/METHOD/NOISE-RATE/seed-S/run/        the run directory
OUT/EDITION/cells/METHOD/NOISE-RATE/seed-S/cell.json   the result; written last
OUT/EDITION/cells/METHOD/NOISE-RATE/seed-S/log.txt     what training and evaluation printed
STORED/EDITION/METHOD/NOISE-RATE/seed-S.json           a finished cell.json kept in the repository
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nrat_scale
from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import make_folder, read_json, write_json
from nrat_scale.core.locks import try_lock
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.audit_scores import read_audit_scores
from nrat_scale.data.shards import open_shards
from nrat_scale.recipe import RecipeSpec, identity_values
from nrat_scale.report.run import value_at
from nrat_scale.reproduce.grid import Cell
from nrat_scale.reproduce.measured import VERSION

FINISHED, FAILED, STARTED, MISSING = "finished", "failed", "started", "missing"
STORED = Path(nrat_scale.__file__).parents[1] / "docs" / "reproduction"  # finished cells of the repository
# Keys of a recipe that are no part of a cell's hash: where the data are and what the run is called. The fingerprints of the
# data are in cell.json.
_PLACES = ("name", "data.real.shards", "data.generated.shards", "data.validation.shards", "data.real.exclude")
_IDENTITY = ("edition", "method", "noise", "rate", "seed", "space", "curves")  # of cell.json: which cell it is


@dataclass(frozen=True)
class Place:
    """Where a cell lies."""

    cell: Cell
    out: Path
    stored: Path | None = STORED  # finished cells of the repository; None: do not read them

    @property
    def key(self) -> str:
        """The cell's name among all editions."""
        return f"{self.cell.edition.name}/{self.cell.id}"

    @property
    def folder(self) -> Path:
        """All that the cell writes."""
        return self.out / self.cell.folder / "cells" / self.cell.id

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What training and evaluation printed."""
        return self.folder / "log.txt"

    @property
    def result(self) -> Path:
        """The cell's result."""
        return self.folder / "cell.json"

    @property
    def stored_result(self) -> Path | None:
        """The result in the repository."""
        return None if self.stored is None else self.stored / self.cell.folder / f"{self.cell.id}.json"

    @cached_property
    def recipe(self) -> RecipeSpec:
        """The cell's recipe, whose run directory is here."""
        return self.cell.recipe(self.run)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the cell's result, as JSON values."""
        edition = self.cell.edition
        asked: dict[str, Any] = {
            "attacks": edition.attacks.split(","),
            "images": edition.images,
            "aa_images": edition.aa_images,
        }
        if edition.last_attacks is not None:
            asked["last_attacks"] = edition.last_attacks.split(",")
        asked["curves"] = self.cell.choices.curves
        return {**recipe_values(self.recipe), **{f"evaluation.{key}": value for key, value in asked.items()}}

    @property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of `settings`."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def found(self) -> Path | None:
        """The file of the cell's result: the finished one, here or in the repository, else that of a failure here."""
        paths = [path for path in (self.result, self.stored_result) if path is not None and path.is_file()]
        finished = (path for path in paths if read_json(path, "result of a cell").get("status") == FINISHED)
        return next(finished, paths[0] if paths else None)

    def record(self) -> dict[str, Any] | None:
        """The content of `found`, None if there is none.

        Raises:
            UserError: the file is damaged, or it is a finished cell of another recipe.
        """
        if (path := self.found) is None:
            return None
        content = read_json(path, "result of a cell")
        if content.get("status") == FINISHED:
            self._check_same(content, path)
        return content

    def state(self) -> str:
        """`finished`, `failed`, `started` or `missing`."""
        record = self.record()
        if record is not None:
            return FINISHED if record.get("status") == FINISHED else FAILED
        return STARTED if RunFolder(self.run).recipe.is_file() else MISSING

    def _check_same(self, content: dict[str, Any], path: Path) -> None:
        """Refuse the result of another recipe or evaluation."""
        if content.get("version") != VERSION:
            version = quoted(content.get("version"))
            raise UserError(f"{path} is of version {version}; this version reads {VERSION}. Move it away.")
        for key, value in self.facts().items():
            if key in _IDENTITY and content.get(key, value) != value:
                what = f"{key} is {quoted(content[key])} in it and {quoted(value)} in the cell that belongs there"
                raise UserError(f"{path} is the result of another cell: {what}. Move it away.")
        if content.get("recipe_hash") == self.hash:
            return
        recipe, now = content.get("recipe"), self.settings
        before = recipe if isinstance(recipe, dict) else {}
        known = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        change = "its hash differs"
        if known:
            change = f"{known[0]} was {quoted(before.get(known[0]))} and is {quoted(now.get(known[0]))} now"
        raise UserError(
            f"{path} is a finished cell of another recipe: {change}. No finished cell is replaced: undo the change, move that "
            "file away, or give another --out (and --cells none, if the file is one of the repository)."
        )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[int | None]:
        """Claim the cell until the block ends or this process dies: yields a descriptor, None if another process has it.

        A child process that inherits the descriptor holds the claim, too.
        """
        make_folder(self.folder)
        with try_lock(self.result) as lock:
            yield lock

    def fail(self, error: str) -> None:
        """Write that the cell failed and why; a full disk is no further error."""
        with contextlib.suppress(UserError):
            write_json(self.result, {**self.facts(), "status": FAILED, "error": error})

    def facts(self) -> dict[str, Any]:
        """The first keys of cell.json: which cell it is, and of which recipe."""
        cell = self.cell
        return {
            "version": VERSION,
            "edition": cell.edition.name,
            "method": cell.method,
            "noise": cell.noise.kind,
            "rate": cell.noise.rate,
            "seed": cell.seed,
            "space": cell.choices.space,
            "curves": cell.choices.curves,
            "status": FINISHED,
            "error": None,
            "recipe": self.settings,
            "recipe_hash": self.hash,
        }


def recipe_values(recipe: RecipeSpec) -> dict[str, Any]:
    """The recipe's keys that decide what is computed, without the places of the data; JSON values."""
    values = {key: value for key, value in identity_values(recipe).items() if key not in _PLACES}
    return dict(json.loads(json.dumps(values)))


def check_recipes(places: Sequence[Place]) -> None:
    """Refuse a wrong recipe before anything is run: that of one seed of each method and noise is read."""
    for place in {(place.cell.edition, place.cell.method, place.cell.noise): place for place in places}.values():
        assert place.recipe


def check_start(
    places: Sequence[Place], finished: Iterable[Mapping[str, Any]] = (), prepare: Mapping[str, str] | None = None
) -> None:
    """Refuse to begin with a wrong recipe, without a data set, an audit or scores, or with other test images than finished cells have.

    Args:
        prepare: edition -> the commands that make what the grid needs besides data sets.

    Raises:
        UserError: the message has the commands that make the data.
    """
    check_recipes(places)
    _check_data(places, finished)
    for path, key, edition in sorted(
        {(*one, place.cell.edition.name) for place in places for one in _files(place.recipe)}
    ):
        commands = (prepare or {}).get(edition)
        if commands and not Path(path).exists():
            raise UserError(f"{key}: there is no {path}. The commands that make what this grid needs:\n{commands}")
        if key.endswith("audit.scores"):
            read_audit_scores(path, key)
        elif not Path(path).is_file():
            raise UserError(
                f"{key}: there is no {path}. docs/objectives.md says how the scores of this noise are made."
            )


def _files(recipe: RecipeSpec) -> list[tuple[str, str]]:
    """The files and folders that a recipe needs besides shards, each with its key."""
    real, generated = recipe.data.real, recipe.data.generated
    found = [(part.audit.scores, f"{part.audit.KEY}.scores") for part in (real, generated)]
    found += [(real.noise.scores, "data.real.noise.scores"), (generated.noise.scores, "data.generated.noise.scores")]
    return [(str(path), key) for path, key in found if path is not None]


def _check_data(places: Sequence[Place], finished: Iterable[Mapping[str, Any]]) -> None:
    for place in {place.cell.edition.name: place for place in places}.values():
        edition, data = place.cell.edition, place.recipe.data
        needed = {
            "data.real.shards": (data.real.shards, data.real.prepare),
            "data.generated.shards": (data.generated.shards, data.generated.prepare),
            "the test images": (edition.test_shards, edition.test_prepare),
        }
        commands = [line for _, text in needed.values() for line in (text or "").splitlines()]
        opened = {
            what: open_shards(shards, f"{what} of edition {edition.name}", commands=list(dict.fromkeys(commands)))
            for what, (shards, _) in needed.items()
            if shards is not None
        }
        now = opened["the test images"].fingerprint
        for record in finished:
            before = str(value_at(record, "evaluation.data", ""))
            if record.get("edition") == edition.name and before != now:
                raise UserError(
                    f"{edition.test_shards} has other images than those that finished cells of edition {edition.name} were "
                    f"evaluated on (fingerprints {now[:12]} and {quoted(before[:12])}), so that they could not be compared. "
                    "Prepare the same images, or give another --out and --cells none."
                )
