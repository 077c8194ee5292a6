"""One run, or several side by side, as one HTML page: `python -m nrat_scale.report RUN [RUN ...]`.

run directory -> `read_run` (every value optional) -> `summary_table` (rows of accuracies) -> HTML, Markdown or text.
The page is one file: no script, no outside resource, figures within it; the same runs give the same page.
What comes from a file passes `_e` on its way into the page.
"""

import base64
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.report.curves import CURVES, draw_curves
from nrat_scale.report.run import (
    Row,
    Run,
    accuracy_percent,
    as_dict,
    attack_title,
    finite_number,
    fraction_text,
    get_path,
    read_runs,
    short_number,
)
from nrat_scale.report.tables import SPACE_NOTE, all_flags, attack_columns, escape, evaluate_command, score_cell

_LARGEST_MATRIX = 20  # classes; a larger transition matrix is not readable as a table
# What a run's card says: a phrase is left out where one of its keys is absent, off or 0.
_CARD = {
    "Objective": "{objective.name}; λ = {objective.lam}; inner loss {objective.inner}; label smoothing {objective.smoothing}",
    "Model": "{model.name}",
    "Threat": "ℓ∞, ε = {threat.eps}; trained with {threat.num_steps} steps of {threat.step}",
    "Label noise": "{noise}",
    "Data": "{mix}",
    "Training": "{epochs}; {data.epoch_samples} images each; batch {data.batch_size}; learning rate {optim.lr}; {precision}",
    "Weights": "EMA {ema.decay}; AWP γ = {awp.gamma}",
    "Seed": "{seed}",
}
CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #59626d; --line: #d5dae0; --card: #f6f7f9; --page: #fff;
  --warn: #fff4dc; --warn-line: #c98500; --right: 0 114 178; --wrong: 213 94 0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a0a9b4; --line: #3a424c; --card: #1d2228;
  --page: #14171b; --warn: #372a0c; --warn-line: #d99a1c; } }
