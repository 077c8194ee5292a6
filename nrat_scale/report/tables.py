"""Tables of a report as values, and in CSV, LaTeX, Markdown and plain text."""

import csv
import html
import io
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nrat_scale.core.errors import printable
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.run import Row, Run, Score, result_rows, threat_at

ATTACKS = ("natural", "pgd20", "cw20", "aa")  # always columns, measured or not
RESULTS_CAPTION = "Test accuracy in %, its 95 % Wilson interval and the number of images n."
Cell = str | int | float | Score | None  # None: not measured


@dataclass(frozen=True)
class Table:
    """One table of a report."""

    name: str  # unique in a report, such as `results`; usable as a file name
    caption: str
    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]  # as long as `head`
    is_matrix: bool = False  # square counts, after a column of names

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which are aligned to the left, and not numbers."""
        cells = [row[column] for row in self.rows]
        return column == 0 or any(isinstance(cell, str) and not _NUMBER.fullmatch(cell) for cell in cells)

    def groups(self) -> list[tuple[Cell, list[tuple[Cell, ...]]]]:
        """Consecutive rows of the same first cell: that cell, and the rows without it."""
        found: list[tuple[Cell, list[tuple[Cell, ...]]]] = []
        for first, *rest in self.rows:
            if not found or found[-1][0] != first:
                found.append((first, []))
            found[-1][1].append(tuple(rest))
        return found

    def is_wide(self) -> bool:
        """Whether a telephone shows it only in part: by its longest words, which are not broken."""
        columns = zip(self.head, *self.rows, strict=True)
        letters = sum(max(len(word) for cell in column for word in _words(cell)) for column in columns)
        return letters > _PHONE_LETTERS or len(self.head) > _PHONE_COLUMNS

    def shared_n(self) -> int | str | None:
        """The number of images, if it is the same in all cells."""
        return shared_n(cell for row in self.rows for cell in row)


_PHONE_LETTERS, _PHONE_COLUMNS = 36, 4  # fit in 390 CSS pixels


def _words(cell: Cell) -> list[str]:
    """What a browser does not break; an interval stays in one line."""
    return [cell.interval] if isinstance(cell, Score) else re.split(r"[ -]", str(cell))


_NUMBER = re.compile(r"[+−-]?[0-9][0-9.e+-]*(?: (?:s|min|h))?")


def shared_n(cells: Iterable[Cell]) -> int | str | None:
    """The number of images of several scores, if all have the same; None otherwise."""
    counts = [cell.n for cell in cells if isinstance(cell, Score)]
    return counts[0] if len(counts) > 1 and len(set(counts)) == 1 else None


def csv_table(table: Table) -> str:
    """`table` as CSV with a header line; a column of scores becomes four: accuracy in %, `low`, `high` and `n`.

    Accuracies have four decimals; a cell that was not measured is empty.
    """
    scored = [any(isinstance(row[i], Score) for row in table.rows) for i in range(len(table.head))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    titles = zip(table.head, scored, strict=True)
    writer.writerow(
        [
            title
            for head, many in titles
            for title in ([head, *(f"{head} {x}" for x in ("low", "high", "n"))] if many else [head])
        ]
    )
    for row in table.rows:
        cells: list[Any] = []
        for cell, many in zip(row, scored, strict=True):
            parts = [*map(_rounded, (cell.percent, cell.low, cell.high)), cell.n] if isinstance(cell, Score) else [cell]
            cells += parts + [None] * (4 * many - len(parts) if many else 0)
        writer.writerow([_csv_value(cell) for cell in cells])
    return buffer.getvalue()


def _csv_value(cell: Any) -> Any:
    if isinstance(cell, str) and _NUMBER.fullmatch(cell):
        return cell.replace("−", "-")  # a number that programs read
    return "" if cell is None else spreadsheet_cell(cell)


def spreadsheet_cell(value: Any) -> Any:
    """A value of a file: text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}"}
_LATEX |= {"α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "λ": r"$\lambda$"}


def latex_table(table: Table) -> str:
    """`table` as a LaTeX `table` for the package booktabs, with its caption and the label `tab:NAME`.

    The number of images is in the caption if it is the same in all cells, otherwise in each cell.
    """
    shared = table.shared_n()
    caption = table.caption if shared is None else f"{table.caption} n = {shared}."
    columns = "".join("l" if table.is_text(i) else "r" for i in range(len(table.head)))
    head, *body = [[_latex(_plain(cell, with_n=shared is None)) for cell in line] for line in (table.head, *table.rows)]
    lines = [f"{' & '.join(line)} \\\\" for line in (head, *body)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_latex(caption)}}}",
            f"\\label{{tab:{table.name}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _plain(cell: Cell, *, with_n: bool) -> str:
    """A cell as text: a score with its interval, a dash for what was not measured."""
    if isinstance(cell, Score):
        return f"{cell.text} {cell.interval}".strip() + (f", n = {cell.n}" if with_n else "")
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _latex(text: str) -> str:
    text = "".join(_LATEX.get(letter, letter) for letter in printable(text))
    return f"{{[}}{text[1:]}" if text.startswith("[") else text  # not an optional argument of the line before


