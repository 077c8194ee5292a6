"""Command line of releases: `python -m nrat_scale.release RUN --to DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import printable, run_cli
from nrat_scale.release.api import release
from nrat_scale.release.bundle import EXPORTED, ONNX


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.release",
        description="Export a run's checkpoint as a folder that nrat_scale.load and timm load in one line, and push it to the Hub.",
        epilog="Example: python -m nrat_scale.release runs/quickstart --to releases/quickstart",
    )
    add = parser.add_argument
    add("run", type=Path, help="run directory")
    add("--to", type=Path, metavar="FOLDER", help="new folder to write")
    add("--checkpoint", choices=("best", "last"), default="best", help="default: %(default)s")
    add("--unevaluated", action="store_true", help="release without results; the card says so")
    add("--onnx", action="store_true", help=f"also write {ONNX}, compared with the model")
    add("--torch-export", action="store_true", help=f"also write {EXPORTED} (torch.export), compared with the model")
    add("--trust-code", action="store_true", help="import the model's code of a run outside the working directory")
    add(
        "--push",
        metavar="USER/REPO",
        help="send it to the Hub, or to hf://buckets/USER/BUCKET/FOLDER (HF_TOKEN or `hf auth login`)",
    )
    add(
        "--license",
        metavar="ID",
        help="licence of the weights, such as cc-by-4.0: the Hub's identifier (default: not stated)",
    )
    add("--license-name", metavar="NAME", help="of --license other")
    add("--license-link", metavar="URL", help="of --license other")
    add(
        "--benchmark",
        metavar="USER/DATASET",
        help="the Hub data set whose leaderboard the results are for (default: the test images')",
    )
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", help="branch of the repository (default: main)")
    add("--queued", action="store_true", help="push each checkpoint queued by release.every_epochs to its own revision")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the release, push it, or both; see `--help`."""
    made = release(**vars(_arguments(argv)))
    own = f", model={made.own_code[1]}" if made.own_code else ""
    how = "load it with:\n  import nrat_scale; model = nrat_scale.load"
    if made.folder is not None:
        print(f'released to {made.folder}; {how}("{made.folder}"{own})')
    if made.own_code:
        print(f"The release needs the code of {printable(':'.join(made.own_code))}, which it does not contain.")
    if made.queued:
        print("\n".join(made.queued))
    elif made.address is not None:
        sent = f"{len(made.sent)} files sent" if made.sent else "every file is already there"
        print(f'{made.address}: {sent}; {how}("{made.address}"{own})')


if __name__ == "__main__":
    run_cli(main)
