"""One invocation: run the cells that are missing, or say what they are, and write the tables of those that are finished."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nrat_scale.core.errors import UserError, did_you_mean, quoted
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.reproduce.cells import FINISHED, STORED, Place, check_recipes, check_start
from nrat_scale.reproduce.forecast import forecast
from nrat_scale.reproduce.grid import Choices, Grid
from nrat_scale.reproduce.grid_files import METHODS, read_grid
from nrat_scale.reproduce.jobs import Outcome, run_local, write_script
from nrat_scale.reproduce.measured import Setting, read_cell
from nrat_scale.reproduce.outputs import Outputs, write_outputs
from nrat_scale.reproduce.page import PageFacts
from nrat_scale.reproduce.table import Plan
from nrat_scale.reproduce.table_text import counted

OUT = Path("runs/reproduce")
SCRIPTS = {"shell": "sh", "slurm": "sbatch"}  # `--jobs` -> ending of the script
JOBS = ("local", *SCRIPTS)


@dataclass(frozen=True)
class Request:
    """What to reproduce, on what, and where."""

    what: str  # a grid
    edition: str = "paper"
    choices: Choices = field(default_factory=Choices)
    only: tuple[str, ...] = ()  # METHOD, METHOD/NOISE-RATE or METHOD/NOISE-RATE/seed-S; empty: all cells
    seeds: int | None = None
    out: Path = OUT
    stored: Path | None = STORED  # finished cells of the repository

    @property
    def words(self) -> list[str]:
        """The command line of this request, without the cells that it selects."""
        choices = self.choices
        options = {"edition": self.edition, "space": choices.space, "noise": choices.noise, "curves": choices.curves}
        options |= {"out": str(self.out), "cells": "none" if self.stored is None else str(self.stored)}
        usual = {"space": "pixel", "noise": "default", "curves": "held-out", "cells": str(STORED)}
        options |= {} if self.seeds is None else {"seeds": str(self.seeds)}
        given = [word for key, value in options.items() if usual.get(key) != value for word in (f"--{key}", value)]
        return ["-m", "nrat_scale.reproduce", self.what, *choices.settings, *given]

    def places(self, grid: Grid) -> list[Place]:
        """All cells of the grid, whether selected or not."""
        if self.stored is not None and self.stored != STORED and not self.stored.is_dir():
            raise UserError(f"--cells {self.stored} is no folder. Give that of finished cells, or none.")
        cells = grid.cells(self.edition, self.choices, self.seeds)
        return [Place(cell, self.out, self.stored) for cell in cells]


def selected(places: Sequence[Place], only: Sequence[str]) -> list[Place]:
    """The cells that `only` names.

    Raises:
        UserError: a name is not in the grid.
    """
    for name in only:
        if not any(_is_in(place, name) for place in places):
            parts = {"/".join(place.cell.id.split("/")[: name.count("/") + 1]) for place in places}
            raise UserError(f"--only names {quoted(name)}, which is not in this grid. {did_you_mean(name, parts)}")
    return [place for place in places if not only or any(_is_in(place, name) for name in only)]


def _is_in(place: Place, name: str) -> bool:
    return f"{place.cell.id}/".startswith(f"{name}/")


def listing(request: Request) -> str:
    """The cells of a grid with their states, one a line."""
    places = selected(request.places(read_grid(request.what)), request.only)
    return "\n".join(f"{place.state():9s} {place.key}" for place in places)


def reproduce(request: Request, jobs: str = "local", *, dry_run: bool = False) -> int:
    """Run what is missing, or write a script that does, and print the table of what is finished.

    Returns:
        The exit status: 1 if a cell failed.

    Raises:
        UserError: bad input, a missing data set, finished cells of another recipe, a full disk.
    """
    grid = read_grid(request.what)
    everything = request.places(grid)
    places = selected(everything, request.only)
    states = {place.key: place.state() for place in places}
    missing = [place for place in places if states[place.key] != FINISHED]
    records = [place.record() for place in places if states[place.key] == FINISHED]
    finished = [record for record in records if record is not None]
    for edition in dict.fromkeys(place.cell.edition for place in places):
        print(f"{edition.title} ({edition.name})")
    print(f"{grid.title}: {counted(len(places), 'cell')}, {len(finished)} finished", flush=True)
    for omission in grid.omissions:
        print(f"  not in the paper: {omission}")
    if dry_run:
        check_recipes(missing)
        for place in places:
            print(f"  {states[place.key]:9s} {place.key}")
        print(forecast(missing, finished) if missing else "Nothing is missing.")
        return 0
    outcome = Outcome()
    if missing:
        for place in everything:
            place.state()  # the table at the end has all of them: refuse finished cells of another recipe now
        check_start(missing, finished, grid.prepare)
        command = [sys.executable, *request.words, "--cell"]
        if jobs in SCRIPTS:
            path = request.out / f"{grid.name}-{request.edition}{request.choices.suffix}.{SCRIPTS[jobs]}"
            print(f"written: {write_script(jobs, path, grid.title, missing, command)}")
            return 0
        outcome = run_local(missing, command)
    for outputs in write_tables(grid, request):
        print(f"\n{outputs}\nwritten: {', '.join(map(str, outputs.files))}")
    if outcome.text:
        print(outcome.text, flush=True)
    return 1 if outcome.failed else 0


def write_tables(grid: Grid, request: Request, folder: Path | None = None) -> list[Outputs]:
    """Write the tables, figures and page of all cells of the grid, whether `request.only` names them and are finished or not.

    Args:
        folder: the tables of an edition are written to FOLDER/EDITION; by default `request.out`, beside the cells.
    """
    found, places = [], request.places(grid)
    command = shlex.join(["python", *request.words])
    titles, sources = (
        {method: str(facts[key]) for method, facts in grid.methods.items() if key in facts}
        for key in ("title", "source")
    )
    for edition in dict.fromkeys(place.cell.edition for place in places):
        mine = [place for place in places if place.cell.edition == edition]
        seeds = Counter(Setting(place.cell.method, place.cell.noise.kind, place.cell.noise.rate) for place in mine)
        methods = {setting.method for setting in seeds}
        changed = f". Changed in all cells: {', '.join(request.choices.settings)}" if request.choices.settings else ""
        plan = Plan(
            grid.name,
            edition.name,
            tuple(seeds),
            seeds=seeds,
            title=grid.title + changed,
            space=request.choices.space,
            split=request.choices.curves,
            measures=tuple(edition.attacks.split(",")),
            titles=titles,
            sources=sources,
            reference="nrat" if "nrat" in methods else next(iter(seeds)).method,
            references=grid.references,
            paper=grid.paper,
        )
        facts = PageFacts(
            f"{grid.title}: {edition.title}",
            command,
            omissions=grid.omissions,
            grid_file=str(grid.path),
            methods_file=str(grid.path.with_name(METHODS)),
        )
        # `state` refuses finished cells of another recipe.
        cells = [read_cell(path) for place in mine if place.state() and (path := place.found) is not None]
        target = (folder or request.out) / (edition.name + request.choices.suffix)
        found.append(write_outputs(plan, cells, target, facts))
    return found


def collect(request: Request, folder: Path) -> list[Path]:
    """Copy the finished cells under `request.out` to `folder`, as the repository keeps them; those there stay.

    Raises:
        UserError: a cell there is another one of the same name.
    """
    copied = []
    for place in selected(request.places(read_grid(request.what)), request.only):
        if place.state() == FINISHED and place.found == place.result:
            target = folder / place.cell.folder / f"{place.cell.id}.json"
            if not target.is_file():
                make_folder(target.parent)
                write_atomically(target, place.result.read_bytes())
                copied.append(target)
            elif read_cell(target).recipe_hash != place.hash:
                raise UserError(f"{target} is a cell of another recipe than {place.result}. Move one of them away.")
    return copied


def one_cell(request: Request, key: str) -> Place:
    """The cell of this key.

    Raises:
        UserError: the grid has no such cell.
    """
    found = {place.key: place for place in request.places(read_grid(request.what))}
    if key not in found:
        raise UserError(f"There is no cell {quoted(key)}. {did_you_mean(key, found)}")
    return found[key]
