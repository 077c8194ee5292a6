"""How a mistake of the user ends: one or two plain sentences and exit status 2.

`UserError` is for what a person can put right (a wrong key, a missing shard, an unwritable folder).
Everything that only a bug can break is an `assert` and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """What the user gave is wrong. The message says what, where, what was expected and the way out."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that helps with a mistyped `name`: the nearest of `choices`, else all of them."""
    choices = sorted(choices)
    near = get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(choices)}."


def printable(value: object) -> str:
    """`str(value)` with `?` for control characters and lone surrogates: text from a file must not control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, printable; the error's type if it has no message."""
    return printable(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)


def quoted(value: object, limit: int = 80) -> str:
    """A value that came from a file, for an error message: its `repr` (so nothing in it is interpreted), at most `limit` long."""
    text = str(value)
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line `main`: exit status 2 and its message on `UserError`, 1 and a traceback on a bug.

    A `FloatingPointError` (training or an attack went to NaN) ends with its message and status 1.

    Under torchrun or Accelerate every process fails alike; only local rank 0 prints.
    """
    try:
        main()
    except (UserError, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `... | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
