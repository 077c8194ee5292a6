"""The pages name files and headings that exist, and the badges are true."""

import re
import tomllib
from pathlib import Path

import pytest

import recipe_keys

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the repository, and a heading of that page if it has an anchor."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_badges_are_true() -> None:
    """Python version and licence are those of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"].replace(">=", "≥ ") in (ROOT / "docs/images/python.svg").read_text()
    assert f">{project['license']}<" in (ROOT / "docs/images/licence.svg").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Every `nrat_scale/...`, `tests/...`, `tools/...` or `recipes/...` that a page names is in the repository."""
    for name in re.findall(r"(?<![\w./-])(?:nrat_scale|tests|tools|recipes)/[\w./*]*\w", page.read_text()):
        assert any(ROOT.glob(name)), name


def test_the_page_of_recipe_keys_is_current() -> None:
    """It is written from the specs, so it cannot name a key that does not exist; every key is explained."""
    assert (ROOT / "docs" / "recipe_keys.md").read_text() == recipe_keys.page(), "run: python tools/recipe_keys.py"
    unexplained = re.findall(r"^\| `([\w.]+)` \| [^|]* \|  \|$", recipe_keys.page(), re.MULTILINE)
    assert unexplained == []
