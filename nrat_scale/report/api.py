"""`report` for Python and for the command line."""

from dataclasses import dataclass
from pathlib import Path

from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.report.content import all_tables
from nrat_scale.report.data_frames import csv_text, result_records
from nrat_scale.report.page import write_report
from nrat_scale.report.run import read_runs
from nrat_scale.report.tables import csv_table, latex_table, results_latex, text_table


@dataclass(frozen=True)
class Report:
    """What `report` returns; printed, it is the table of the command line."""

    path: Path  # the HTML page
    table: str  # accuracies with intervals, notes and flags, for a terminal

    def __str__(self) -> str:
        return self.table


def report(
    *runs: str | Path,
    out: str | Path | None = None,
    title: str | None = None,
    csv: str | Path | None = None,
    latex: str | Path | None = None,
    tables: str | Path | None = None,
) -> Report:
    """Write one HTML page about one run or several.

    Args:
        runs: run directories.
        out: the HTML file; default: report.html in the first run.
        title: heading of the page.
        csv: also write the results as a table with one row per run, checkpoint and attack.
        latex: also write the table of accuracies for a paper, with notes and flags as comments.
        tables: also write every table of the page into this folder, as NAME.csv and NAME.tex.

    Raises:
        UserError: a folder is not a run, or a file cannot be written.
    """
    read = read_runs([Path(run) for run in runs])
    path = write_report(read, None if out is None else Path(out), title)
    texts: dict[Path, str] = {}
    if csv is not None:
        texts[Path(csv)] = csv_text(result_records(read))
    if latex is not None:
        texts[Path(latex)] = results_latex(read)
    if tables is not None:
        for table in all_tables(read):
            texts[Path(tables, f"{table.name}.csv")] = csv_table(table)
            texts[Path(tables, f"{table.name}.tex")] = latex_table(table)
    for file, text in texts.items():
        make_folder(file.parent)
        write_atomically(file, text)
    return Report(path, text_table(read))
