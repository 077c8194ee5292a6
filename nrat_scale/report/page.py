"""The report as one HTML file: run directories -> `read_runs` -> values for the template -> `templates/page.html`.

The page has no script, loads nothing and contains its figures; equal runs give equal pages. Jinja escapes every value.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nrat_scale.attacks import fraction_text
from nrat_scale.core.errors import UserError, printable
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.data.spec import GENERATED, REAL, batch_shares
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.labels import NONE, UNKNOWN, UNSET
from nrat_scale.objectives import objective_title
from nrat_scale.report.curves import CLEAN, CURVES, draw_curves
from nrat_scale.report.run import Run, number_at, read_score, threat_at, value_at
from nrat_scale.report.tables import all_flags, all_notes, attack_columns, evaluate_command

_LARGEST_MATRIX = 20  # classes; a larger transition matrix is not readable as a table
_FEW_IMAGES = 1000


def environment(package: str, *, autoescape: bool) -> Environment:
    """The templates of a package; values are printed without control characters, unless they are `Markup`."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


_TEMPLATES = environment("nrat_scale.report", autoescape=True)


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
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The report {out} must be an .html file. Choose another name with --out.")
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
    sections = [
        {
            "run": run,
            "facts": _facts(run),
            "command": evaluate_command(run),
            "png": base64.b64encode(png).decode(),
            "accuracies": _validation_text(run),
            "has_clean": any(row.get(key) for row in run.validation[-1:] for key, *_ in CURVES[2:]),
            "gaps": list(_gaps(run)),
            "best_is_last": run.best.get("step") is not None and run.best.get("step") == run.last.get("step"),
            "noises": [facts for source in run.noise if (facts := _noise(run, source))],
        }
        for run, png in zip(runs, curves, strict=True)
    ]
    return _TEMPLATES.get_template("page.html").render(
        title=title or f"Robustness report: {', '.join(run.name for run in runs)}",
        sections=sections,
        attacks={attack: attack_title(attack) for attack in attack_columns(rows)},
        evaluated=evaluated,
        warnings=[(run.name, warning) for run in runs for warning in run.warnings],
        settings=_group(_setting, evaluated),
        selections=_group(_selection, runs),
        notes=all_notes(runs),
        flags=all_flags(runs),
        few_images=_FEW_IMAGES if min(counts, default=_FEW_IMAGES) < _FEW_IMAGES else None,
        versions=sorted(versions),
    )


