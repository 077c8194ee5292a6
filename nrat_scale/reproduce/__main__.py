"""Command line of reproduction: `python -m nrat_scale.reproduce WHAT`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.reproduce.cells import FINISHED, STORED, Place, check_start
from nrat_scale.reproduce.grid import ASYMMETRIC, Choices
from nrat_scale.reproduce.grid_files import grid_names, read_grid
from nrat_scale.reproduce.jobs import LOCK_VARIABLE
from nrat_scale.reproduce.run import JOBS, OUT, Request, collect, listing, one_cell, reproduce, write_tables

CLAIMS = "claims"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.reproduce",
        description="Train and evaluate what a table or figure of the paper consists of. The same command goes on.",
        usage="%(prog)s WHAT [key=value ...] [options]",
        epilog="Example: python -m nrat_scale.reproduce table1 --edition fashion --only nrat,trades --seeds 1",
    )
    add = parser.add_argument
    what = f"{', '.join(grid_names())}; {CLAIMS}: decide the paper's claims from finished cells; or a grid file (.yaml)"
    add("what", nargs="?", metavar="WHAT", help=what)
    add("settings", nargs="*", metavar="key=value", help="any key of the recipe, for all cells (give another --out)")
    add("--list", action="store_true", help="list the grids, or the cells of WHAT with their states, and end")
    add("--dry-run", action="store_true", help="list what would be run and how many hours it takes, and end")
    only = "only these cells: METHOD, METHOD/NOISE-RATE or METHOD/NOISE-RATE/seed-S, comma-separated"
    add("--only", default="", metavar="METHOD,...", help=only)
    add("--seeds", type=int, metavar="N", help="number of seeds (default: the edition's, by method)")
    add("--edition", default="paper", help="images and model: paper, fashion or mnist (default: %(default)s)")
    space = (
        "released_code: the threat space of the paper's printed numbers, stamped on all results (default: %(default)s)"
    )
    add("--space", default="pixel", help=space)
    add("--noise", default="default", help=f"what asymmetric means: {', '.join(ASYMMETRIC)} (default: %(default)s)")
    curves = "images of the learning curves: held-out, or test, as in the paper, stamped (default: %(default)s)"
    add("--curves", default="held-out", help=curves)
    add("--jobs", choices=JOBS, default=JOBS[0], help="run here, or write a script (default: %(default)s)")
    add("--out", type=Path, default=OUT, help="folder of the cells and tables (default: %(default)s)")
    cells = "finished cells that count, too; none: only those of --out (default: docs/reproduction of the repository)"
    add("--cells", default=str(STORED), metavar="DIR", help=cells)
    add("--collect", type=Path, metavar="DIR", help="copy the cell.json of finished cells to DIR, and end")
    tables = "only write the tables, figures and page of the finished cells to DIR/EDITION, and end"
    add("--tables", type=Path, metavar="DIR", help=tables)
    add("--cell", metavar="KEY", help="run this one cell in this process, as the scripts of --jobs do")
    parsed = parser.parse_intermixed_args(argv)
    if parsed.what is None and not parsed.list:
        parser.error(f"name a grid, such as table1: {', '.join(grid_names())}")
    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [CLAIMS]:
        from nrat_scale.reproduce.findings import main as write_claims  # not at the top: it imports Matplotlib

        write_claims(words[1:])
        return
    given = _arguments(words)
    if given.what is None:
        print("\n".join(f"{name:16s} {read_grid(name).title}" for name in grid_names()))
        return
    if given.what == CLAIMS:
        raise UserError(
            f"{CLAIMS} has options of its own and comes first: python -m nrat_scale.reproduce {CLAIMS} --help"
        )
    if "=" in given.what and not Path(given.what).exists():
        raise UserError(f"{given.what} is an override. Name the grid before it, such as table1.")
    choices = Choices(given.space, given.noise, given.curves, tuple(given.settings))
    only = tuple(name.strip().strip("/") for name in given.only.split(",") if name.strip())
    stored = None if given.cells == "none" else Path(given.cells)
    request = Request(given.what, given.edition, choices, only, given.seeds, given.out, stored)
    if given.cell is not None:
        _run_here(one_cell(request, given.cell))
    elif given.list:
        print(listing(request))
    elif given.tables is not None:
        for written in write_tables(read_grid(given.what), request, given.tables):
            print(f"{written}\nwritten: {', '.join(map(str, written.files))}")
    elif given.collect is not None:
        copied = collect(request, given.collect)
        print(f"{len(copied)} finished cell(s) copied to {given.collect}")
    else:
        sys.exit(reproduce(request, given.jobs, dry_run=given.dry_run))


def _run_here(place: Place) -> None:
    """Run one cell in this process."""
    from nrat_scale.reproduce.work import (
        run_cell,  # not at the top: it imports training and evaluation, which take seconds
    )

    if LOCK_VARIABLE in os.environ:  # the process that started this one has claimed the cell and checked the data
        run_cell(place)
        return
    with place.claimed() as lock:
        if lock is None:
            raise UserError(f"{place.key} is being run by another process. Wait for it, or choose another cell.")
        if place.state() != FINISHED:
            check_start([place])
            run_cell(place)
    print(f"{place.key} is finished: {place.result}")


if __name__ == "__main__":
    run_cli(main)
