"""Tables of accuracies in Markdown and plain text."""

import html
import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from nrat_scale.report.run import (
    Row,
    Run,
    accuracy_percent,
    as_dict,
    attack_title,
    finite_number,
    get_path,
    printable,
    summary_table,
)

ATTACKS = ("natural", "pgd20", "cw20", "aa")  # columns that are always there; other attacks follow
SPACE_NOTE = "reproduces the released code's threat model; not comparable with RobustBench"


def escape(value: Any) -> str:
    return html.escape(printable(value))


def markdown_table(results: dict[str, Any]) -> str:
    """The robustness table of a results.json in Markdown: accuracy in %, its 95 % Wilson interval and n."""
    rows = summary_table(results)
    attacks = attack_columns(rows)
    lines = [["checkpoint", *map(attack_title, attacks)], ["---", *["---:"] * len(attacks)]]
    for row in rows:
        epoch = f" (epoch {row.record['epoch']})" if "epoch" in row.record else ""
        scores = map(row.score, attacks)
        lines.append([row.checkpoint + epoch, *(score_cell(s, "{} % {}, n = {}") for s in scores)])
    table = "".join("| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    space = get_path(results, "threat.space", "pixel")
    return table if space == "pixel" else f"{table}\n**Threat space `{escape(space)}`: {SPACE_NOTE}.**\n"


def text_table(runs: Sequence[Run]) -> str:
    """The table for a terminal; n stands in a column's heading where it is the same in all rows."""
    found = [(run, row) for run in runs for row in run.rows]
    columns = [["run", *(run.name for run, _ in found)], ["checkpoint", *(row.checkpoint for _, row in found)]]
    for attack in attack_columns(row for _, row in found):
        scores = [row.score(attack) for _, row in found]
        counts = {str(score["n"]) for score in scores if "n" in score}
        title = "AA" if attack == "aa" else attack_title(attack)
        if len(counts) == 1:
            columns.append([f"{title} (n={counts.pop()})", *(score_cell(s, "{} {}") for s in scores)])
        else:
            columns.append([title, *(score_cell(s, "{} {} n={}") for s in scores)])
    columns = [[printable(cell) for cell in column] for column in columns]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)] if found else []
    lines += [f"{printable(run.name)}: not evaluated yet: {evaluate_command(run)}" for run in runs if not run.rows]
    lines += [
        f"NOTE: {printable(r.name)}: threat space {printable(r.space)} {SPACE_NOTE}."
        for r in runs
        if r.space != "pixel"
    ]
    lines += [f"FLAG: {printable(flag)}" for flag in all_flags(runs)]
    return "\n".join(lines)


def attack_columns(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    found = [str(attack) for row in rows for attack in as_dict(row.record.get("attacks"))]
    worst = ["worst"] if any(row.score("worst") for row in rows) else []
    return list(dict.fromkeys([*ATTACKS, *found, *worst]))


def all_flags(runs: Sequence[Run]) -> list[str]:
    return [f"{run.name}, {row.checkpoint}: {flag}" for run in runs for row in run.rows for flag in row.flags]


def score_cell(score: dict[str, Any], template: str) -> str:
    """`template` filled with accuracy in %, interval and n; a dash for what was not measured."""
    low, high = (finite_number(score.get(key)) for key in ("low", "high"))
    interval = "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
    count = finite_number(score.get("n"))
    filled = template.format(f"{accuracy_percent(score):.1f}", interval, "?" if count is None else int(count))
    return "-" if math.isnan(accuracy_percent(score)) else " ".join(filled.split())


def evaluate_command(run: Run) -> str:
    path = shlex.quote(printable(run.path))
    return f"python -m nrat_scale.evaluate {path} --data SHARDS --attacks natural,pgd20,cw20,aa"