def _group(describe: Callable[[Run], str], runs: Sequence[Run]) -> dict[str, str]:
    """Description -> the names of the runs that it applies to."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run.name)
    return {text: ", ".join(names) for text, names in groups.items()}


_IKL_SIGNS = {"alpha": "α", "beta": "β", "temperature": "T", "gamma": "γ"}


def _facts(run: Run) -> dict[str, str]:
    """The settings of the training; those that are unknown, off or 0 are omitted."""

    def phrase(path: str, text: str = "{}") -> str:
        value = value_at(run.recipe, path, 0)
        return "" if value in (0, "", "off") else text.format(f"{value:.4g}" if isinstance(value, float) else value)

    attacked = value_at(run.recipe, "objective.name") != "natural"  # plain training makes no attack
    step = number_at(run.recipe, "threat.step")
    steps = f"trained with {{}} steps of {fraction_text(step)}" if attacked and step else ""
    inner = phrase("objective.inner", "inner loss {}") if attacked else ""
    smoothing = phrase("objective.smoothing", "label smoothing {}")
    images, rate = phrase("data.epoch_samples", "{} images each"), phrase("optim.lr", "learning rate {}")
    name, loss, divergence = (phrase(f"objective.{key}") for key in ("name", "loss", "divergence"))
    title = objective_title(name, loss, divergence, number_at(run.recipe, "objective.warm_start") or 0.0)
    weights = [phrase("objective.lam", "λ = {}")]
    if value_at(run.recipe, "objective.divergence") == "ikl":
        weights = [phrase(f"objective.ikl_{key}", f"{sign} = {{}}") for key, sign in _IKL_SIGNS.items()]
    facts = {
        "Objective": [title, *weights, inner, smoothing],
        "Model": [phrase("model.name")],
        "Threat": [threat_at(run.recipe), phrase("threat.num_steps", steps)],
        "Label noise": list(_noise_texts(run)),
        "Data": _shares(run.recipe),
        "Training": [_epochs_text(run), images, phrase("data.batch_size", "batch {}"), rate, phrase("precision")],
        "Weights": [phrase("ema.decay", "EMA {}"), phrase("awp.gamma", "AWP γ = {}")],
        "Seed": [str(value_at(run.recipe, "seed", ""))],
    }
    return {title: ", ".join(filter(None, phrases)) for title, phrases in facts.items() if any(phrases)}


def _epochs_text(run: Run) -> str:
    planned, done = value_at(run.recipe, "train.epochs"), run.train[-1].get("epoch") if run.train else 0
    return "" if planned is None else f"{planned} epochs" + ("" if done == planned else f" planned, {done} done")


def _shares(recipe: dict[str, Any]) -> list[str]:
    """Share and folder of each source, such as `30 % real (digits/train)`."""
    real, generated = (value_at(recipe, f"data.{source}.shards") for source in ("real", "generated"))
    fraction = number_at(recipe, "data.generated.fraction") or 0.0 if real and generated else float(bool(generated))
    return [
        f"{100 * share:.3g} % {source} ({'/'.join(PurePath(str(shards)).parts[-2:])})"
        for source, shards, share in (("real", real, 1 - fraction), ("generated", generated, fraction))
        if shards
    ]


def _noise_texts(run: Run) -> Iterator[str]:
    """The noise of real and of generated labels, and the rates in a batch of the labels that injected noise changed."""
    kind = value_at(run.recipe, "data.real.noise.kind")
    if kind is not None and value_at(run.recipe, "data.real.shards"):
        generated = value_at(run.recipe, "data.generated.shards")
        none = "none in the real labels" if generated else NONE
        yield {UNKNOWN: "unknown: nobody has checked the real labels", NONE: none}.get(kind, str(kind))
        if rate := number_at(run.recipe, "data.real.noise.rate"):
            yield f"rate {rate:.4g}"
        if run.injected_blindly(REAL):
            yield "the real labels before injection are unchecked"
    if (kind := value_at(run.recipe, "data.generated.noise.kind", NONE)) not in (NONE, UNKNOWN, UNSET):
        yield f"generated labels: {kind}, rate {value_at(run.recipe, 'data.generated.noise.rate', '?')}"
    rates = [rate for source in run.noise if (rate := _effective_rate(run, source))]
    if rates:
        yield f"{100 * sum(rates):.1f} % of a batch's labels"


def _effective_rate(run: Run, source: str) -> float | None:
    """The fraction of a batch's labels that the noise of `source` makes wrong, None if it is unknown."""
    kinds = [kind for kind in (REAL, GENERATED) if value_at(run.recipe, f"data.{kind}.shards")]
    size, fraction = number_at(run.recipe, "data.batch_size"), number_at(run.recipe, "data.generated.fraction")
    rate = number_at(run.noise[source], "realised_rate")
    if not size or rate is None or source not in kinds or (fraction is None and len(kinds) == 2):
        return None
    return rate * batch_shares(int(size), fraction or 0.0, kinds)[source]


def _noise(run: Run, source: str) -> dict[str, Any] | None:
    """Label noise with its transition matrix as rows of (class, [(count, shade from 0 to 1), ...]); no rows for many classes."""
    noise = run.noise[source]
    realised, matrix = number_at(noise, "realised_rate"), value_at(noise, "transition_matrix", [])
    if not realised:
        return None
    facts = {key: value_at(noise, key, "?") for key in ("kind", "rate", "seed", "num_labels", "num_noisy")}
    effective = _effective_rate(run, source)
    facts |= {"realised": f"{100 * realised:.1f}", "num_classes": len(matrix), "matrix": [], "source": source}
    facts["blind"] = run.injected_blindly(source)
    facts["effective"] = None if effective is None else f"{100 * effective:.1f}"
    if len(matrix) <= _LARGEST_MATRIX:
        names = run.class_names if len(run.class_names) == len(matrix) else range(len(matrix))
        for i, (name, counts) in enumerate(zip(names, matrix, strict=True)):
            total = sum(counts) or 1
            # The exponent makes small shares visible.
            cells = [(count, f"{(count / total) ** 0.7:.2f}") for count in counts]
            facts["matrix"].append((str(i) if str(name) == str(i) else f"{i} {name}", cells))
    return facts


