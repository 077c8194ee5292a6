"""Collect the warnings of AutoAttack's checks: the official package prints them, pyautoattack logs them, others may warn."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import TextIOBase
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from nrat_scale.core.errors import printable

# Checks that we make ourselves: Square over all blocks, and the number of classes before the attack.
_OURS = re.compile(r"Square Attack has decreased|not possible to use the (targeted )?DLR|target classes")
_PREFIX = re.compile(r"\W*warning\b:?\s*", re.IGNORECASE)


@contextmanager
def heard(module: ModuleType, found: list[str]) -> Iterator[None]:
    """Append the warnings of the package `module` to `found`, whether printed, logged or warned, and show none of them.

    What does not come from the package passes: text that a model prints, log records and warnings of other modules.
    """
    folder, package = Path(str(module.__file__)).parent, module.__name__
    show = warnings.showwarning

    def from_package(path: str) -> bool:
        return Path(path).is_relative_to(folder)

    def take(text: str) -> None:
        text = printable(_PREFIX.sub("", " ".join(text.split()), count=1))
        if not _OURS.search(text) and text not in found:
            found.append(text)

    def take_record(record: logging.LogRecord) -> None:
        take(record.getMessage())

    def pass_foreign(record: logging.LogRecord) -> bool:
        if from_package(record.pathname) and record.levelno >= logging.WARNING:
            take_record(record)
            return False
        return True

    def take_warning(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
        of_torch = issubclass(category, DeprecationWarning | FutureWarning) or "Triggered internally" in str(message)
        if from_package(filename) and not of_torch:
            take(str(message))
        else:
            show(message, category, filename, *rest, **named)

    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            lines = _Lines(stream, take)
            stack.enter_context(redirect(lines))
            stack.callback(lines.finish)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", module=rf"{re.escape(package)}(\.|$)")  # in every block, not once per process
        warnings.showwarning = take_warning
        for name in ("auto-attack", package):
            stack.enter_context(_sole_handler(logging.getLogger(name), take_record))
        root = logging.getLogger()
        root.addFilter(pass_foreign)
        stack.callback(root.removeFilter, pass_foreign)
        yield


def merge_warnings(blocks: Iterable[Sequence[str]]) -> list[str]:
    """The distinct warnings of all blocks; of those that differ in their numbers only, the one with the largest number."""

    def first_number(text: str) -> int:
        match = re.search(r"\d+", text)
        return int(match[0]) if match else 0

    distinct = {text for texts in blocks for text in texts}
    return sorted({re.sub(r"\d+", "N", text): text for text in sorted(distinct, key=first_number)}.values())


@contextmanager
def _sole_handler(logger: logging.Logger, take: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Send the warnings of `logger` and its children to `take` alone."""
    handler = _Taker(take)
    handlers, propagate, level, disabled = logger.handlers, logger.propagate, logger.level, logger.disabled
    logger.handlers, logger.propagate, logger.disabled = [handler], False, False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
        logger.setLevel(level)


class _Taker(logging.Handler):
    """Gives each warning to `take`."""

    def __init__(self, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record)


class _Lines(TextIOBase):
    """A text stream that gives lines that start with "Warning" to `take` and writes everything else to `stream`."""

    def __init__(self, stream: TextIO, take: Callable[[str], None]) -> None:
        self._stream, self._take, self._line = stream, take, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._pass(line, "\n")
        if not "warning".startswith(self._line[:7].lower()):  # a progress bar does not end its lines: do not wait
            self._pass(self._line, "")
            self._line = ""
        return len(text)

    def finish(self) -> None:
        """Deliver what was written without a newline."""
        self._pass(self._line, "")
        self._line = ""

    def flush(self) -> None:
        self._stream.flush()

    def _pass(self, line: str, end: str) -> None:
        if line.lower().startswith("warning"):
            self._take(line)
        else:
            self._stream.write(line + end)
