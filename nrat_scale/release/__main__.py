"""Command line of releases: `python -m nrat_scale.release RUN --to DIR`."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.release.bundle import Options, build_release, checkpoint_weights, require_run
from nrat_scale.release.publish import push, push_queued
from nrat_scale.remote.hub import check_repository

# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.release",
        description="Export a run's checkpoint as a folder that nrat_scale.load and timm load in one line, and push it to the Hub.",
        epilog="Example: python -m nrat_scale.release runs/quickstart --to releases/quickstart",
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: %(default)s")
    parser.add_argument("--unevaluated", action="store_true", help="release without results; the card says so")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too, checked against the model")
    parser.add_argument(
        "--torch-export", action="store_true", help="write model.pt2 (torch.export) too, checked as well"
    )
    parser.add_argument(
        "--push", metavar="USER/REPO", help="send it to the Hub (HF_ENDPOINT, HF_TOKEN or `hf auth login`)"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch of the repository (default: main)")
    parser.add_argument(
        "--queued", action="store_true", help="push what release.every_epochs put aside, each to its revision"
    )
    arguments = parser.parse_args(argv)
    repo, to = arguments.push, arguments.to
    if to is None and repo is None:
        raise UserError("Say where to: --to FOLDER, --push user/repo, or both.")
    if repo is None and (arguments.private or arguments.revision or arguments.queued):
        raise UserError("--private, --revision and --queued need --push user/repo.")
    if repo is not None:
        check_repository(repo, arguments.revision)
    if arguments.queued:
        if to is not None or arguments.revision is not None:
            raise UserError("--queued sends each checkpoint to a revision of its own; leave out --to and --revision.")
        print("\n".join(push_queued(arguments.run, repo, private=arguments.private)))
        return
    options = Options(arguments.unevaluated, arguments.onnx, arguments.torch_export)
    require_run(arguments.run)
    weights = checkpoint_weights(arguments.run, arguments.checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_release(arguments.run, weights, to or Path(temporary) / repo.partition("/")[2], options)
        if to is not None:
            print(f'released to {folder}; load it with:\n  import nrat_scale; model = nrat_scale.load("{folder}")')
        if repo is not None:
            sent = push(folder, repo, private=arguments.private, revision=arguments.revision)
            address = f"{repo}@{arguments.revision}" if arguments.revision else repo
            print(f"{address}: {f'{len(sent)} files sent' if sent else 'everything is there already'}")


if __name__ == "__main__":
    run_cli(main)
