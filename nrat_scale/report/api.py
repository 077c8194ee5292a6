"""`report` for Python and for the command line."""

from dataclasses import dataclass
from pathlib import Path

from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.report.data_frames import csv_text, result_records
from nrat_scale.report.page import write_report
from nrat_scale.report.run import read_runs
from nrat_scale.report.tables import latex_table, text_table


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
) -> Report:
    """Write one HTML page about one run or several.

    Args:
        runs: run directories.
        out: the HTML file; default: report.html in the first run.
        title: heading of the page.
        csv: also write the results as a table with one row per run, checkpoint and attack.
        latex: also write the table of accuracies for a paper.

    Raises:
        UserError: a folder is not a run, or a file cannot be written.
    """
    read = read_runs([Path(run) for run in runs])
    path = write_report(read, None if out is None else Path(out), title)
    texts = {csv: lambda: csv_text(result_records(read)), latex: lambda: latex_table(read)}
    for file, text in texts.items():
        if file is not None:
            make_folder(Path(file).parent)
            write_atomically(Path(file), text())
    return Report(path, text_table(read))
