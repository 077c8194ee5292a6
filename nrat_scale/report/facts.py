"""What a report says about a run in words: its settings, its label noise, how it was selected and tested."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from nrat_scale.attacks import fraction_text
from nrat_scale.data.audit_action import action_text
from nrat_scale.data.spec import GENERATED, REAL, batch_shares
from nrat_scale.labels import NONE, UNKNOWN, UNSET
from nrat_scale.presets import objective_title
from nrat_scale.report.details import noise_table
from nrat_scale.report.run import Run, number_at, read_score, threat_at, trained_attack, value_at

_IKL_SIGNS = {"alpha": "α", "beta": "β", "temperature": "T", "gamma": "γ"}


def run_facts(run: Run) -> dict[str, str]:
    """The settings of the training; those that are unknown, off or 0 are omitted."""

    def phrase(path: str, text: str = "{}") -> str:
        value = value_at(run.recipe, path, 0)
        return "" if value in (0, "", "off") else text.format(f"{value:.4g}" if isinstance(value, float) else value)

    attacked = value_at(run.recipe, "objective.name") != "natural"  # plain training makes no attack
    attack = trained_attack(run.recipe) if attacked else ""
    inner = phrase("objective.inner", "inner loss {}") if attacked else ""
    smoothing = phrase("objective.smoothing", "label smoothing {}")
    images, rate = phrase("data.epoch_samples", "{} images each"), phrase("optim.lr", "learning rate {}")
    name, loss, divergence = (phrase(f"objective.{key}") for key in ("name", "loss", "divergence"))
    refine, warm = phrase("objective.refine.kind"), number_at(run.recipe, "objective.warm_start") or 0.0
    title = objective_title(name, loss, divergence, warm, refine)
    weights = [phrase("objective.lam", "λ = {}")]
    if value_at(run.recipe, "objective.divergence") == "ikl":
        weights = [phrase(f"objective.ikl_{key}", f"{sign} = {{}}") for key, sign in _IKL_SIGNS.items()]
    facts = {
        "Objective": [title, *weights, inner, smoothing],
        "Model": [phrase("model.name")],
        "Threat": [threat_at(run.recipe), f"trained with {attack}" if attack else ""],
        "Label noise": list(_noise_texts(run)),
        "Label audit": list(_audit_texts(run)),
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
    rates = [rate for source in run.noise if (rate := effective_rate(run, source))]
    if rates:
        yield f"{100 * sum(rates):.1f} % of a batch's labels"


def _audit_texts(run: Run) -> Iterator[str]:
    """What the run did about labels that an audit doubted."""
    for source in (REAL, GENERATED):
        record = value_at(run.data, f"{source}.audit", {})
        counts = [number_at(record, key) for key in ("num_acted", "num_trained", "below")]
        if None not in counts and {"action", "scores_sha256"} <= record.keys():
            yield action_text(source, record)


def effective_rate(run: Run, source: str) -> float | None:
    """The fraction of a batch's labels that the noise of `source` makes wrong, None if it is unknown."""
    kinds = [kind for kind in (REAL, GENERATED) if value_at(run.recipe, f"data.{kind}.shards")]
    size, fraction = number_at(run.recipe, "data.batch_size"), number_at(run.recipe, "data.generated.fraction")
    rate = number_at(run.noise[source], "realised_rate")
    if not size or rate is None or source not in kinds or (fraction is None and len(kinds) == 2):
        return None
    return rate * batch_shares(int(size), fraction or 0.0, kinds)[source]


def noise_facts(run: Run, source: str) -> dict[str, Any] | None:
    """Label noise in numbers; the transition matrix of few classes is a table."""
    noise = run.noise[source]
    realised = number_at(noise, "realised_rate")
    if not realised:
        return None
    facts = {key: value_at(noise, key, "?") for key in ("kind", "rate", "seed", "num_labels", "num_noisy")}
    effective, table = effective_rate(run, source), noise_table(run, source)
    facts |= {"realised": f"{100 * realised:.1f}", "source": source, "table": None if table is None else table.name}
    facts["blind"] = run.injected_blindly(source)
    facts["num_classes"] = len(value_at(noise, "transition_matrix", []))
    facts["effective"] = None if effective is None else f"{100 * effective:.1f}"
    return facts


def validation_text(run: Run) -> str:
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


def selection(run: Run) -> str:
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


def setting(run: Run) -> str:
    """The test images and the threat of an evaluation."""
    keys = ("dataset", "folder", "num_images", "fingerprint")
    dataset, folder, count, fingerprint = (value_at(run.results, f"data.{key}", "?") for key in keys)
    step = number_at(run.results, "threat.step")
    steps = "" if step is None else f", PGD and CW steps of {fraction_text(step)}"
    data = f"{dataset} (folder {folder}, {count} images, fingerprint {str(fingerprint)[:16]})"
    return f"{data}, {threat_at(run.results)}{steps}"