body { margin: 0 auto; padding: 2rem 1.1rem 3rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3, dd, code, th[scope=rowgroup] { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.7rem 0 .4rem; }
p, li { max-width: 46rem; }
li { margin: .3rem 0; }
small, caption, figcaption { color: var(--soft); font-size: .86rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.banner { background: var(--warn); border-left: .3rem solid var(--warn-line); padding: .7rem 1rem; max-width: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; margin: 1.4rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1.1rem; }
.card h2 { margin: 0 0 .5rem; padding: 0; border: 0; font-size: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; font-size: .93rem; }
dt { color: var(--soft); }
dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; max-width: calc(100vw - 2.2rem); }
th, td { text-align: right; padding: .45rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; font-weight: normal; }
thead th { font-weight: 600; border-bottom-width: 2px; }
thead th::first-letter { text-transform: uppercase; }
th:first-child, tbody th, .results th:nth-child(2), td[colspan] { text-align: left; }
td small, th small { display: block; }
.results { width: 100%; }
.results td:not([colspan]) { white-space: nowrap; }
.results b { font-size: 1.12rem; }
.results tbody th[scope=rowgroup] { font-weight: 600; min-width: 6rem; }
.results tbody { border-bottom: 2px solid var(--line); }
.matrix th { white-space: nowrap; }
.matrix td, .matrix th { padding: .22rem .45rem; font-size: .85rem; border: 1px solid var(--line); }
figure { margin: .6rem 0; max-width: 46rem; }
@media (max-width: 40rem) { th, td { padding: .4rem .35rem; } td small, th small { font-size: .78rem; } .results b { font-size: 1rem; } }
img { box-sizing: border-box; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .5rem; }
"""


# ---- the page -------------------------------------------------------------------------------------------------------


def _card(run: Run) -> str:
    """What was trained."""
    planned, done = get_path(run.recipe, "train.epochs"), run.train[-1].get("epoch") if run.train else 0
    values = {
        "noise": _noise_setting(run),
        "mix": _mix(run.recipe),
        "epochs": f"{planned} epochs" + ("" if done == planned else f", of which {done} are done") if planned else None,
        **{f"threat.{key}": fraction_text(get_path(run.recipe, f"threat.{key}", 0)) for key in ("eps", "step")},
    }

    if get_path(run.recipe, "objective.name") == "natural":  # plain training makes no attack, whatever the recipe says
        values |= {"threat.num_steps": None, "objective.inner": None}

    def say(phrase: str) -> str:
        found = {key: values.get(key, get_path(run.recipe, key)) for key in re.findall(r"{(.*?)}", phrase)}
        absent = any(value in (None, "", "0", "off") or (value == 0 and key != "seed") for key, value in found.items())
        return "" if absent else re.sub(r"{(.*?)}", lambda match: short_number(found[match[1]]), phrase)

    items = {key: ", ".join(filter(None, map(say, phrases.split("; ")))) for key, phrases in _CARD.items()}
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in items.items() if text)
    return f'<section class="card"><h2>{escape(run.name)}</h2><dl>{listed}</dl></section>'


def _noise_setting(run: Run) -> str:
    kind, rate = (get_path(run.recipe, f"data.real.noise.{key}") for key in ("kind", "rate"))
    if kind in (None, "none"):
        return str(kind or "")
    realised = finite_number(run.noise.get("realised_rate"))
    wrong = "" if realised is None else f"{100 * realised:.1f} % of the real labels are wrong"
    return ", ".join(filter(None, [str(kind), f"rate {rate}" if rate else "", wrong]))


def _mix(recipe: dict[str, Any]) -> str:
    real, generated = get_path(recipe, "data.real.shards"), get_path(recipe, "data.generated.shards")
    part = (finite_number(get_path(recipe, "data.generated.fraction")) if real else 1.0) if generated else 0.0
    shares = {"real": (real, None if part is None else 1 - part), "generated": (generated, part)}
    return ", ".join(
        ("" if share is None else f"{100 * share:.3g} % ") + f"{kind} ({'/'.join(Path(str(shards)).parts[-2:])})"
        for kind, (shards, share) in shares.items()
        if shards
    )


def _banners(runs: Sequence[Run]) -> str:
    """What keeps the numbers from being compared."""
    notes = [
        f"<b>{escape(r.name)}: threat space <code>{escape(r.space)}</code></b> {SPACE_NOTE}."
        for r in runs
        if r.space != "pixel"
    ]
    settings = _by(_setting, [run for run in runs if run.rows])
    if len(settings) > 1:
        listed = "; ".join(f"{escape(', '.join(names))}: {escape(setting)}" for setting, names in settings.items())
        notes.append(f"<b>These runs were not evaluated alike, do not compare their rows.</b> {listed}.")
    for run in runs:
        evaluated, newest = get_path(run.results, "checkpoints.best.step"), run.best.get("step")
        if None not in (evaluated, newest) and evaluated != newest:
            steps = f"of step {escape(evaluated)}, but the best checkpoint is now that of step {escape(newest)}"
            notes.append(f"<b>{escape(run.name)}: the results are {steps}.</b> Evaluate it again.")
    return "".join(f'<p class="banner" role="note">{note}</p>' for note in notes)


def _setting(run: Run) -> str:
    """What an evaluation was made on."""
    data, threat = as_dict(run.results.get("data")), as_dict(run.results.get("threat"))
    dataset, folder, count, fingerprint = (
        get_path(data, k, "?") for k in ("dataset", "folder", "num_images", "fingerprint")
    )
    eps, step = (fraction_text(get_path(threat, key, "?")) for key in ("eps", "step"))
    images = f"{dataset} (folder {folder}, {count} images, fingerprint {str(fingerprint)[:16]})"
    return f"{images}, ℓ∞ with ε = {eps}, PGD and CW steps of {step}, in {get_path(threat, 'space', 'pixel')} space"


def _by(describe: Callable[[Run], str], runs: Sequence[Run]) -> dict[str, list[str]]:
    """Description -> the names of the runs that it fits."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run.name)
    return groups


def _table(kind: str, caption: str, head: Sequence[str], body: str) -> str:
    """A table that scrolls by itself on a narrow screen, by keyboard too. `body` is HTML already."""
    columns = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    table = f'<table class="{kind}"><caption>{caption}</caption><thead><tr>{columns}</tr></thead>{body}</table>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">{table}</div>'


def _results_table(runs: Sequence[Run]) -> str:
    if not any(run.rows for run in runs):
        return "".join(
            f"<p>{escape(run.name)}: not evaluated yet: <code>{escape(evaluate_command(run))}</code></p>"
            for run in runs
        )
    attacks = attack_columns(row for run in runs for row in run.rows)
    groups = []
    for run in runs:
        lines = [_result_row(row, attacks) for row in run.rows]
        missing = (
            f'<td colspan="{len(attacks) + 1}">not evaluated yet: <code>{escape(evaluate_command(run))}</code></td>'
        )
        name = f'<th scope="rowgroup" rowspan="{max(1, len(lines))}">{escape(run.name)}</th>'
        groups.append(f"<tbody><tr>{name}{'</tr><tr>'.join(lines or [missing])}</tr></tbody>")
    caption = "Accuracy on the test images in %, its 95 % Wilson interval and the number of images n."
    table = _table("results", caption, ["Run", "Checkpoint", *map(attack_title, attacks)], "".join(groups))
    flags = "".join(f"<li>{escape(flag)}</li>" for flag in all_flags(runs))
    return table + (f'<div class="banner"><b>Reasons for doubt</b><ul>{flags}</ul></div>' if flags else "")


def _result_row(row: Row, attacks: Sequence[str]) -> str:
    epoch, weights = row.record.get("epoch"), row.record.get("weights")
    details = [f"epoch {epoch}"] * (epoch is not None) + [f"{weights} weights".replace("ema", "EMA")] * (
        weights is not None
    )
    cells = "".join(
        f"<td>{score_cell(row.score(a), '<b>{}</b><small>{}</small><small>n = {}</small>')}</td>" for a in attacks
    )
    return f'<th scope="row">{escape(row.checkpoint)}<small>{escape(", ".join(details))}</small></th>{cells}'


def _run_section(run: Run, curves: bytes) -> str:
    best, last = run.best_row, run.validation[-1] if run.validation else {}
    words = f"Validation accuracy by epoch (n = {get_path(last, 'robust.n', '?')})."
    for name, row in (("Best", best), ("Last", last)):
        natural, robust = (f"{accuracy_percent(row.get(key)):.1f} %" for key in ("natural", "robust"))
        words += f" {name}: epoch {row.get('epoch', '?')}, natural {natural}, {run.attack} {robust}."
    words = words.replace("nan %", "not measured") if run.validation else "There is no validation yet."
    alt = f"Learning curves of {run.name}. {words}"
    if as_dict(last.get("natural_clean")) or as_dict(last.get("robust_clean")):
        words += " Solid lines count against the labels that selection uses, dashed lines against the clean labels."
    image = f'<img src="data:image/png;base64,{base64.b64encode(curves).decode()}" alt="{escape(alt)}">'
    figure = f"<h3>Learning curves</h3><figure>{image}<figcaption>{escape(words).replace(' %', '&nbsp;%')}</figcaption></figure>"
    return f"<section><h2>{escape(run.name)}</h2>{figure}{_gap_block(run)}{_noise_block(run)}</section>"


def _gap_block(run: Run) -> str:
    """Best minus last, of the test results where there are some, and of the validation."""
    records = as_dict(run.results.get("checkpoints"))
    best, last = (Row(name, as_dict(records.get(name))) for name in ("best", "last"))
    pairs = [(f"test, {attack_title(a)}", best.score(a), last.score(a)) for a in attack_columns([best, last])]
    for key, label, *_ in CURVES if run.validation else ():
        label = label.replace("robust", run.attack)
        pairs.append((f"validation, {label}", as_dict(run.best_row.get(key)), as_dict(run.validation[-1].get(key))))
    body = ""
    for label, first, second in pairs:
        gap = accuracy_percent(first) - accuracy_percent(second)
        if not math.isnan(gap) and first.get("n") == second.get("n"):  # different images: no difference
            shown = f"{gap:+.1f}".replace("-", "−") if abs(gap) >= 0.05 else "0.0"
            cells = (
                f"<td>{accuracy_percent(first):.1f}</td><td>{accuracy_percent(second):.1f}</td><td><b>{shown}</b></td>"
            )
            body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    steps = [pointer.get("step") for pointer in (run.best, run.last)]
    same = any(row.checkpoint == "best = last" for row in run.rows) or (steps[0] is not None and len(set(steps)) == 1)
    note = "<p>The best checkpoint is the last one, so there is no gap.</p>" if same else ""
    caption = "Best minus last checkpoint; a positive gap is accuracy lost to overfitting."
    table = _table("gaps", caption, ["Accuracy, %", "Best", "Last", "Gap, points"], f"<tbody>{body}</tbody>")
    return f"<h3>Overfitting gaps</h3>{note}{table}" if body else ""


def _noise_block(run: Run) -> str:
    keys = ("kind", "rate", "seed", "num_labels", "num_noisy")
    kind, rate, seed, total, wrong = (escape(get_path(run.noise, key, "?")) for key in keys)
    realised, matrix = finite_number(run.noise.get("realised_rate")), run.noise.get("transition_matrix")
    if not realised:
        return ""
    text = f"{wrong} of {total} real labels are wrong, a realised rate of {100 * realised:.1f} %"
    text = f"<h3>Label noise</h3><p>{text} ({kind}, rate {rate}, seed {seed}).</p>"
    if isinstance(matrix, list) and len(matrix) > _LARGEST_MATRIX:
        return f"{text}<p>label_noise.json has the transition matrix of the {len(matrix)} classes.</p>"
    return text + (_matrix_table(matrix, run.class_names) if matrix else "")


def _matrix_table(matrix: list[list[float]], class_names: list[Any]) -> str:
    """Counts, shaded by their share of the row: blue where the label is right, orange where it is wrong."""
    body = ""
    for i, row in enumerate(matrix):
        name = f"{i} {class_names[i]}" if len(class_names) == len(matrix) and class_names[i] != str(i) else str(i)
        body += f'<tr><th scope="row">{escape(name)}</th>'
        for j, count in enumerate(row):
            colour = f"rgb(var(--{'right' if i == j else 'wrong'}) / {0.75 * (count / (sum(row) or 1)) ** 0.7:.2f})"
            body += f'<td style="background:{colour}">{escape(count)}</td>'
        body += "</tr>"
    caption = "Images of each clean class (row) by the label they were given (column)."
    return _table("matrix", caption, ["clean \\ given", *map(str, range(len(matrix)))], f"<tbody>{body}</tbody>")


def _selection(run: Run) -> str:
    source, labels = (get_path(run.recipe, f"data.validation.{key}", "?") for key in ("source", "labels"))
    count = get_path(run.best_row, "robust.n", get_path(run.recipe, "data.validation.size", "?"))
    noisy = "" if labels != "given" or not finite_number(run.noise.get("num_noisy")) else ", wrong ones included"
    return (
        f"“Best” is the epoch with the highest {run.attack} accuracy on {count} held-out {source} images of the training "
        f"data with their {labels} labels{noisy}; “last” is the newest epoch. Test images take no part in the selection."
    )


def _method(runs: Sequence[Run]) -> str:
    """How the numbers were made: selection, test data, interval."""
    evaluated = [run for run in runs if run.rows]
    items = [f"{', '.join(names)}: {words}" for words, names in _by(_selection, runs).items()]
    items += [f"{', '.join(names)}: tested on {words}." for words, names in _by(_setting, evaluated).items()]
    items.append(
        "Accuracy is a mean over images, and an image counts only if it is classified rightly under the attack."
    )
    items.append(
        "Brackets hold the 95 % Wilson interval: the sampling error of the test images, not that of the training seed."
    )
    scores = [row.score(attack) for run in evaluated for row in run.rows for attack in attack_columns([row])]
    if any((finite_number(score.get("n")) or math.inf) < 1000 for score in scores):
        items.append("Some numbers rest on fewer than 1000 images (see n): read the interval, not the decimal.")
    versions = {f"{name} {version}" for run in runs for name, version in as_dict(run.results.get("versions")).items()}
    items += [f"Evaluated with {', '.join(sorted(versions))}."] if versions else []
    return f"<h2>How these numbers were made</h2><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _page(runs: Sequence[Run], curves: Sequence[bytes], title: str | None) -> str:
    heading = escape(title or f"Robustness report: {', '.join(run.name for run in runs)}")
    sections = "".join(_run_section(run, png) for run, png in zip(runs, curves, strict=True))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, no script runs
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n<body>\n'
        f'<main>\n<h1>{heading}</h1>\n{_banners(runs)}\n<div class="cards">{"".join(map(_card, runs))}</div>\n'
        f"<h2>Robustness</h2>\n{_results_table(runs)}\n{sections}\n{_method(runs)}\n</main>\n</body>\n</html>\n"
    )


def write_page(runs: Sequence[Run], out: Path, title: str | None) -> Path:
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The report {out} must be an .html file. Choose another name with --out.")
    curves = [draw_curves(run) for run in runs]
    page = _page(runs, curves, title)
    make_folder(out.parent)
    write_atomically(out, page)
    write_atomically(out.with_name("curves.png"), curves[0])
    return out


def write_report(runs: Sequence[Path], out: Path | None = None, title: str | None = None) -> Path:
    """Write the report of `runs` and, beside it, `curves.png`: the learning curves of the first run.

    Args:
        runs: run directories; those not evaluated yet say so.
        out: the HTML file, by default report.html in the first run.
        title: of the page.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: a run is missing or damaged, or `out` cannot be written; nothing was written then.
    """
    return write_page(read_runs(runs), out or Path(runs[0]) / "report.html", title)
