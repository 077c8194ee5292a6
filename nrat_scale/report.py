"""One run, or several side by side, as one HTML page: `python -m nrat_scale.report RUN [RUN ...]`.

run directory -> `read_run` (every value optional) -> `summary_table` (rows of accuracies) -> HTML, Markdown or text.
The page is one file: no script, no outside resource, figures within it; the same runs give the same page.
What comes from a file passes `_e` on its way into the page.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import make_folder, read_json, write_atomically

ATTACKS = ("natural", "pgd20", "cw20", "aa")  # columns that are always there; other attacks follow
_TITLES = {"natural": "natural", "aa": "AutoAttack", "aa-apgd": "APGD", "fgsm": "FGSM", "worst": "worst case"}
_SPACE_NOTE = "reproduces the released code's threat model; not comparable with RobustBench"
_LARGEST_MATRIX = 20  # classes; a larger transition matrix is not readable as a table
# Key in a validation row, label, colour, line style. The clean ones are null where clean labels are not known.
_CURVES = (
    ("natural", "natural", "#0072b2", "-"),
    ("robust", "robust", "#d55e00", "-"),
    ("natural_clean", "natural, clean labels", "#0072b2", "--"),
    ("robust_clean", "robust, clean labels", "#d55e00", "--"),
)
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


# ---- reading a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One evaluated checkpoint (`best`, `last`, `best = last`, `release`) and its record in results.json."""

    checkpoint: str
    record: dict[str, Any]

    def score(self, attack: str) -> dict[str, Any]:
        """Accuracy, low, high and n under `attack` (`worst`: under all of them); empty where it was not run."""
        return _dict(self.record.get("worst") if attack == "worst" else _dict(self.record.get("attacks")).get(attack))

    @property
    def flags(self) -> list[str]:
        """What makes these numbers doubtful, in sentences."""
        flags = self.record.get("flags")
        return [str(flag) for flag in flags] if isinstance(flags, list) else []


@dataclass(frozen=True)
class Run:
    """What a run directory says. `best` and `last` are the pointers in checkpoints/; an absent file is empty."""

    name: str
    path: Path
    recipe: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    best: dict[str, Any]
    last: dict[str, Any]
    noise: dict[str, Any]
    class_names: list[Any]
    results: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        """The evaluated checkpoints."""
        return summary_table(self.results)

    @property
    def best_row(self) -> dict[str, Any]:
        """The validation of the best checkpoint: that of best.json, else the first of the highest robust accuracy."""
        named = [row for row in self.validation if "step" in self.best and row.get("step") == self.best["step"]]
        ranked = sorted(self.validation, key=lambda row: -_percent(row.get("robust"), -1.0))
        return next(iter([*reversed(named), *ranked]), {})

    @property
    def attack(self) -> str:
        """The attack of the validation."""
        rows: list[Any] = [*self.validation, {"attack": _get(self.recipe, "train.validation_attack", "attack")}]
        return attack_title(str(_get(rows[0], "attack", "attack")))

    @property
    def space(self) -> str:
        """The threat space of evaluation or training, whichever is not the standard one."""
        spaces = [str(_get(tree, "threat.space", "pixel")) for tree in (self.results, self.recipe)]
        return next((space for space in spaces if space != "pixel"), "pixel")


