"""Command line of reports: `python -m nrat_scale.report RUN [RUN ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import run_cli
from nrat_scale.report.api import report


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report, print its table and its path; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.report",
        description="One HTML page about one run or several: robustness, learning curves, label noise.",
        epilog="Example: python -m nrat_scale.report runs/nrat runs/plain --out comparison.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="(default: report.html in the first RUN)")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also the results, one row per run, checkpoint and attack"
    )
    parser.add_argument("--latex", type=Path, metavar="FILE", help="also the table of accuracies for a paper")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="also every table of the page, as CSV and LaTeX")
    given = vars(parser.parse_args(argv))
    written = report(*given.pop("runs"), **given)
    print(written)
    print(written.path)


if __name__ == "__main__":
    run_cli(main)
