"""The page of a grid: n and interval of each number, links to results, stamps, and nothing from elsewhere."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nrat_scale.reproduce.figures import Drawing
from nrat_scale.reproduce.measured import Setting, read_cells
from nrat_scale.reproduce.page import PageFacts, protocol, relative_link, render_page
from nrat_scale.reproduce.table import Plan, grid_table
from tests.support.synthetic_cells import cell, write_cell

METHODS = ("nrat", "trades", "mart")
FACTS = PageFacts("Label noise", "python -m nrat_scale.reproduce noise-benchmark --edition fashion")
FIGURE = Drawing("curves", "Some <curves>.", "<svg xmlns='http://www.w3.org/2000/svg'></svg>\n", b"")


class Page(HTMLParser):
    """Tables as rows of cells with their attributes, links, ids, and the tags that could load something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, dict[str, str | None]]]]] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids |= {str(found["id"])} if "id" in found else set()
        if tag == "a":
            self.links.append(str(found["href"]))
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", found))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            text, found = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = f"{text} {data.strip()}".strip(), found


def page_of(
    folder: Path, *contents: dict[str, Any], methods: tuple[str, ...] = METHODS, facts: PageFacts = FACTS
) -> str:
    """The page of some cells in folder/docs."""
    for content in contents:
        write_cell(folder / "cells", content)
    plan = Plan("noise-benchmark", "fashion", tuple(Setting(one, "symmetric", 0.4) for one in methods), 3)
    return render_page(grid_table(plan, read_cells(folder / "cells")), [FIGURE], folder / "docs", facts)


@pytest.fixture
def contents() -> list[dict[str, Any]]:
    """Three seeds of NRAT and TRADES, none of MART."""
    return [cell(method, seed=seed) for method in METHODS[:2] for seed in range(3)]


