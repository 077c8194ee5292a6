"""Command line of training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train_and_exit


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m nrat_scale.train",
        description="Train a recipe. The same command resumes an interrupted run.",
        usage="%(prog)s [--profile N] RECIPE [key=value ...]",
        epilog="Example: accelerate launch -m nrat_scale.train recipes/wrn28_10_gen1m.yaml objective.name=trades seed=1",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, such as one of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe; optional")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="trace N steps and print the time per section"
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(
            f"There is no option {unknown[0]}. Keys of the recipe follow it as key=value, such as train.epochs=5."
        )
    if arguments.recipe is None:
        parser.error("name a recipe, such as recipes/quickstart.yaml; overrides (key=value) are optional and follow it")
    if "=" in arguments.recipe and not Path(arguments.recipe).exists():
        raise UserError(
            f"{arguments.recipe} is an override. Name the recipe before it, such as recipes/quickstart.yaml."
        )
    if arguments.profile < 0:
        raise UserError(f"--profile is {arguments.profile}; it must be 0 or more steps.")
    train_and_exit(load_recipe(arguments.recipe, arguments.overrides), arguments.profile)


if __name__ == "__main__":
    run_cli(main)
