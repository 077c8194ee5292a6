"""Command line of reproduction: `python -m nrat_scale.reproduce WHAT`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import UserError, did_you_mean, quoted, run_cli
from nrat_scale.core.files import make_folder
from nrat_scale.reproduce.cells import FINISHED, STORED, Place, check_data
from nrat_scale.reproduce.grid import ASYMMETRIC, Choices, Grid, grid_names, read_grid
from nrat_scale.reproduce.jobs import LOCK_VARIABLE, run_local, write_script

JOBS = ("local", "shell", "slurm")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.reproduce",
        description="Train and evaluate what a table or figure of the paper consists of; the same command goes on.",
        epilog="Example: python -m nrat_scale.reproduce table1 --edition fashion --only nrat,trades --seeds 1",
    )
    add = parser.add_argument
    add("what", nargs="?", metavar="WHAT", help=f"{', '.join(grid_names())}, a grid file (.yaml), or claims")
    add("settings", nargs="*", metavar="key=value", help="any key of the recipe, for all cells (give another --out)")
    add("--list", action="store_true", help="list the grids, or the cells of WHAT with their state, and end")
    add("--dry-run", action="store_true", help="say what would be run and how long it takes, and end")
    only = "only cells of these methods, or METHOD/NOISE-RATE, or METHOD/NOISE-RATE/seed-S"
    add("--only", default="", metavar="METHOD,...", help=only)
    add("--seeds", type=int, metavar="N", help="number of seeds (default: the edition's)")
    add("--edition", default="paper", help="images and model: paper, fashion or mnist (default: %(default)s)")
    space = "released_code: the threat space of the paper's printed numbers, stamped on all results"
    add("--space", default="pixel", help=space)
    add("--noise", default="default", help=f"what asymmetric means: {', '.join(ASYMMETRIC)} (default: %(default)s)")
    curves = "images of the curves: held-out, or test, as in the paper, stamped (default: %(default)s)"
    add("--curves", default="held-out", help=curves)
    jobs = "run here, or write a script for a shell or for Slurm (default: %(default)s)"
    add("--jobs", choices=JOBS, default=JOBS[0], help=jobs)
    add("--out", type=Path, default=Path("runs/reproduce"), help="folder of the cells (default: %(default)s)")
    cells = f"finished cells to read besides; none reads no others (default: {STORED} if it is there)"
    add("--cells", default=str(STORED), metavar="DIR", help=cells)
    add("--cell", metavar="KEY", help="run this one cell in this process, as the scripts do")
    parsed = parser.parse_intermixed_args(argv)
    if parsed.what is None and not parsed.list:
        parser.error(f"name a grid: {', '.join(grid_names())}")
    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["claims"]:
        from nrat_scale.reproduce.findings import main as write_claims  # not at the top: it imports Matplotlib

        write_claims(words[1:])
        return
    given = _arguments(argv)
    if given.what is None:
        for name in grid_names():
            print(f"{name:16s} {read_grid(name).title}")
        return
    if "=" in given.what and not Path(given.what).exists():
        raise UserError(f"{given.what} is an override. Name the grid before it, such as table1.")
    grid = read_grid(given.what)
    choices = Choices(given.space, given.noise, given.curves, tuple(given.settings))
    stored = None if given.cells == "none" else Path(given.cells)
    cells = [Place(cell, given.out, stored) for cell in grid.cells(given.edition, choices, given.seeds)]
    if given.cell is not None:
        _run_one(given.cell, cells)
        return
    cells = _selected(cells, given.only)
    states = {place.key: place.state() for place in cells}
    if given.list:
        print("\n".join(f"{states[place.key]:9s} {place.key}" for place in cells))
        return
    missing = [place for place in cells if states[place.key] != FINISHED]
    done = len(cells) - len(missing)
    print(f"{grid.title}: {len(cells)} cells of edition {given.edition}, {done} finished", flush=True)
    if missing and not given.dry_run:
        check_data(missing)
        _run(grid, given, missing)


def _run(grid: Grid, given: argparse.Namespace, missing: list[Place]) -> None:
    """Run the cells that are not finished, or write a script that does; ends with status 1 if one failed."""
    command = _command(given)
    if given.jobs != "local":
        suffix = {"shell": "sh", "slurm": "sbatch"}[given.jobs]
        make_folder(given.out)
        path = given.out / f"{grid.name}-{given.edition}.{suffix}"
        print(f"written: {write_script(given.jobs, path, grid.title, missing, command)}")
        return
    outcome = run_local(missing, command)
    if outcome.text:
        print(outcome.text, flush=True)
    if outcome.failed:
        sys.exit(1)


def _command(given: argparse.Namespace) -> list[str]:
    """The command of a process that runs one cell, without its key."""
    options = {"edition": given.edition, "space": given.space, "noise": given.noise, "curves": given.curves}
    options |= {"out": given.out, "cells": given.cells, **({"seeds": given.seeds} if given.seeds else {})}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "nrat_scale.reproduce", given.what, *given.settings, *words, "--cell"]


def _selected(places: list[Place], only: str) -> list[Place]:
    """The cells that `--only` names: by method, method and noise, or method, noise and seed."""
    names = [name.strip().strip("/") for name in only.split(",") if name.strip()]
    for name in names:
        if not any(_is_in(place, name) for place in places):
            parts = {"/".join(place.cell.id.split("/")[: name.count("/") + 1]) for place in places}
            raise UserError(f"--only names {quoted(name)}, which is not in this grid. {did_you_mean(name, parts)}")
    return [place for place in places if not names or any(_is_in(place, name) for name in names)]


def _is_in(place: Place, name: str) -> bool:
    return f"{place.cell.id}/".startswith(f"{name}/")


def _run_one(key: str, places: list[Place]) -> None:
    """Run one cell in this process."""
    found = {place.key: place for place in places}
    if key not in found:
        raise UserError(f"There is no cell {quoted(key)}. {did_you_mean(key, found)}")
    place = found[key]
    if place.state() == FINISHED:
        print(f"{key} is finished: {place.result}")
        return
    check_data([place])
    from nrat_scale.reproduce.work import (
        run_cell,
    )  # not at the top: it imports training and evaluation, which take seconds

    if LOCK_VARIABLE in os.environ:  # the process that started this one has claimed the cell
        run_cell(place)
        return
    with place.claimed() as lock:
        if lock is None:
            raise UserError(f"{key} is being run by another process. Wait for it, or choose another cell.")
        if place.state() != FINISHED:
            run_cell(place)


if __name__ == "__main__":
    run_cli(main)