def _validation_text(run: Run) -> str:
    """The accuracies of the best and the last epoch: caption and alternative text of the curves."""
    if not run.validation:
        return "There is no validation yet."
    last = run.validation[-1]
    text = f"Validation accuracy by epoch (n = {value_at(last, 'robust.n', '?')})."
    for name, row in (("Best", run.best_row), ("Last", last)):
        scores = (read_score(row.get(key)) for key in ("natural", "robust"))
        natural, robust = (f"{score.percent:.1f} %" if score else "not measured" for score in scores)
        text += f" {name}: epoch {value_at(row, 'epoch', '?')}, natural {natural}, {run.attack} {robust}."
    return text


def _gaps(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """(label, best, last, best minus last) of each test and validation accuracy, if both have the same number of images."""
    rows = {row.checkpoint: row.scores for row in run.rows}
    both = rows.get("best = last", {})
    best_test, last_test = rows.get("best", both), rows.get("last", both)
    pairs = [(f"test, {attack_title(a)}", best_test.get(a), last_test.get(a)) for a in attack_columns(run.rows)]
    for key, label, *_ in CURVES if run.validation else ():
        label = f"validation, {label.replace('robust', run.attack).replace(CLEAN, run.clean_term)}"
        pairs.append((label, read_score(run.best_row.get(key)), read_score(run.validation[-1].get(key))))
    for label, best, last in pairs:
        if best is not None and last is not None and best.n == last.n:
            gap = f"{best.percent - last.percent:+.1f}".replace("-", "−")
            yield label, f"{best.percent:.1f}", f"{last.percent:.1f}", "0.0" if gap in ("+0.0", "−0.0") else gap


def _selection(run: Run) -> str:
    """How the best checkpoint was selected."""
    source, labels = (value_at(run.recipe, f"data.validation.{key}", "?") for key in ("source", "labels"))
    count = value_at(run.best_row, "robust.n", value_at(run.recipe, "data.validation.size", "?"))
    best = f"the best epoch has the highest {run.attack} accuracy on {count}"
    end = "the last epoch is the newest. Selection never uses test images."
    if shards := value_at(run.recipe, "data.validation.shards"):
        labels = "clean labels" if labels == "clean" else "labels as stored"
        return f"{best} images of {'/'.join(PurePath(str(shards)).parts[-2:])}, apart from the training data ({labels}); {end}"
    changed = "changed" if run.injected_blindly(source) else "wrong"
    noisy = f", including the {changed} ones" if number_at(run.noise.get(source), "num_noisy") else ""
    if source == REAL and value_at(run.recipe, "data.real.noise.kind") == UNKNOWN:
        noisy = ", which nobody has checked"
    text = f"given labels{noisy}" if labels == "given" else run.clean_term if labels == "clean" else f"{labels} labels"
    return f"{best} held-out {source} images of the training data ({text}); {end}"


def _setting(run: Run) -> str:
    """The test images and the threat of an evaluation."""
    keys = ("dataset", "folder", "num_images", "fingerprint")
    dataset, folder, count, fingerprint = (value_at(run.results, f"data.{key}", "?") for key in keys)
    step = number_at(run.results, "threat.step")
    steps = "" if step is None else f", PGD and CW steps of {fraction_text(step)}"
    data = f"{dataset} (folder {folder}, {count} images, fingerprint {str(fingerprint)[:16]})"
    return f"{data}, {threat_at(run.results)}{steps}"
