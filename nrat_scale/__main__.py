"""`python -m nrat_scale`: which commands there are."""

import sys

from nrat_scale.core.errors import UserError, did_you_mean, run_cli

COMMANDS = {
    "prepare": "images into shards; `prepare template SHARDS` writes a recipe for them",
    "train": "train a recipe; the same command resumes",
    "evaluate": "natural and robust accuracy",
    "report": "one page about one run or several",
    "release": "a folder or a repository that loads in one line",
    "audit": "find labels that are probably wrong",
    "reproduce": "tables and figures of the paper",
}


def main(arguments: list[str]) -> None:
    """Print the commands; raise `UserError` for anything but a request for help."""
    if arguments and arguments[0] not in ("-h", "--help"):
        name, rest = arguments[0], "".join(f" {word}" for word in arguments[1:])
        known = (
            f"The command is python -m nrat_scale.{name}{rest}" if name in COMMANDS else did_you_mean(name, COMMANDS)
        )
        raise UserError(f"python -m nrat_scale takes no arguments. {known}")
    print("usage: python -m nrat_scale.COMMAND --help\n")
    for name, purpose in COMMANDS.items():
        print(f"  nrat_scale.{name:10} {purpose}")


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