def read_run(path: Path, name: str) -> Run:
    """Read a run directory; files that a run need not have yet may be absent.

    Raises:
        UserError: there is no run at `path`, or one of its files is damaged.
    """
    way_out = "Give a folder that nrat_scale.train has written."
    if not path.is_dir():
        raise UserError(f"There is no run directory {path}. {way_out}")
    if not any((path / file).is_file() for file in ("recipe.yaml", "metrics.jsonl")):
        raise UserError(f"{path} is not a run: it has neither recipe.yaml nor metrics.jsonl. {way_out}")
    rows = _read_metrics(path / "metrics.jsonl")
    results = _read_optional(path / "results.json", "Delete it and run nrat_scale.evaluate again.")
    if results and (results.get("format"), results.get("version")) != ("nrat_scale.results", 1):
        raise UserError(f"{path / 'results.json'} is no nrat_scale.results of version 1. Delete it and evaluate again.")
    best, last, noise, model = (
        _read_optional(path / file, "Delete it; the report does without.")
        for file in ("checkpoints/best.json", "checkpoints/last.json", "label_noise.json", "model.json")
    )
    train, validation = ([row for row in rows if row.get("kind") == kind] for kind in ("train", "validation"))
    recipe, names = _read_recipe(path / "recipe.yaml"), _get(model, "class_names", [])
    return Run(name, path, recipe, train, validation, best, last, noise, names, results)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several runs, each once, named by the shortest ends of their paths that tell them apart."""
    if not paths:
        raise UserError("No run was given. Name at least one run directory.")
    unique = list({path.resolve(): path for path in map(Path, paths)}.items())
    depth, names = 0, [""]
    while len(set(names)) < len(unique) or not depth:
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path, _ in unique]
    return [read_run(given, name) for (_, given), name in zip(unique, names, strict=True)]


def _read_optional(path: Path, way_out: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_json(path, "file")
    except UserError as error:
        raise UserError(f"{error} {way_out}") from error


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        recipe = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The recipe {path} cannot be read ({' '.join(str(error).split())}). Restore it.") from error
    if not isinstance(recipe, dict):
        raise UserError(f"The recipe {path} is damaged: it must be a mapping of keys to values. Restore it.")
    return {str(key): value for key, value in recipe.items()}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line without its end is what a killed run leaves, and is passed over."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Restore it.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode()) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(
                f"{path} is damaged: line {number} is not a JSON object. Remove that line or restore the file."
            )
    return rows


# ---- values, each of which may be absent ----------------------------------------------------------------------------


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _get(tree: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` where a part of it is absent or null."""
    for key in path.split("."):
        tree = _dict(tree).get(key)
    return default if tree is None else tree


def _number(value: Any) -> float | None:
    """`value` where it is a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _percent(score: Any, default: float = math.nan) -> float:
    accuracy = _number(_get(score, "accuracy"))
    return default if accuracy is None else 100 * accuracy


def _printable(value: Any) -> str:
    """Text without control characters and lone surrogates (file names that are no UTF-8)."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _e(value: Any) -> str:
    return html.escape(_printable(value))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fraction(value: Any) -> str:
    """`8/255 (0.0314)`; 0.3, which is no multiple of 1/255, as it is."""
    number = _number(value)
    if number is None:
        return str(value)
    k = round(255 * number)
    return f"{k}/255 ({number:.3g})" if k and abs(255 * number - k) < 1e-3 else _short(number)


# ---- rows of accuracies ---------------------------------------------------------------------------------------------


def summary_table(results: dict[str, Any]) -> list[Row]:
    """The evaluated checkpoints of a results.json, best before last; one row where they are the same step."""
    records = {str(name): record for name, record in _dict(results.get("checkpoints")).items() if _dict(record)}
    best, last = records.pop("best", {}), records.pop("last", {})
    if best and last and best.get("step") is not None and best.get("step") == last.get("step"):
        records = {"best = last": best, **records}
    else:
        records = {**({"best": best} if best else {}), **({"last": last} if last else {}), **records}
    return [Row(name, record) for name, record in records.items()]


