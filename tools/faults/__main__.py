"""Fault campaigns: break something many times, and count the lost steps and the wrong results.

    python tools/faults                               all of them
    python tools/faults checkpoints --trials 200      SIGKILL at random moments of saving
    python tools/faults operations                    SIGKILL before each file operation of two consecutive saves
    python tools/faults runs ranks                    whole runs: interrupted at random; one of two processes killed
    python tools/faults stopped files full-disk       a frozen process; damaged files; a full disk

Each prints one row. `lost steps` is the most that a single fault cost; `wrong results` counts violated expectations and must
be 0. Every campaign starts real processes in a temporary folder that it removes.

A campaign is a function trials -> Row and an entry of CAMPAIGNS.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # `python tools/faults` puts tools/faults on the path instead of tools

from faults.checkpoints import Row, checkpoints, operations
from faults.runs import files, full_disk, ranks, runs, stopped
from nrat_scale.core.errors import UserError, did_you_mean, run_cli

# name -> campaign, default number of trials
CAMPAIGNS: dict[str, tuple[Callable[[int], Row], int]] = {
    "checkpoints": (checkpoints, 200),
    "operations": (operations, 1),
    "runs": (runs, 12),
    "ranks": (ranks, 3),
    "stopped": (stopped, 1),
    "files": (files, 1),
    "full-disk": (full_disk, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CAMPAIGN", help=f"of: {', '.join(CAMPAIGNS)} (default: all)")
    parser.add_argument("--trials", type=int, help="faults per campaign (default: as in docs/reliability.md)")
    given = parser.parse_args(argv)
    for name in given.names:
        if name not in CAMPAIGNS:
            raise UserError(f"There is no campaign '{name}'. {did_you_mean(name, CAMPAIGNS)}")
    if given.trials is not None and given.trials < 1:
        raise UserError(f"--trials is {given.trials}; it must be at least 1.")
    print("| fault | trials | lost steps (max) | wrong results |\n|---|---|---|---|", flush=True)
    wrong = []
    for name in given.names or CAMPAIGNS:
        campaign, usual = CAMPAIGNS[name]
        begun = time.perf_counter()
        row = campaign(given.trials or usual)
        print(f"| {row.fault} | {row.trials} | {row.lost_steps} | {len(row.wrong)} |", flush=True)
        print(f"{name}: {time.perf_counter() - begun:.0f} s; {row.note}", file=sys.stderr, flush=True)
        wrong += row.wrong
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
