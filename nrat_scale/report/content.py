"""What a report contains: every table of it, in the order of the page."""

from collections.abc import Sequence

from nrat_scale.report.run import Run
from nrat_scale.report.tables import Table, results_table


def all_tables(runs: Sequence[Run]) -> list[Table]:
    """Every table of the report of `runs`, for `csv_table` and `latex_table`; their names are unique."""
    return [results_table(runs)]
