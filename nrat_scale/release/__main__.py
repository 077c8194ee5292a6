"""Command line of releases: `python -m nrat_scale.release RUN --to DIR`."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import UserError, printable, run_cli
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.models import is_own, origin
from nrat_scale.release.bundle import EXPORTED, ONNX, release
from nrat_scale.release.publish import push, push_queued
from nrat_scale.remote.hub import check_repository


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
    add("--push", metavar="USER/REPO", help="send it to the Hub (HF_ENDPOINT, HF_TOKEN or `hf auth login`)")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", help="branch of the repository (default: main)")
    add("--queued", action="store_true", help="push each checkpoint queued by release.every_epochs to its own revision")
    arguments = parser.parse_args(argv)
    if arguments.to is None and arguments.push is None:
        raise UserError("Name a destination: --to FOLDER, --push user/repo, or both.")
    if arguments.push is None and (arguments.private or arguments.revision or arguments.queued):
        raise UserError("--private, --revision and --queued need --push user/repo.")
    if arguments.queued and (arguments.to is not None or arguments.revision is not None):
        raise UserError("--queued sends each checkpoint to its own revision; omit --to and --revision.")
    if arguments.push is not None:
        check_repository(arguments.push, arguments.revision)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Write the release, push it, or both; see `--help`."""
    arguments = _arguments(argv)
    run, to, repo, revision = arguments.run, arguments.to, arguments.push, arguments.revision
    if arguments.queued:
        print("\n".join(push_queued(run, repo, private=arguments.private, trust_code=arguments.trust_code)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = to or Path(temporary) / repo.partition("/")[2]
        exports = [ONNX] * arguments.onnx + [EXPORTED] * arguments.torch_export
        options = {"unevaluated": arguments.unevaluated, "trust_code": arguments.trust_code}
        release(run, folder, arguments.checkpoint, exports=exports, **options)
        if to is not None:
            name = str(RunFolder(run).read_model()["architecture"])
            own = f", model={origin(name)[1]}" if is_own(name) else ""
            print(f'released to {folder}; load it with:\n  import nrat_scale; model = nrat_scale.load("{folder}"{own})')
            if own:
                print(f"The release needs the code of {printable(name)}, which it does not contain.")
        if repo is not None:
            sent = push(folder, repo, private=arguments.private, revision=revision)
            address = f"{repo}@{revision}" if revision else repo
            print(f"{address}: {f'{len(sent)} files sent' if sent else 'every file is already there'}")


if __name__ == "__main__":
    run_cli(main)
