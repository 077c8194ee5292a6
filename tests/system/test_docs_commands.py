"""Every command of README and docs is accepted: its options exist, and its overrides are keys that fit the recipe.

What the commands do is tested elsewhere; this is about a page that names an option of another version.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nrat_scale.audit import __main__ as audit_cli
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.recipe import load_recipe
from nrat_scale.release import __main__ as release_cli
from nrat_scale.report import __main__ as report_cli
from nrat_scale.reproduce import __main__ as reproduce_cli
from tests.support.runs import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
COMMAND = re.compile(r"(?:python|accelerate launch|torchrun) (?:--\w+ \w+ )*-m nrat_scale\.(\w+)( .*)?$")


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(page, command, its words) of the code blocks."""
    for page in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                found = COMMAND.search(shlex.join(words))
                if found and not {"...", "KIND"} & set(words) and not any("[key=value" in word for word in words):
                    yield page.name, found[1], shlex.split(found[2] or "")


def load(words: list[str]) -> None:
    """Compose the recipe with the command's overrides; a recipe of the reader's own is replaced by the quickstart."""
    recipe, *overrides = [word for word in words if not word.startswith("--") and not word.isdigit()]
    path = ROOT / recipe if recipe.startswith("recipes/") else QUICKSTART
    if not any(word.startswith("imports=") for word in overrides):  # code of a page; test_your_loss.py runs it
        load_recipe(path, overrides)


def parse_report(words: list[str]) -> Any:
    """The arguments with which the command calls `report`."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_cli, "report", lambda *runs, **options: given.update(options, runs=runs) or Written())
        report_cli.main(words)
    return given


class Written:
    """What `report` returns."""

    path = Path("report.html")


ACCEPT: dict[str, Callable[[list[str]], Any]] = {
    "prepare": lambda words: prepare_cli.build_parser().parse_args(words),
    "train": load,
    "evaluate": evaluate_cli._arguments,
    "report": parse_report,
    "release": release_cli._arguments,
    "audit": audit_cli._arguments,
    "reproduce": reproduce_cli._arguments,
}
COMMANDS = list(commands())


@pytest.mark.parametrize(
    ("page", "command", "words"), COMMANDS, ids=[f"{p}: {c} {' '.join(w)}" for p, c, w in COMMANDS]
)
def test_a_documented_command_is_accepted(page: str, command: str, words: list[str]) -> None:
    """argparse ends with SystemExit, a recipe with UserError."""
    ACCEPT[command](words)


def test_the_check_sees_the_pages() -> None:
    """Commands of every kind are found, and a wrong one is refused."""
    assert {command for _, command, _ in COMMANDS} <= set(ACCEPT) and len(COMMANDS) > 40
    with pytest.raises(UserError, match="unknown key"):
        load(["RECIPE", "train.epoch=3"])
    with pytest.raises(SystemExit):
        ACCEPT["evaluate"](["RUN", "--data", "x", "--imagse", "3"])