def markdown_table(results: dict[str, Any]) -> str:
    """The robustness table of a results.json in Markdown: accuracy in %, its 95 % Wilson interval and n."""
    rows = summary_table(results)
    attacks = _attacks(rows)
    lines = [["checkpoint", *map(attack_title, attacks)], ["---", *["---:"] * len(attacks)]]
    for row in rows:
        epoch = f" (epoch {row.record['epoch']})" if "epoch" in row.record else ""
        scores = map(row.score, attacks)
        lines.append([row.checkpoint + epoch, *(_cell(s, "{} % {}, n = {}") for s in scores)])
    table = "".join("| " + " | ".join(_e(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    space = _get(results, "threat.space", "pixel")
    return table if space == "pixel" else f"{table}\n**Threat space `{_e(space)}`: {_SPACE_NOTE}.**\n"


def text_table(runs: Sequence[Run]) -> str:
    """The table for a terminal; n stands in a column's heading where it is the same in all rows."""
    found = [(run, row) for run in runs for row in run.rows]
    columns = [["run", *(run.name for run, _ in found)], ["checkpoint", *(row.checkpoint for _, row in found)]]
    for attack in _attacks(row for _, row in found):
        scores = [row.score(attack) for _, row in found]
        counts = {str(score["n"]) for score in scores if "n" in score}
        title = "AA" if attack == "aa" else attack_title(attack)
        if len(counts) == 1:
            columns.append([f"{title} (n={counts.pop()})", *(_cell(s, "{} {}") for s in scores)])
        else:
            columns.append([title, *(_cell(s, "{} {} n={}") for s in scores)])
    columns = [[_printable(cell) for cell in column] for column in columns]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)] if found else []
    lines += [f"{_printable(run.name)}: not evaluated yet: {_command(run)}" for run in runs if not run.rows]
    lines += [
        f"NOTE: {_printable(r.name)}: threat space {_printable(r.space)} {_SPACE_NOTE}."
        for r in runs
        if r.space != "pixel"
    ]
    lines += [f"FLAG: {_printable(flag)}" for flag in _flags(runs)]
    return "\n".join(lines)


def attack_title(attack: str) -> str:
    """`pgd20` as PGD-20, `aa` as AutoAttack."""
    if attack.startswith("transfer-"):
        return f"{attack_title(attack.removeprefix('transfer-'))}, transferred"
    match = re.fullmatch(r"(pgd|cw)([0-9]+)(?:x([0-9]+))?", attack)
    if match is None:
        return _TITLES.get(attack, attack)
    return f"{match[1].upper()}-{match[2]}" + (f", {match[3]} starts" if match[3] else "")


def _attacks(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    found = [str(attack) for row in rows for attack in _dict(row.record.get("attacks"))]
    worst = ["worst"] if any(row.score("worst") for row in rows) else []
    return list(dict.fromkeys([*ATTACKS, *found, *worst]))


def _flags(runs: Sequence[Run]) -> list[str]:
    return [f"{run.name}, {row.checkpoint}: {flag}" for run in runs for row in run.rows for flag in row.flags]


def _cell(score: dict[str, Any], template: str) -> str:
    """`template` filled with accuracy in %, interval and n; a dash for what was not measured."""
    low, high = (_number(score.get(key)) for key in ("low", "high"))
    interval = "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
    count = _number(score.get("n"))
    filled = template.format(f"{_percent(score):.1f}", interval, "?" if count is None else int(count))
    return "-" if math.isnan(_percent(score)) else " ".join(filled.split())


def _command(run: Run) -> str:
    path = shlex.quote(_printable(run.path))
    return f"python -m nrat_scale.evaluate {path} --data SHARDS --attacks natural,pgd20,cw20,aa"


# ---- figure ---------------------------------------------------------------------------------------------------------


def draw_curves(run: Run) -> bytes:
    """Validation accuracy by epoch, 0 to 100 %, as a PNG with the best epoch marked; what is null is not drawn."""
    figure = Figure(figsize=(6.4, 3.7), dpi=220, layout="constrained")
    axes = figure.subplots()
    axes.margins(x=0.02)
    attack = run.attack if re.fullmatch(r"[A-Z]+-[0-9]+", run.attack) else "attack"
    for key, label, colour, style in _CURVES:
        points = [(_number(row.get("epoch")), _percent(row.get(key))) for row in run.validation]
        points = [(x, y) for x, y in points if x is not None and not math.isnan(y)]
        if points:
            label = label.replace("robust", f"robust ({attack})")
            marker = "o" if len(points) <= 15 else None
            axes.plot(*zip(*points, strict=True), color=colour, ls=style, marker=marker, ms=3.5, lw=1.7, label=label)
    epoch, robust = _number(run.best_row.get("epoch")), _percent(run.best_row.get("robust"))
    if epoch is not None and not math.isnan(robust):
        axes.axvline(epoch, color="#59626d", lw=1, ls=":")
        axes.plot([epoch], [robust], "o", color="#d55e00", ms=6, mec="white", mew=1.2, zorder=5)
        side = "right" if epoch > sum(axes.get_xlim()) / 2 else "left"
        axes.text(epoch, 101.5, f"best: epoch {epoch:g}, robust {robust:.1f} %", ha=side, fontsize=9, color="#59626d")
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no validation yet", ha="center", transform=axes.transAxes)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100), yticks=range(0, 101, 20))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e3e6ea", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# ---- the page -------------------------------------------------------------------------------------------------------


def _card(run: Run) -> str:
    """What was trained."""
    planned, done = _get(run.recipe, "train.epochs"), run.train[-1].get("epoch") if run.train else 0
    values = {
        "noise": _noise_setting(run),
        "mix": _mix(run.recipe),
        "epochs": f"{planned} epochs" + ("" if done == planned else f", of which {done} are done") if planned else None,
        **{f"threat.{key}": _fraction(_get(run.recipe, f"threat.{key}", 0)) for key in ("eps", "step")},
    }

    if _get(run.recipe, "objective.name") == "natural":  # plain training makes no attack, whatever the recipe says
        values |= {"threat.num_steps": None, "objective.inner": None}

    def say(phrase: str) -> str:
        found = {key: values.get(key, _get(run.recipe, key)) for key in re.findall(r"{(.*?)}", phrase)}
        absent = any(value in (None, "", "0", "off") or (value == 0 and key != "seed") for key, value in found.items())
        return "" if absent else re.sub(r"{(.*?)}", lambda match: _short(found[match[1]]), phrase)

    items = {key: ", ".join(filter(None, map(say, phrases.split("; ")))) for key, phrases in _CARD.items()}
    listed = "".join(f"<dt>{_e(key)}</dt><dd>{_e(text)}</dd>" for key, text in items.items() if text)
    return f'<section class="card"><h2>{_e(run.name)}</h2><dl>{listed}</dl></section>'


def _noise_setting(run: Run) -> str:
    kind, rate = (_get(run.recipe, f"data.real.noise.{key}") for key in ("kind", "rate"))
    if kind in (None, "none"):
        return str(kind or "")
    realised = _number(run.noise.get("realised_rate"))
    wrong = "" if realised is None else f"{100 * realised:.1f} % of the real labels are wrong"
    return ", ".join(filter(None, [str(kind), f"rate {rate}" if rate else "", wrong]))


def _mix(recipe: dict[str, Any]) -> str:
    real, generated = _get(recipe, "data.real.shards"), _get(recipe, "data.generated.shards")
    part = (_number(_get(recipe, "data.generated.fraction")) if real else 1.0) if generated else 0.0
    shares = {"real": (real, None if part is None else 1 - part), "generated": (generated, part)}
    return ", ".join(
        ("" if share is None else f"{100 * share:.3g} % ") + f"{kind} ({'/'.join(Path(str(shards)).parts[-2:])})"
        for kind, (shards, share) in shares.items()
        if shards
    )


def _banners(runs: Sequence[Run]) -> str:
    """What keeps the numbers from being compared."""
    notes = [
        f"<b>{_e(r.name)}: threat space <code>{_e(r.space)}</code></b> {_SPACE_NOTE}."
        for r in runs
        if r.space != "pixel"
    ]
    settings = _by(_setting, [run for run in runs if run.rows])
    if len(settings) > 1:
        listed = "; ".join(f"{_e(', '.join(names))}: {_e(setting)}" for setting, names in settings.items())
        notes.append(f"<b>These runs were not evaluated alike, do not compare their rows.</b> {listed}.")
    for run in runs:
        evaluated, newest = _get(run.results, "checkpoints.best.step"), run.best.get("step")
        if None not in (evaluated, newest) and evaluated != newest:
            steps = f"of step {_e(evaluated)}, but the best checkpoint is now that of step {_e(newest)}"
            notes.append(f"<b>{_e(run.name)}: the results are {steps}.</b> Evaluate it again.")
    return "".join(f'<p class="banner" role="note">{note}</p>' for note in notes)


def _setting(run: Run) -> str:
    """What an evaluation was made on."""
    data, threat = _dict(run.results.get("data")), _dict(run.results.get("threat"))
    dataset, folder, count, fingerprint = (
        _get(data, k, "?") for k in ("dataset", "folder", "num_images", "fingerprint")
    )
    eps, step = (_fraction(_get(threat, key, "?")) for key in ("eps", "step"))
    images = f"{dataset} (folder {folder}, {count} images, fingerprint {str(fingerprint)[:16]})"
    return f"{images}, ℓ∞ with ε = {eps}, PGD and CW steps of {step}, in {_get(threat, 'space', 'pixel')} space"


def _by(describe: Callable[[Run], str], runs: Sequence[Run]) -> dict[str, list[str]]:
    """Description -> the names of the runs that it fits."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run.name)
    return groups


def _table(kind: str, caption: str, head: Sequence[str], body: str) -> str:
    """A table that scrolls by itself on a narrow screen, by keyboard too. `body` is HTML already."""
    columns = "".join(f'<th scope="col">{_e(title)}</th>' for title in head)
    table = f'<table class="{kind}"><caption>{caption}</caption><thead><tr>{columns}</tr></thead>{body}</table>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">{table}</div>'


def _results_table(runs: Sequence[Run]) -> str:
    if not any(run.rows for run in runs):
        return "".join(f"<p>{_e(run.name)}: not evaluated yet: <code>{_e(_command(run))}</code></p>" for run in runs)
    attacks = _attacks(row for run in runs for row in run.rows)
    groups = []
    for run in runs:
        lines = [_result_row(row, attacks) for row in run.rows]
        missing = f'<td colspan="{len(attacks) + 1}">not evaluated yet: <code>{_e(_command(run))}</code></td>'
        name = f'<th scope="rowgroup" rowspan="{max(1, len(lines))}">{_e(run.name)}</th>'
        groups.append(f"<tbody><tr>{name}{'</tr><tr>'.join(lines or [missing])}</tr></tbody>")
    caption = "Accuracy on the test images in %, its 95 % Wilson interval and the number of images n."
    table = _table("results", caption, ["Run", "Checkpoint", *map(attack_title, attacks)], "".join(groups))
    flags = "".join(f"<li>{_e(flag)}</li>" for flag in _flags(runs))
    return table + (f'<div class="banner"><b>Reasons for doubt</b><ul>{flags}</ul></div>' if flags else "")


def _result_row(row: Row, attacks: Sequence[str]) -> str:
    epoch, weights = row.record.get("epoch"), row.record.get("weights")
    details = [f"epoch {epoch}"] * (epoch is not None) + [f"{weights} weights".replace("ema", "EMA")] * (
        weights is not None
    )
    cells = "".join(
        f"<td>{_cell(row.score(a), '<b>{}</b><small>{}</small><small>n = {}</small>')}</td>" for a in attacks
    )
    return f'<th scope="row">{_e(row.checkpoint)}<small>{_e(", ".join(details))}</small></th>{cells}'


def _run_section(run: Run, curves: bytes) -> str:
    best, last = run.best_row, run.validation[-1] if run.validation else {}
    words = f"Validation accuracy by epoch (n = {_get(last, 'robust.n', '?')})."
    for name, row in (("Best", best), ("Last", last)):
        natural, robust = (f"{_percent(row.get(key)):.1f} %" for key in ("natural", "robust"))
        words += f" {name}: epoch {row.get('epoch', '?')}, natural {natural}, {run.attack} {robust}."
    words = words.replace("nan %", "not measured") if run.validation else "There is no validation yet."
    alt = f"Learning curves of {run.name}. {words}"
    if _dict(last.get("natural_clean")) or _dict(last.get("robust_clean")):
        words += " Solid lines count against the labels that selection uses, dashed lines against the clean labels."
    image = f'<img src="data:image/png;base64,{base64.b64encode(curves).decode()}" alt="{_e(alt)}">'
    figure = (
        f"<h3>Learning curves</h3><figure>{image}<figcaption>{_e(words).replace(' %', '&nbsp;%')}</figcaption></figure>"
    )
    return f"<section><h2>{_e(run.name)}</h2>{figure}{_gap_block(run)}{_noise_block(run)}</section>"


def _gap_block(run: Run) -> str:
    """Best minus last, of the test results where there are some, and of the validation."""
    records = _dict(run.results.get("checkpoints"))
    best, last = (Row(name, _dict(records.get(name))) for name in ("best", "last"))
    pairs = [(f"test, {attack_title(a)}", best.score(a), last.score(a)) for a in _attacks([best, last])]
    for key, label, *_ in _CURVES if run.validation else ():
        label = label.replace("robust", run.attack)
        pairs.append((f"validation, {label}", _dict(run.best_row.get(key)), _dict(run.validation[-1].get(key))))
    body = ""
    for label, first, second in pairs:
        gap = _percent(first) - _percent(second)
        if not math.isnan(gap) and first.get("n") == second.get("n"):  # different images: no difference
            shown = f"{gap:+.1f}".replace("-", "−") if abs(gap) >= 0.05 else "0.0"
            cells = f"<td>{_percent(first):.1f}</td><td>{_percent(second):.1f}</td><td><b>{shown}</b></td>"
            body += f'<tr><th scope="row">{_e(label)}</th>{cells}</tr>'
    steps = [pointer.get("step") for pointer in (run.best, run.last)]
    same = any(row.checkpoint == "best = last" for row in run.rows) or (steps[0] is not None and len(set(steps)) == 1)
    note = "<p>The best checkpoint is the last one, so there is no gap.</p>" if same else ""
    caption = "Best minus last checkpoint; a positive gap is accuracy lost to overfitting."
    table = _table("gaps", caption, ["Accuracy, %", "Best", "Last", "Gap, points"], f"<tbody>{body}</tbody>")
    return f"<h3>Overfitting gaps</h3>{note}{table}" if body else ""


def _noise_block(run: Run) -> str:
    keys = ("kind", "rate", "seed", "num_labels", "num_noisy")
    kind, rate, seed, total, wrong = (_e(_get(run.noise, key, "?")) for key in keys)
    realised, matrix = _number(run.noise.get("realised_rate")), run.noise.get("transition_matrix")
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
        body += f'<tr><th scope="row">{_e(name)}</th>'
        for j, count in enumerate(row):
            colour = f"rgb(var(--{'right' if i == j else 'wrong'}) / {0.75 * (count / (sum(row) or 1)) ** 0.7:.2f})"
            body += f'<td style="background:{colour}">{_e(count)}</td>'
        body += "</tr>"
    caption = "Images of each clean class (row) by the label they were given (column)."
    return _table("matrix", caption, ["clean \\ given", *map(str, range(len(matrix)))], f"<tbody>{body}</tbody>")


def _selection(run: Run) -> str:
    source, labels = (_get(run.recipe, f"data.validation.{key}", "?") for key in ("source", "labels"))
    count = _get(run.best_row, "robust.n", _get(run.recipe, "data.validation.size", "?"))
    noisy = "" if labels != "given" or not _number(run.noise.get("num_noisy")) else ", wrong ones included"
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
    scores = [row.score(attack) for run in evaluated for row in run.rows for attack in _attacks([row])]
    if any((_number(score.get("n")) or math.inf) < 1000 for score in scores):
        items.append("Some numbers rest on fewer than 1000 images (see n): read the interval, not the decimal.")
    versions = {f"{name} {version}" for run in runs for name, version in _dict(run.results.get("versions")).items()}
    items += [f"Evaluated with {', '.join(sorted(versions))}."] if versions else []
    return f"<h2>How these numbers were made</h2><ul>{''.join(f'<li>{_e(item)}</li>' for item in items)}</ul>"


def _page(runs: Sequence[Run], curves: Sequence[bytes], title: str | None) -> str:
    heading = _e(title or f"Robustness report: {', '.join(run.name for run in runs)}")
    sections = "".join(_run_section(run, png) for run, png in zip(runs, curves, strict=True))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, no script runs
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n<body>\n'
        f'<main>\n<h1>{heading}</h1>\n{_banners(runs)}\n<div class="cards">{"".join(map(_card, runs))}</div>\n'
        f"<h2>Robustness</h2>\n{_results_table(runs)}\n{sections}\n{_method(runs)}\n</main>\n</body>\n</html>\n"
    )


def _write(runs: Sequence[Run], out: Path, title: str | None) -> Path:
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
    return _write(read_runs(runs), out or Path(runs[0]) / "report.html", title)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.report",
        description="One HTML page about one run, or several side by side: robustness, learning curves, label noise.",
        epilog="Example: python -m nrat_scale.report runs/nrat runs/plain --out comparison.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="(default: report.html in the first RUN)")
    parser.add_argument("--title", help="of the page")
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.runs)
    path = _write(runs, arguments.out or arguments.runs[0] / "report.html", arguments.title)
    print(text_table(runs))
    print(path)


if __name__ == "__main__":
    run_cli(main)
