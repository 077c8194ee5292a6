"""Write docs/recipe_keys.md from the specs: every key of a recipe, its default, and the comment beside it.

python tools/recipe_keys.py            write the page
python tools/recipe_keys.py --check    exit status 1 if the page is not up to date
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.presets import PRESET_ONLY, ObjectiveSpec
from nrat_scale.recipe import RecipeSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe_keys.md"
_HEAD = """# Recipe keys

Written by `python tools/recipe_keys.py` from the specs in `nrat_scale/`. A recipe sets what differs from the defaults; the command line
overrides both: `python -m nrat_scale.train RECIPE optim.lr=0.05`. A key that does not exist is an error that names the nearest one.
"""


def _comments(spec: type) -> dict[str, str]:
    """field -> the comments on the lines before it and on its line, else its entry in the docstring."""
    source = textwrap.dedent(inspect.getsource(spec))
    lines = source.splitlines()
    found = _attributes(spec)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        end = statement.end_lineno or statement.lineno
        after = lines[end - 1][statement.end_col_offset or 0 :].strip()
        before: list[str] = []
        line = statement.lineno - 2
        while line >= 0 and lines[line].strip().startswith("#"):
            before.insert(0, lines[line].strip())
            line -= 1
        text = " ".join(part.lstrip("# ").strip() for part in (*before, after) if part)
        if text:
            found[statement.target.id] = text
    return found


def _attributes(spec: type) -> dict[str, str]:
    """field -> text, of the `Attributes:` section of the docstring."""
    section = (inspect.getdoc(spec) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.M)}


_OF_PRESETS = ("threat.init", "threat.bn")  # besides those of the section `objective`


def _of_recipe(key: str, default: str) -> str:
    """The default in a recipe: `load_recipe` puts the preset of `objective.name` over the defaults of the specs."""
    if key == "objective.name":
        return "`nrat`"
    return "the preset's" if key in _OF_PRESETS or key.startswith("objective.") else default


def _default(field: dataclasses.Field, instance: Any) -> str:
    if instance is not None:
        value = getattr(instance, field.name)
    elif field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, str):
        return f"`{value}`" if value else "`''`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _rows(spec: type, prefix: str) -> typing.Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every key below `spec`."""
    specs = [base for base in reversed(spec.__mro__) if dataclasses.is_dataclass(base)]
    comments = {name: text for base in specs for name, text in _comments(base).items()}
    hints = typing.get_type_hints(spec)
    hidden = PRESET_ONLY if spec is ObjectiveSpec else ()
    try:
        instance = spec()
    except (TypeError, UserError):  # a spec with required keys, or whose defaults alone are no experiment
        instance = None
    for field in dataclasses.fields(spec):
        if field.name in hidden:
            continue
        if dataclasses.is_dataclass(hint := hints[field.name]):
            assert isinstance(hint, type)
            yield from _rows(hint, f"{prefix}{field.name}.")
        else:
            meaning = comments.get(field.name, "").replace("|", "\\|")
            key = f"{prefix}{field.name}"
            yield key, _of_recipe(key, _default(field, instance)), meaning
            for entry in typing.get_args(hint):  # of a list of specs
                if dataclasses.is_dataclass(entry):
                    assert isinstance(entry, type)
                    yield from _rows(entry, f"{key}[].")


def page() -> str:
    """The text of the page."""
    hints = typing.get_type_hints(RecipeSpec)
    parts = [_HEAD]
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, default, meaning in _rows(RecipeSpec, ""):
        section = key.split(".")[0] if "." in key else ""
        sections.setdefault(section, []).append((key, default, meaning))
    for section, rows in sorted(sections.items(), key=lambda item: item[0] != ""):
        summary = "" if not section else inspect.getdoc(hints[section]) or ""
        title = f"## {section}" if section else "## The run"
        parts.append("\n".join([title, *(["", summary.split("\n\n")[0].replace("\n", " ")] if summary else [])]))
        table = ["| key | default | meaning |", "|---|---|---|", *(f"| `{k}` | {d} | {m} |" for k, d, m in rows)]
        parts.append("\n".join(table))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit("docs/recipe_keys.md is not up to date. Write it again: python tools/recipe_keys.py")
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
