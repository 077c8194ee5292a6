"""Command line of training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.recipe import load_recipe
from nrat_scale.train.liveness import silent_ranks
from nrat_scale.train.loop import train
from nrat_scale.train.signals import Stopped, resume_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m nrat_scale.train",
        description="Train a recipe. It continues by itself after an interruption.",
        epilog="Example: accelerate launch -m nrat_scale.train recipes/wrn28_10_gen1m.yaml objective.name=trades seed=1",
    )
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="write a torch profiler trace of N steps, and where time goes",
    )
    arguments = parser.parse_args(argv)
    if arguments.profile < 0:
        raise UserError(f"--profile is {arguments.profile}; it is a number of steps.")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    try:
        train(recipe, arguments.profile)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        lost = " and ".join(f"rank {rank}" for rank in silent_ranks(Path(recipe.run_dir))) or "another process"
        print(
            f"error: rank {os.environ.get('RANK', '0')} has lost {lost} of this run: it has ended, or did not answer within "
            f"train.timeout_minutes ({str(error).strip().splitlines()[-1]}). The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the process group would be waited for once more on the way out
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{stop}; the run is saved. Go on with:\n{resume_command()}", flush=True)
        sys.exit(stop.status)


if __name__ == "__main__":
    run_cli(main)
