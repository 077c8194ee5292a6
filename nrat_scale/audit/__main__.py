"""Command line of the audit: `python -m nrat_scale.audit SHARDS`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from nrat_scale.audit.api import audit
from nrat_scale.core.errors import run_cli


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.audit",
        description="How many labels of shards are wrong, and which, with a 95 % interval. The same command resumes an audit.",
        epilog="Example: python -m nrat_scale.audit data/train --folds 5 --clean-holdout data/test",
    )
    add = parser.add_argument
    add("data", metavar="SHARDS", help="folder or address of shards")
    add("overrides", nargs="*", metavar="key=value", help="any key of the recipe of the folds; optional")
    model = "a run directory, a release folder or user/repo[@revision] that never saw the images; instead of folds"
    add("--model", metavar="RUN_OR_RELEASE", help=model)
    add("--unseen", action="store_true", help="the model has no record of its training data, but never saw the images")
    add("--checkpoint", default="best", choices=("best", "last"), help="of a run (default: %(default)s)")
    add("--folds", type=int, metavar="K", help="train K models, each on the images outside its fold (default: 5)")
    recipe = "of the folds (default: natural training of a small CNN); its label noise is injected, too"
    add("--recipe", type=Path, help=recipe)
    hold_out = "images whose labels are right: the estimate is then without the classifier's errors"
    add("--clean-holdout", metavar="SHARDS", help=hold_out)
    noise = "label noise to inject first, as training does, such as symmetric:0.4:0; `none` for none"
    add("--noise", metavar="KIND:RATE:SEED", help=noise)
    add("--out", type=Path, metavar="DIR", help="folder of the audit (default: SHARDS-audit, beside the shards)")
    add("--batch-size", type=int, default=512, help="images in one forward pass (default: %(default)s)")
    add("--bootstrap", type=int, default=1000, help="replicates of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the folds and the bootstrap (default: %(default)s)")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    given = vars(_arguments(argv))
    found = audit(given.pop("data"), **given)
    if PartialState().is_main_process:
        print(f"{found}\nwritten to {found.path}")


if __name__ == "__main__":
    run_cli(main)
