"""Fault campaigns that anyone can run: break something at random many times, and count what was lost or wrong.

    python tools/faults.py                               all of them
    python tools/faults.py checkpoints --trials 200      SIGKILL at random moments of saving
    python tools/faults.py operations                    SIGKILL before each file operation of two saves, one after the other
    python tools/faults.py runs ranks                    whole runs: interrupted at random; one of two processes killed
    python tools/faults.py stopped files full-disk       a process that stands still; damaged files; no room

Each prints one row. `lost steps` is the most that a single fault cost; `wrong results` counts trials after which something
was not as it must be, and must be 0. Everything happens in real processes, in a temporary folder that is removed.

A campaign is a function trials -> Row, and an entry of CAMPAIGNS.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from faults_checkpoints import Row, checkpoints, operations
from faults_runs import files, full_disk, ranks, runs, stopped
from nrat_scale.core.errors import UserError, run_cli

# The usual number of trials of each; a process that trains takes some seconds to start.
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
    parser.add_argument("--trials", type=int, help="faults of each campaign (default: what its row in the docs has)")
    given = parser.parse_args(argv)
    for name in given.names:
        if name not in CAMPAIGNS:
            raise UserError(f"There is no campaign '{name}'. Known: {', '.join(CAMPAIGNS)}.")
    if given.trials is not None and given.trials < 1:
        raise UserError(f"--trials is {given.trials}; it must be 1 or more.")
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
