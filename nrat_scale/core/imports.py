"""Import a module of the user's that a recipe names. Importing runs its code: the caller decides whether that is allowed."""

import importlib
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from nrat_scale.core.errors import UserError, first_line, printable, quoted


def import_code(name: str, key: str) -> ModuleType:
    """The module `name`, from the working directory too; one that is imported already is not run again.

    Args:
        name: dotted, such as `my_losses` or `package.losses`.
        key: of the recipe, for errors.

    Raises:
        UserError: there is no such module, or its import fails; the message names the line.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise UserError(
            f"{key} has {quoted(name)}; write a module as in `import`: my_losses for the file my_losses.py."
        )
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)  # as `python -m` does
    importlib.invalidate_caches()  # a notebook may have written the file a moment ago
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise UserError(f"{key}: {name} cannot be imported: {printable(error)}{location(error)}.") from error
        raise UserError(
            f"There is no module '{error.name}' ({key}), neither installed nor in the working directory {folder}."
        ) from error
    except Exception as error:  # the user's module may raise anything
        raise UserError(f"{key}: {name} cannot be imported: {reason(error)}{location(error)}.") from error


def location(error: BaseException) -> str:
    """` (file.py, line 7)`: where the user's code raised the error; empty if it is not the user's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    own = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if not frame.filename.startswith((own, "<frozen"))
        and not re.search(r"site-packages|/importlib/", frame.filename)
    ]
    return f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""


def reason(error: BaseException) -> str:
    """`TypeError: the first line of its message`."""
    text = first_line(error).rstrip(".")
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