def results_table(runs: Sequence[Run]) -> Table:
    """A row per evaluated checkpoint, a column per attack."""
    found = [(run, row) for run in runs for row in run.rows]
    attacks = attack_columns(row for _, row in found)
    head = ("run", "checkpoint", "epoch", "weights", *map(attack_title, attacks))
    rows: list[tuple[Cell, ...]] = [
        (run.name, row.checkpoint, row.epoch, row.weights, *(row.scores.get(attack) for attack in attacks))
        for run, row in found
    ]
    return Table("results", RESULTS_CAPTION, head, rows)


def attack_columns(rows: Iterable[Row]) -> list[str]:
    """The standard attacks, then the others that were run, then the worst case."""
    found = dict.fromkeys([*ATTACKS, *(attack for row in rows for attack in row.scores)])
    return sorted(found, key=lambda attack: attack == "worst")


def evaluate_command(run: Run) -> str:
    """The command that evaluates a run."""
    return f"python -m nrat_scale.evaluate {shlex.quote(str(run.path))} --data SHARDS --attacks {','.join(ATTACKS)}"


def all_flags(runs: Sequence[Run]) -> list[str]:
    """The flags of every row, each with the names of its run and checkpoint."""
    return [f"{run.name}, {row.checkpoint}: {flag}" for run in runs for row in run.rows for flag in row.flags]


def all_notes(runs: Sequence[Run]) -> list[str]:
    """The notes of every row, each with the names of its run and checkpoint."""
    return [f"{run.name}, {row.checkpoint}: {note}" for run in runs for row in run.rows for note in row.notes]


def markdown_table(results: dict[str, Any]) -> str:
    """A results.json as a Markdown table: accuracy in %, its 95 % Wilson interval and n."""
    rows = result_rows(results)
    attacks = attack_columns(rows)
    lines = [["checkpoint", *map(attack_title, attacks)], ["---", *["---:"] * len(attacks)]]
    for row in rows:
        epoch = "" if row.epoch is None else f" (epoch {row.epoch})"
        lines.append([row.checkpoint + epoch, *(_cell(row, attack, "{} % {}, n = {}") for attack in attacks)])
    cells = [[html.escape(printable(cell)).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def text_table(runs: Sequence[Run]) -> str:
    """The table for a terminal; a column whose rows all have the same n shows it in its heading."""
    found = [(run, row) for run in runs for row in run.rows]
    columns = [["run", *(run.name for run, _ in found)], ["checkpoint", *(row.checkpoint for _, row in found)]]
    for attack in attack_columns(row for _, row in found):
        counts = {row.scores[attack].n for _, row in found if attack in row.scores}
        title, template = attack_title(attack).replace("AutoAttack", "AA"), "{} {} n={}"
        if len(counts) == 1:
            title, template = f"{title} (n={counts.pop()})", "{} {}"
        columns.append([title, *(_cell(row, attack, template) for _, row in found)])
    columns = [[printable(cell) for cell in column] for column in columns]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)] if found else []
    lines += [f"{run.name}: not evaluated yet: {evaluate_command(run)}" for run in runs if not run.rows]
    lines += [f"{run.name}: tested in {threat}" for run in runs if run.rows and (threat := threat_at(run.results))]
    lines += [f"NOTE: {run.name}: {warning}" for run in runs for warning in run.warnings]
    lines += [f"NOTE: {note}" for note in all_notes(runs)]
    lines += [f"FLAG: {flag}" for flag in all_flags(runs)]
    return "\n".join(map(printable, lines))


def results_latex(runs: Sequence[Run]) -> str:
    """The measured columns of `results_table` for a paper, after notes and flags as comments."""
    table = results_table(runs)
    kept = [i for i in range(len(table.head)) if i < 2 or any(row[i] is not None for row in table.rows)]
    head, *rows = (tuple(line[i] for i in kept) for line in (table.head, *table.rows))
    threats = {f"{run.name}: {threat_at(run.results)}" for run in runs if run.rows}
    warnings = [f"{run.name}: {warning}" for run in runs for warning in run.warnings]
    notes = ["needs \\usepackage{booktabs}", *sorted(threats), *warnings, *all_notes(runs), *all_flags(runs)]
    comments = "".join(f"% {printable(note)}\n" for note in notes)
    return comments + latex_table(replace(table, head=tuple(map(str, head)), rows=rows))


def _cell(row: Row, attack: str, template: str) -> str:
    """`template` with accuracy, interval and n; a dash if the attack was not run."""
    score: Score | None = row.scores.get(attack)
    return "-" if score is None else template.format(score.text, score.interval, score.n)
