"""Tables, figures and page of a grid from the command line, from finished cells alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.reproduce.__main__ import main
from nrat_scale.reproduce.cells import STORED, Place
from nrat_scale.reproduce.grid import Choices
from nrat_scale.reproduce.grid_files import read_grid
from tests.support.synthetic_cells import cell

GRID = """\
title: Two methods
paper: {table1: {}}
stages:
  - methods: [nrat, trades]
    noises: [symmetric-0.4, none-0]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A grid of two methods."""
    path = tmp_path / "mine.yaml"
    path.write_text(GRID)
    return path


def store(grid: Path, folder: Path, *, choices: Choices | None = None, **changes: Any) -> list[Path]:
    """Finish seed 0 and 1 of every cell but TRADES with clean labels, as the repository keeps them."""
    paths = []
    for one in read_grid(str(grid)).cells("fashion", choices, 2):
        place = Place(one, folder / "runs", folder)
        if one.method == "trades" and one.noise.kind == "none":
            continue
        content = cell(one.method, one.noise.kind, one.noise.rate, one.seed, space=one.choices.space)
        content |= {"recipe_hash": place.hash, "recipe": place.settings, **changes}
        path = place.stored_result
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        paths.append(path)
    return paths


def command(grid: Path, tmp_path: Path, *words: str) -> list[str]:
    """The words of a command line that writes tables."""
    return [str(grid), "--edition", "fashion", "--seeds", "2", "--cells", str(tmp_path / "cells"), *words]


@pytest.mark.medium
def test_tables_without_running_anything(tmp_path: Path, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every format, with what was not run; no data set is needed, and `--only` does not cut the tables."""
    store(grid, tmp_path / "cells")
    main(command(grid, tmp_path, "--only", "nrat", "--tables", str(tmp_path / "out")))
    printed = capsys.readouterr().out
    folder = tmp_path / "out/fashion"
    endings = {path.name.removeprefix("mine") for path in folder.iterdir()}
    figures = {f"-{name}.{kind}" for name in ("curves", "gaps", "memorisation", "frontier") for kind in ("svg", "png")}
    assert endings == {".txt", ".md", ".csv", ".html", "-seeds.csv", "-differences.csv"} | figures
    assert (folder / "mine.txt").read_text().rstrip() in printed
    clean = [line for line in printed.splitlines() if line.startswith("TRADES") and "clean" in line]
    assert len(clean) == 2 and all(line.count("not run (paper") == 4 for line in clean)
    page = (folder / "mine.html").read_text(encoding="utf-8")
    assert "paper, AutoAttack 45.68" in page, "beside its part APGD, which this edition runs"
    assert "not run" in page and "../../cells/fashion/nrat/symmetric-0.4/seed-1.json" in page
    assert "--only my_method" in page and "compare differences between methods, not levels" in page


@pytest.mark.medium
def test_released_space_from_the_command_line(tmp_path: Path, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tables have a folder of their own, and the stamp."""
    store(grid, tmp_path / "cells", choices=Choices(space="released_code"))
    main(command(grid, tmp_path, "--space", "released_code", "--tables", str(tmp_path / "out")))
    assert "NOTE: threat.space is 'released_code'" in capsys.readouterr().out
    assert (tmp_path / "out/fashion-released_code/mine.html").is_file()


def test_cells_of_another_recipe_are_refused(tmp_path: Path, grid: Path) -> None:
    """The table does not mix recipes: the message has the file and the difference."""
    paths = store(grid, tmp_path / "cells")
    content = json.loads(paths[0].read_text())
    paths[0].write_text(
        json.dumps(content | {"recipe_hash": "0" * 16, "recipe": content["recipe"] | {"optim.lr": 7.0}})
    )
    with pytest.raises(UserError, match=r"finished cell of another recipe.*optim\.lr"):
        main(command(grid, tmp_path, "--tables", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, grid: Path) -> None:
    """One sentence."""
    store(grid, tmp_path / "cells")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"The folder .*out/fashion cannot be made"):
        main(command(grid, tmp_path, "--tables", str(tmp_path / "out")))


@pytest.mark.medium
@pytest.mark.parametrize("path", sorted(STORED.glob("*/*.md")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_tables_are_current(tmp_path: Path, path: Path) -> None:
    """The tables in docs are what `--tables` writes from the committed cells."""
    main(
        [
            path.stem,
            "--edition",
            path.parent.name,
            "--cells",
            str(STORED),
            "--out",
            str(tmp_path / "runs"),
            "--tables",
            str(tmp_path),
        ]
    )
    for ending in (".md", ".txt", ".csv", "-differences.csv"):
        committed, written = (folder / f"{path.stem}{ending}" for folder in (path.parent, tmp_path / path.parent.name))
        assert committed.read_text(encoding="utf-8") == written.read_text(encoding="utf-8"), (
            f"run: python -m nrat_scale.reproduce {path.stem} --edition {path.parent.name} --tables docs/reproduction"
        )
