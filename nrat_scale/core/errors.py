"""User errors and warnings, and how untrusted text is printed.

`UserError` is for what a person can fix (a wrong key, a missing shard, a read-only folder): one or two plain sentences and
exit status 2. Invariants that only a bug can break are asserted and keep their traceback.
"""

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Invalid input or environment. The message says what, where, what was expected and the way out."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter print for this exception: one line, as the command line does."""
        return [f"error: {self}"]


def warn(sentence: str) -> None:
    """Print `warning: sentence` to stderr on rank 0, above any progress bar."""
    if os.environ.get("RANK", "0") == "0":
        from tqdm import tqdm  # not at the top: this module must import in milliseconds

        tqdm.write(f"warning: {sentence}", file=sys.stderr)
        sys.stderr.flush()


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence for a mistyped `name`: the closest of `choices`, or all of them if none is close."""
    choices = sorted(choices)
    lower = {choice.lower(): choice for choice in choices}
    near = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"Did you mean '{lower[near[0]]}'?" if near else f"Known: {', '.join(choices)}."


def missing_folder(path: Path) -> str:
    """Sentences for a folder that does not exist: that, and the one beside it with a similar name, if there is one."""
    if path.exists():
        return f"{path} is not a folder."
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    return f"There is no folder {path}." + (f" Did you mean {path.parent / near[0]}?" if near else "")


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise `UserError` unless the recipe's `key` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{key} is '{value}'. {did_you_mean(value, choices)}")


def check_value(key: str, value: object, holds: bool, bound: str) -> None:
    """Raise `UserError` ("KEY is VALUE; it must be BOUND.") unless `holds`."""
    if not holds:
        raise UserError(f"{key} is {value!r}; it must be {bound}.")


def printable(value: object) -> str:
    """`str(value)` with `?` for control characters and lone surrogates: text from a file must not control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, printable; the error's type if it has no message."""
    return printable(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)


def quoted(value: object, limit: int = 80) -> str:
    """The `repr` of a value that came from a file, for an error message: escaped, and cut to about `limit` characters."""
    text = str(value)
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line `main` and exit: 2 and a message on `UserError`, 1 and a traceback on a bug.

    A `FloatingPointError` (training or an attack reached NaN) exits with its message and status 1. If every process of a
    launch fails alike, only local rank 0 prints the message.
    """
    try:
        main()
        _leave_process_group()
    except (UserError, FloatingPointError) as error:
        _leave_process_group(("gloo",))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except SystemExit:  # after a signal, for instance
        _leave_process_group(("gloo",))
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the pipe is closed (`... | head`); flushing at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _leave_process_group(backends: tuple[str, ...] = ("gloo", "nccl")) -> None:
    """Leave torch's process group, if this process has joined one of these `backends`.

    At exit its threads would sometimes end the interpreter with SIGABRT ("terminate called without an active exception"). After
    an error NCCL may wait for the other ranks, so that only the caller of a finished command leaves its group.
    """
    distributed = sys.modules.get("torch.distributed")  # torch is not imported for commands that need none
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() in backends:
        distributed.destroy_process_group()
