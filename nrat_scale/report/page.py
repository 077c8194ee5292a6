"""The report as one HTML file: run directories -> `read_runs` -> values for the template -> `templates/page.html`.

The page has no script, loads nothing and contains its figures; equal runs give equal pages. Jinja escapes every value.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.core.pages import Figure, check_page_name, environment
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.content import comparison_tables, run_tables
from nrat_scale.report.curves import CURVES, draw_by_strength, draw_curves, draw_joint_curves, draw_memorisation
from nrat_scale.report.details import strength_curves
from nrat_scale.report.facts import noise_facts, run_facts, selection, setting, validation_text
from nrat_scale.report.pictures import pictures
from nrat_scale.report.run import Run, Score, value_at
from nrat_scale.report.tables import RESULTS_CAPTION, all_flags, all_notes, attack_columns, evaluate_command, shared_n

_FEW_IMAGES = 1000

_TEMPLATES = environment("nrat_scale.report", autoescape=True)
_TEMPLATES.globals["shared_n"] = shared_n
_TEMPLATES.tests["score"] = lambda cell: isinstance(cell, Score)


def write_report(runs: Sequence[Run], out: Path | None = None, title: str | None = None) -> Path:
    """Write the report of `runs`, with the first run's `curves.png` beside it, and return its path.

    Args:
        runs: from `read_runs`, evaluated or not.
        out: the HTML file, by default report.html in the first run.
        title: heading of the page.

    Raises:
        UserError: `out` is not an .html file or cannot be written.
    """
    out = out or runs[0].path / "report.html"
    check_page_name(out, "report")
    curves = [draw_curves(run) for run in runs]
    page = render_page(runs, curves, title)
    make_folder(out.parent)
    write_atomically(out, page)
    write_atomically(out.with_name("curves.png"), curves[0])
    return out


def render_page(runs: Sequence[Run], curves: Sequence[bytes], title: str | None = None) -> str:
    """The HTML of a report; `curves` has one PNG per run."""
    evaluated = [run for run in runs if run.rows]
    rows = [row for run in runs for row in run.rows]
    counts = [score.n for row in rows for score in row.scores.values() if isinstance(score.n, int)]
    versions = {f"{name} {version}" for run in runs for name, version in value_at(run.results, "versions", {}).items()}
    return _TEMPLATES.get_template("page.html").render(
        title=title or f"Robustness report: {', '.join(run.name for run in runs)}",
        runs=runs,
        comparison=_comparison(runs) if len(runs) > 1 else None,
        sections=[_section(runs[: i + 1], png, alone=len(runs) == 1) for i, png in enumerate(curves)],
        attacks={attack: attack_title(attack) for attack in attack_columns(rows)},
        results_caption=RESULTS_CAPTION,
        warnings=[(run.name, warning) for run in runs for warning in run.warnings],
        settings=_group(setting, evaluated),
        selections=_group(selection, runs),
        notes=all_notes(runs),
        flags=all_flags(runs),
        few_images=_FEW_IMAGES if min(counts, default=_FEW_IMAGES) < _FEW_IMAGES else None,
        versions=sorted(versions),
    )


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """The first part of the page of several runs."""
    facts = [run_facts(run) for run in runs]
    shared = {title: text for title, text in facts[0].items() if all(other.get(title) == text for other in facts)}
    validated = [run for run in runs if run.validation]
    given = ", with the labels that selection uses" if any(map(_has_clean_curves, validated)) else ""
    return {
        "shared": shared,
        "tables": comparison_tables(runs),
        "missing": [(run.name, evaluate_command(run)) for run in runs if not run.rows],
        "figures": [
            Figure(draw_joint_curves(validated, key), f"Validation accuracy, {name}, by epoch{given}. {_MARKS}")
            for key, name in (("robust", "robust"), ("natural", "natural"))
            if validated
        ],
    }


_MARKS = "A star marks the best epoch of a run, a square the last."


def _section(runs: Sequence[Run], png: bytes, *, alone: bool) -> dict[str, Any]:
    """What the page says about the last of `runs`; the others are above it.

    Its facts and accuracies only if it is alone: otherwise the comparison has them.
    """
    *above, run = runs
    clean = f" Solid lines are measured with the labels that selection uses, dashed lines with the {run.clean_term}."
    memorised = draw_memorisation(run)
    kinds = "was left or was changed by noise" if any(map(run.injected_blindly, run.noise)) else "is correct or wrong"
    text = f"Training labels that the model predicts, by epoch, for images whose given label {kinds}."
    strength = [
        Figure(draw_by_strength(curves, axis), f"Test accuracy against {name}, with 95 % Wilson intervals.")
        for axis, name in (("eps", "the radius"), ("steps", "the number of steps"))
        if (curves := strength_curves(run, axis))
    ]
    return {
        "run": run,
        "alone": alone,
        "facts": run_facts(run) if alone else {},
        "command": evaluate_command(run),
        "curves": Figure(png, validation_text(run) + (clean if _has_clean_curves(run) else "")),
        "memorisation": None if memorised is None else Figure(memorised, text),
        "strength": strength,
        "best_is_last": run.best_is_last,
        "noises": [
            facts | {"same_as": next((other.name for other in above if other.noise.get(source) == noise), None)}
            for source, noise in run.noise.items()
            if (facts := noise_facts(run, source))
        ],
        "tables": {table.name: table for table in run_tables(run)},
        "gallery": next((found for row in run.rows if (found := pictures(run, row))), None),
    }


def _has_clean_curves(run: Run) -> bool:
    """Whether accuracies with clean labels are drawn beside those with the given labels."""
    return any(row.get(key) for row in run.validation[-1:] for key, *_ in CURVES[2:])


def _group(describe: Callable[[Run], str], runs: Sequence[Run]) -> dict[str, str]:
    """Description -> the names of the runs that it applies to."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run.name)
    return {text: ", ".join(names) for text, names in groups.items()}