def test_every_number_has_its_n_and_interval(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    """In every table; what was not run says so."""
    page = Page(page_of(tmp_path, *contents))
    results, differences, seeds = page.tables
    assert [text for text, _ in results[0]][:7] == [
        "method",
        "noise",
        "checkpoint",
        "natural",
        "PGD-20",
        "CW-20",
        "AutoAttack",
    ]
    accuracies = [text for row in results[1:] for text, _ in row[3:7]]
    assert len(accuracies) == 24 and sum(text.startswith("not run") for text in accuracies) == 8
    assert all(text.startswith("not run") or re.search(r"\[.+, .+\] n = 200, 3 seeds", text) for text in accuracies)
    assert "paper 49.00" in accuracies[3] and "paper 34.49" in accuracies[19]
    assert len(differences) == 3 and all(
        re.search(r"\[.+\] n = 200, 3 seeds", text) for row in differences[1:] for text, _ in row[3:]
    )
    assert len(seeds) == 13 and all(re.search(r"\[.+\] n = 200", text) for row in seeds[1:] for text, _ in row[4:])


def test_at_a_glance(tmp_path: Path) -> None:
    """With several noises the page begins with one number per method and noise, which leads to its seeds."""
    for noise, rate in (("none", 0.0), ("symmetric", 0.4)):
        for method in METHODS[:2]:
            write_cell(tmp_path / "cells", cell(method, noise, rate))
    settings = [Setting(one, *noise) for noise in (("none", 0.0), ("symmetric", 0.4)) for one in (*METHODS, "adr")]
    plan = Plan("noise-benchmark", "fashion", tuple(settings), 3)
    source = render_page(grid_table(plan, read_cells(tmp_path / "cells")), [FIGURE], tmp_path / "docs", FACTS)
    page = Page(source)
    glance = page.tables[0]
    assert [text for text, _ in glance[0]] == ["method", "clean", "symmetric 0.4"] and len(glance) == 3
    assert all(re.search(r"\[.+, .+\] n = 200, 1 seed", text) for row in glance[1:] for text, _ in row[1:])
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert "Not run: clean: adr; symmetric 0.4: adr." in source, "MART was not run, but is in the paper"


def test_costs_are_columns(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    """Memorisation, effective noise rate and cost."""
    results = Page(page_of(tmp_path, *contents)).tables[0]
    assert [text for text, _ in results[0]][7:] == ["wrong labels fitted, %", "effective noise, %", "cost, millions"]
    assert [text.split()[0] for text, _ in results[1][7:]] == ["25.0", "40.0", "2.688"]
    clean = [{**content, "memorisation": []} for content in contents]
    assert Page(page_of(tmp_path / "clean", *clean)).tables[0][1][7][0].startswith("- no wrong labels")


def test_numbers_lead_to_their_results(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    """A number leads to its seeds on the page, these to their files, relative to the page."""
    page = Page(page_of(tmp_path, *contents))
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    files = {link for link in page.links if link.endswith(".json")}
    assert len(files) == 6 and "../cells/fashion/nrat/symmetric-0.4/seed-2.json" in files
    assert all((tmp_path / "docs" / link).resolve().is_file() for link in files)
    for table in (page.tables[0], page.tables[2]):
        linked = [attributes for row in table[1:] for _, attributes in row[-4:]]
        assert linked
    assert sum(link.startswith("#") for link in page.links) == 24, "each of the measured means and differences"


def test_the_protocol_says_what_all_cells_share(tmp_path: Path) -> None:
    """Model, attack and length of the training are read from the cells; what differs in most of them belongs to the methods."""
    recipe = {
        "model.name": "cnn4",
        "model.kwargs.width": 32,
        "threat.num_steps": 5,
        "threat.init": "uniform",
        "train.epochs": 60,
    }
    for seed in range(5):
        write_cell(tmp_path, cell(seed=seed, recipe={**recipe, "optim.name": "adamw", "optim.lr": 0.1 * (seed + 1)}))
    facts = protocol(read_cells(tmp_path))
    assert facts["model"] == "name cnn4, width 32" and facts["training attack"] == "num_steps 5, init uniform"
    assert facts["epochs"] == "60" and "optimizer" not in facts
    assert "epochs" not in protocol(read_cells(write_cell(tmp_path / "other", cell()).parents[3])), (
        "its recipe has none"
    )


def test_sorting(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    """Every cell has the value by which its column is sorted; every title is a button."""
    source = page_of(tmp_path, *contents)
    for table in Page(source).tables:
        assert all("data-value" in attributes for row in table[1:] for _, attributes in row)
    assert source.count("<button") == sum(len(table[0]) for table in Page(source).tables)


def test_nothing_is_loaded(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    """The one script is inline, and the policy allows exactly it."""
    source = page_of(tmp_path, *contents)
    page = Page(source)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [str(found["content"]) for tag, found in page.tags if tag == "meta" and "http-equiv" in found]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [found for tag, found in page.tags if "src" in found and not str(found["src"]).startswith("data:")]
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", source)


def test_text_of_files_cannot_change_the_page(tmp_path: Path) -> None:
    """Names, errors and versions are escaped."""
    bad = "</td><script>alert(1)</script>"
    contents = [
        cell(seed=0, versions={bad: bad}, cost={**cell()["cost"], "hardware": bad}, date=bad),
        cell("trades", seed=1, status="failed", error=bad, results={}),
    ]
    source = page_of(tmp_path, *contents)
    assert bad not in source and "&lt;script&gt;alert" in source
    Page(source)


def test_how_to_add_a_method(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    """One line and a command; the protocol and the hours are on the page."""
    source = page_of(tmp_path, *contents)
    assert f"<code>{FACTS.command} --only my_method</code>" in source
    assert "recipes/grids/methods.yaml" in source and "Some &lt;curves&gt;." in source
    assert "6 cells: 0.1 h of training, 0.1 h of evaluation" in source and "l_inf, eps = 0.1" in source


def test_paths_with_spaces_are_addresses() -> None:
    """A space would end a link in Markdown, and `#` the path of any address."""
    assert relative_link(Path("/a b/x#1/seed-0.json"), Path("/a b")) == "x%231/seed-0.json"
    assert relative_link(Path("/a b/seed-0.json"), Path("/c")) == "../a%20b/seed-0.json"


@pytest.mark.parametrize(("labels", "words"), [("clean", "by their clean labels"), ("given", "by their given labels")])
def test_the_protocol_says_by_which_labels_best_was_selected(tmp_path: Path, labels: str, words: str) -> None:
    """`data.validation.labels` of the cells' recipe."""
    write_cell(tmp_path, cell(recipe={"data.validation.labels": labels}))
    assert words in protocol(read_cells(tmp_path))["best"]
