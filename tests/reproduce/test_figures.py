"""Figures of a grid: what is drawn, equal bytes for equal cells, nothing without data."""

import xml.etree.ElementTree as ElementTree
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nrat_scale.reproduce.figures import (
    draw_all,
    frontier,
    learning_curves,
    memorisation,
    overfitting_gaps,
    pareto,
)
from nrat_scale.reproduce.measured import Measured, Setting, read_cell
from tests.support.synthetic_cells import cell, write_cell

Groups = dict[Setting, list[Measured]]


def groups_of(folder: Path, *contents: dict[str, Any]) -> Groups:
    """The cells by setting, in the order given, whatever their space."""
    groups: Groups = {}
    for content in contents:
        one = read_cell(write_cell(folder, content))
        groups.setdefault(one.setting, []).append(one)
    return groups


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    """Two methods, two kinds of noise and clean labels, two seeds."""
    noises = (("none", 0.0), ("symmetric", 0.2), ("symmetric", 0.4), ("asymmetric", 0.4))
    contents = [
        cell(method, *noise, seed, accuracy=0.7, last=0.6)
        for method in ("nrat", "trades")
        for noise in noises
        for seed in (0, 1)
    ]
    return groups_of(tmp_path_factory.mktemp("cells"), *contents)


@pytest.mark.medium
def test_every_figure_in_both_formats(groups: Groups) -> None:
    """SVG is XML, PNG is an image, and equal cells give equal bytes."""
    first = draw_all(groups, str.upper)
    assert [one.name for one in first] == ["curves", "gaps", "memorisation", "frontier"]
    assert first[3] == frontier(groups, str.upper)
    for one in first:
        assert ElementTree.fromstring(one.svg).tag.endswith("svg")
        assert "<dc:date>" not in one.svg
        with Image.open(BytesIO(one.png)) as image:
            assert image.width > 600
    curves = first[0]
    assert "a star marks the selected (best) epoch" in curves.caption
    assert "held-out images (n = 100; 2 seeds)" in curves.caption
    assert "n = " in curves.caption and "95 % intervals" in first[1].caption


def test_panels_are_kinds_of_noise(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of panels per kind of noise; clean labels are a line of each, and every line has its stars and its square."""
    figures: list[Any] = []
    monkeypatch.setattr("nrat_scale.reproduce.figures.drawing", lambda name, caption, figure: figures.append(figure))
    learning_curves(groups, str)
    (figure,) = figures
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [
        "symmetric noise, natural",
        "symmetric noise, robust (PGD-10)",
        "asymmetric noise, natural",
        "asymmetric noise, robust (PGD-10)",
    ]
    lines = [sum(len(line.get_xdata()) > 1 for line in axes.lines) for axes in figure.axes]
    assert lines == [6, 6, 4, 4], "two methods at rates 0, 0.2, 0.4; at 0 and 0.4"
    stars = [sum(line.get_marker() == "*" for line in axes.lines) for axes in figure.axes]
    squares = [sum(line.get_marker() == "s" for line in axes.lines) for axes in figure.axes]
    assert stars == [12, 12, 8, 8] and squares == lines


def test_nothing_to_draw(tmp_path: Path) -> None:
    """Without curves, last checkpoint, memorisation or cost there is no figure, and no error."""
    bare = groups_of(tmp_path, cell(curve=[], memorisation=[], cost={}, results={"best": cell()["results"]["best"]}))
    assert draw_all(bare, str) == [] and draw_all({}, str) == []
    for draw in (learning_curves, overfitting_gaps, memorisation, frontier):
        assert draw(bare, str) is None


def test_stamps_in_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves on test images and cells of the released code's space are stamped in the picture itself."""
    figures: list[Any] = []
    monkeypatch.setattr("nrat_scale.reproduce.figures.drawing", lambda name, caption, figure: figures.append(figure))
    rows = [{**row, "split": "test"} for row in cell()["curve"]]
    groups = groups_of(tmp_path, cell(curve=rows, space="released_code"))
    draw_all(groups, str)
    texts = [[text.get_text() for text in figure.texts] for figure in figures]
    assert "curves on the test images" in texts[0]
    for found in texts[:2] + texts[3:]:
        assert any("released_code" in text for text in found)


def test_many_methods_get_several_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of more than seven methods are drawn in several figures; the frontier has all."""
    names: list[str] = []
    monkeypatch.setattr("nrat_scale.reproduce.figures.drawing", lambda name, caption, figure: names.append(name))
    draw_all(groups_of(tmp_path, *(cell(f"method{i}") for i in range(9))), str)
    assert names == ["curves", "curves-2", "gaps", "gaps-2", "memorisation", "memorisation-2", "frontier"]


def test_frontier() -> None:
    """Points that a cheaper one reaches are not on it."""
    assert pareto([(3, 50), (1, 40), (2, 39), (4, 50), (1, 38), (5, 51)]) == [(1, 40), (3, 50), (5, 51)]


def test_a_legend_of_long_names_stays_on_the_figure(tmp_path: Path) -> None:
    """It has as many columns as fit: nothing is drawn at the right edge above the panels."""
    groups = groups_of(tmp_path, *(cell(f"m{i}", seed=0) for i in range(9)))
    drawn = frontier(groups, lambda one: f"TRADES, 10 steps, averaged {one}")
    assert drawn is not None
    pixels = np.asarray(Image.open(BytesIO(drawn.png)).convert("L"))
    legend = pixels[: len(pixels) // 8]
    assert (legend < 128).any(), "a legend"
    assert (legend[:, -5:] > 250).all()
