"""The results table in Markdown and plain text, and the columns that it shares with the page."""

import html
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from nrat_scale.core.errors import printable
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.run import Row, Run, Score, result_rows, threat_at

ATTACKS = ("natural", "pgd20", "cw20", "aa")  # always columns, measured or not


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


def latex_table(runs: Sequence[Run]) -> str:
    """The table for a paper: accuracy in %, its interval and n; it needs no package. Notes and flags are comments."""
    found = [(run, row) for run in runs for row in run.rows]
    attacks = [a for a in attack_columns(row for _, row in found) if any(a in row.scores for _, row in found)]
    head = ["run", "checkpoint", *(attack_title(attack) for attack in attacks)]
    lines = [[run.name, row.checkpoint, *(_cell(row, a, "{} {}, n = {}") for a in attacks)] for run, row in found]
    texts = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in (head, *lines)]
    threats = {f"{run.name}: {threat_at(run.results)}" for run, _ in found}
    warnings = [f"{run.name}: {warning}" for run in runs for warning in run.warnings]
    notes = ["accuracies in %, 95 % Wilson intervals", *sorted(threats), *warnings, *all_notes(runs), *all_flags(runs)]
    return "\n".join(
        [
            *(f"% {printable(note)}" for note in notes),
            rf"\begin{{tabular}}{{ll{'r' * len(attacks)}}}",
            r"\hline",
            texts[0],
            r"\hline",
            *texts[1:],
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def _latex(text: str) -> str:
    """Text with the signs escaped that have a meaning in LaTeX."""
    signs = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(signs.get(sign, rf"\{sign}" if sign in "&%$#_{}" else sign) for sign in printable(text))


def _cell(row: Row, attack: str, template: str) -> str:
    """`template` with accuracy, interval and n; a dash if the attack was not run."""
    score: Score | None = row.scores.get(attack)
    return "-" if score is None else template.format(f"{score.percent:.1f}", score.interval, score.n)
