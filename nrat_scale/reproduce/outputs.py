"""Everything that a grid ends with: the table as text, Markdown and CSV, its figures and its page, in one folder."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.reproduce.figures import draw_all
from nrat_scale.reproduce.measured import Measured
from nrat_scale.reproduce.page import PageFacts, render_page
from nrat_scale.reproduce.table import GridTable, Plan, grid_table
from nrat_scale.reproduce.table_text import csv_table, differences_csv, markdown_table, seeds_csv, text_table


@dataclass(frozen=True)
class Outputs:
    """What was written; printed, it is the table for a terminal."""

    table: GridTable
    files: list[Path]
    text: str

    def __str__(self) -> str:
        return self.text


def write_outputs(plan: Plan, cells: Iterable[Measured], folder: Path, facts: PageFacts) -> Outputs:
    """Write NAME.{txt,md,csv,html}, NAME-seeds.csv, NAME-differences.csv and NAME-FIGURE.{svg,png} into `folder`.

    Raises:
        UserError: the folder cannot be written to, or the seeds of a cell were evaluated differently.
    """
    make_folder(folder)
    table = grid_table(plan, cells)
    groups = {row.setting: row.cells for row in table.rows if row.cells}
    drawings = draw_all(groups, plan.method_title)
    text = text_table(table)
    contents: dict[str, str | bytes] = {
        ".txt": text,
        ".md": markdown_table(table),
        ".csv": csv_table(table),
        "-seeds.csv": seeds_csv(table),
        "-differences.csv": differences_csv(table),
        ".html": render_page(table, drawings, folder, facts),
    }
    contents |= {f"-{one.name}.svg": one.svg for one in drawings} | {f"-{one.name}.png": one.png for one in drawings}
    files = []
    for ending, content in contents.items():
        files.append(folder / f"{plan.name}{ending}")
        write_atomically(files[-1], content)
    return Outputs(table, files, text)
