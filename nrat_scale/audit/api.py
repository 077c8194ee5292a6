"""`audit` for Python and for the command line."""

import datetime
import hashlib
import importlib.util
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

import nrat_scale
from nrat_scale.audit.audited_labels import AuditedLabels, audited_labels, parse_noise, recipe_noise
from nrat_scale.audit.content import (
    Audited,
    Estimates,
    calibration_record,
    correction_record,
    estimate,
    estimate_record,
    injected_record,
    overlapping_classes,
    truth_record,
)
from nrat_scale.audit.correction import REPLICATES, transition
from nrat_scale.audit.folds import Folds, check_classes, class_counts, fold_recipe, write_excluded
from nrat_scale.audit.hold_out import check_hold_out
from nrat_scale.audit.page import AUDIT, FORMAT, VERSION, write_page
from nrat_scale.audit.predictors import Predictors, fold_models, outside_model, train_folds
from nrat_scale.audit.probabilities import Probabilities
from nrat_scale.audit.scores import score_labels, smoothed
from nrat_scale.audit.text import audit_text, notes
from nrat_scale.core.distributed import join_processes, known_to_all, on_main, use_all_cores
from nrat_scale.core.errors import UserError, check_value
from nrat_scale.core.files import make_folder, read_json, write_json
from nrat_scale.core.float32 import use_float32
from nrat_scale.data.audit_scores import FOLDER
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.labels import NoiseSpec
from nrat_scale.recipe import RecipeSpec, load_recipe

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Audit:
    """What `audit` returns; printed, it is the summary of the command line."""

    path: Path  # the folder, with audit.json and the sidecar `scores/`
    content: dict[str, Any]  # of audit.json

    @property
    def rate(self) -> float:
        """The estimated share of wrong labels: the corrected one, or without it the plain one."""
        return float(self._best["rate"])

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `rate`."""
        low, high = self._best["interval"]
        return float(low), float(high)

    @property
    def _best(self) -> dict[str, Any]:
        corrected = self.content["corrected"]
        return corrected if corrected is not None and corrected["identified"] else self.content["plain"]

    def __str__(self) -> str:
        return audit_text(self.content)


@dataclass(frozen=True)
class _Sources:
    """The predictions' source: folds and their recipe, or a model that never saw the images."""

    folds: Folds
    recipe: RecipeSpec | None
    model: str | None
    unseen: bool
    checkpoint: str


def audit(
    data: str | Path,
    *,
    model: str | Path | None = None,
    folds: int | None = None,
    recipe: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    clean_holdout: str | Path | None = None,
    noise: str | NoiseSpec | None = None,
    out: str | Path | None = None,
    unseen: bool = False,
    checkpoint: str = "best",
    batch_size: int = 512,
    bootstrap: int = REPLICATES,
    seed: int = 0,
) -> Audit:
    """Estimate how many labels of `data` are wrong and which; write audit.json and the sidecar. The same call resumes an audit.

    Args:
        data: folder or address of shards.
        model: a run directory, a release folder or a release on the Hub that never saw `data`; instead of `folds`.
        folds: train so many models, each on the images outside its fold; 5 unless `model` is given.
        recipe, overrides: of the folds; by default natural training of a small CNN. Its label noise is injected, too.
        clean_holdout: shards whose labels are right; with them the estimate is without the classifier's errors.
        noise: `KIND:RATE:SEED`, injected first, as training would.
        out: the folder; by default SHARDS-audit beside the shards, with the noise in its name.
        unseen: no record says what `model` was trained on, or which; the user knows that it never saw `data`.
        checkpoint: of a run as `model`, `best` or `last`.
        batch_size: images in one forward pass.
        bootstrap: replicates of the bootstrap.
        seed: of the folds and of the bootstrap; the recipe's seed is its own.

    Raises:
        UserError: an option or the data do not fit, `out` holds another audit, or the disk is full.
        FloatingPointError: a model's logits, or a step of training, are not finite.
    """
    _check_options(model, folds, recipe, overrides, batch_size, bootstrap, seed)
    state = join_processes()
    if state.device.type == "cpu":
        use_all_cores()
    use_float32("ieee")
    shards = open_shards(data, "the audited data")
    on_main(state, shards.verify)
    labels = audited_labels(shards, str(data), _noise(noise, recipe, overrides, str(data)))
    assignment = Folds(shards, 1 if model is not None else folds or 5, seed)
    counts = class_counts(labels, assignment)
    check_classes(counts, shards)
    hold_out = None if clean_holdout is None else _open_hold_out(state, clean_holdout, shards)
    spec = (
        None if model is not None else fold_recipe(None if recipe is None else Path(recipe), overrides, labels, counts)
    )
    sources = _Sources(assignment, spec, None if model is None else str(model), unseen, checkpoint)
    folder = Path(out) if out is not None else _default_folder(labels)
    audited, facts, key = _predict(state, folder, labels, sources, hold_out, batch_size)
    method = _method(sources, recipe, facts, hold_out, bootstrap)
    content = known_to_all(state, lambda: _write(folder, audited, method, key))
    return Audit(folder, content)


def _check_options(
    model: str | Path | None,
    folds: int | None,
    recipe: str | Path | None,
    overrides: Sequence[str] | Mapping[str, Any],
    batch_size: int,
    bootstrap: int,
    seed: int,
) -> None:
    if importlib.util.find_spec("cleanlab") is None:
        raise UserError("The audit needs cleanlab. Install it with: pip install 'nrat-scale[audit]'")
    if model is not None and (folds is not None or recipe is not None or overrides):
        raise UserError("--model predicts itself; --folds, --recipe and overrides train models. Give one of the two.")
    if overrides and recipe is None and isinstance(overrides, str):
        raise UserError("Overrides are a list of key=value, or a mapping.")
    check_value("--folds", folds, folds is None or folds >= 2, "at least 2")
    check_value("--batch-size", batch_size, batch_size >= 1, "at least 1")
    check_value("--bootstrap", bootstrap, bootstrap >= 100, "at least 100 replicates, for a 95 % interval")
    check_value("--seed", seed, seed >= 0, "0 or more")


def _noise(noise: str | NoiseSpec | None, recipe: str | Path | None, overrides: Any, data: str) -> NoiseSpec:
    if isinstance(noise, NoiseSpec):
        return noise
    if noise is not None:
        return parse_noise(noise)
    return NoiseSpec() if recipe is None else recipe_noise(load_recipe(recipe, overrides), data)


def _open_hold_out(state: PartialState, clean_holdout: str | Path, shards: ShardSet) -> ShardSet:
    """The clean hold-out, which is complete and fits the audited data; raises `UserError` otherwise."""
    hold_out = open_shards(clean_holdout, "--clean-holdout")
    on_main(state, hold_out.verify)
    on_main(state, lambda: check_hold_out(hold_out, shards))
    return hold_out


def _method(
    sources: _Sources,
    recipe: str | Path | None,
    facts: list[dict[str, Any]],
    hold_out: ShardSet | None,
    bootstrap: int,
) -> dict[str, Any]:
    """The section `method` of audit.json: the folds or the model, the hold-out and the bootstrap."""
    spec = sources.recipe
    return {
        "folds": None if spec is None else sources.folds.number,
        "recipe": None if spec is None else str(recipe or "the built-in folds.yaml"),
        "recipe_identity": None if spec is None else spec.identity,
        "models": facts,
        "holdout": None if hold_out is None else _described(hold_out),
        "bootstrap": bootstrap,
        "seed": sources.folds.seed,
    }


def _default_folder(labels: AuditedLabels) -> Path:
    """Beside local shards, named after the noise; of an address below `audits`."""
    folder = str(labels.shards.folder).rstrip("/")
    noise = labels.description
    suffix = "-audit" if noise is None else f"-audit-{noise['kind']}-{noise['rate']:g}-{noise['seed']}"
    if labels.shards.is_remote:
        return Path("audits") / (re.sub(r"[^A-Za-z0-9._-]+", "-", folder.partition("://")[2]).strip("-.") + suffix)
    return Path(folder).with_name(Path(folder).resolve().name + suffix)


def _described(shards: ShardSet) -> dict[str, Any]:
    return {"shards": str(shards.folder), "fingerprint": shards.fingerprint, "num_images": len(shards)}


def _predict(
    state: PartialState,
    folder: Path,
    labels: AuditedLabels,
    sources: _Sources,
    hold_out: ShardSet | None,
    batch_size: int,
) -> tuple[Audited, list[dict[str, Any]], str]:
    """The probabilities of all images, the models' facts, and the key of the audit; on every process."""
    shards, folds = labels.shards, sources.folds
    outside: Predictors | None = None
    if sources.model is not None:
        outside = outside_model(
            sources.model, shards, hold_out, state.device, unseen=sources.unseen, checkpoint=sources.checkpoint
        )
    settings = _settings(labels, sources, outside)
    on_main(state, lambda: _claim(folder, settings))
    if outside is None:
        assert sources.recipe is not None, "without a model, folds are trained"
        predictors = _trained(state, folder / "folds", folds, sources.recipe)
    else:
        predictors = outside
    process, progress = (state.process_index, state.num_processes), _progress(state, "images")
    data = Probabilities(folder / "probabilities", shards, 1)
    data.predict(predictors.models, folds.of, process, batch_size, progress)
    probabilities = None
    if hold_out is not None:
        name = f"holdout-{hold_out.fingerprint[:16]}"
        probabilities = Probabilities(folder / name, hold_out, len(predictors.models))
        probabilities.predict(predictors.models, None, process, batch_size)
    state.wait_for_everyone()
    bound = {**settings, "models": predictors.sha256, "holdout": hold_out and hold_out.fingerprint}
    key = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()[:16]
    return Audited(labels, folds, data, probabilities), predictors.facts, key


def _trained(state: PartialState, folder: Path, folds: Folds, recipe: RecipeSpec) -> Predictors:
    """The models of the folds, which are trained or resumed first."""
    excluded = known_to_all(state, lambda: write_excluded(folder, folds))
    train_folds(folder, folds, recipe, excluded)
    use_float32("ieee")  # training may use TF32
    return fold_models(folder, folds, recipe, state.device)


def _settings(labels: AuditedLabels, sources: _Sources, outside: Predictors | None) -> dict[str, Any]:
    """What the files of an audit depend on."""
    return {
        "data": labels.shards.fingerprint,
        "noise": labels.description,
        "folds": None if outside is not None else sources.folds.number,
        "seed": sources.folds.seed,
        "model": None if outside is None else outside.sha256,
        "recipe": None if sources.recipe is None else sources.recipe.identity,
    }


_OTHER = {
    "data": "other shards",
    "noise": "other noise",
    "folds": "another number of folds",
    "seed": "another seed",
    "model": "other weights of the model",
    "recipe": "another recipe of the folds",
}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or check that it holds the work of these settings; raises `UserError` otherwise."""
    path = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Choose another folder with --out.")
    if path.is_file():
        make_folder(folder)  # exists; refuses a read-only one before hours of work
        stored = read_json(path, "settings of the audit")
        differing = [name for name in settings if stored.get(name) != json.loads(json.dumps(settings[name]))]
        if differing:
            raise UserError(
                f"{folder} holds an audit with {_OTHER[differing[0]]}. Choose another folder with --out, or remove that one."
            )
        for left in (path for pattern in ("probabilities", "holdout-*") for path in folder.glob(f"{pattern}/.*.tmp")):
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no audit; nothing in it was touched. Choose another --out.")
    make_folder(folder)
    write_json(path, settings)


def _progress(state: PartialState, what: str) -> Any:
    def show(number: int) -> None:
        if state.is_main_process:
            print(f"predicted the {what} of shard {number}", flush=True)

    return show


def _write(folder: Path, audited: Audited, method: dict[str, Any], key: str) -> dict[str, Any]:
    """Estimate, write the sidecar and audit.json (last), and return its content."""
    labels, shards = audited.labels, audited.shards
    found = estimate(audited, method["seed"], method["bootstrap"])
    rate = min(max(found.best.rate, 0.0), 1.0)
    matrix = smoothed(transition(found.best.joint), rate)
    facts = {"noise": labels.description, "models": method["models"], "audit": key}
    (folder / AUDIT).unlink(missing_ok=True)  # of an earlier run: it would not fit the new scores
    suspects = score_labels(folder, shards, audited.chunks, matrix, rate, facts)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "audit": key,
        "data": {
            **_described(shards),
            "dataset": shards.dataset,
            "class_names": list(shards.class_names),
            "class_counts": found.statistics.thresholds.labels.tolist(),
        },
        "noise": labels.description,
        "injected": injected_record(labels),
        "method": method,
        "plain": {**estimate_record(found.plain), "includes_model_errors": True},
        "corrected": None if found.correction is None else correction_record(found.correction),
        "overlapping": overlapping_classes(found.best.joint, len(shards)),
        "suspects": suspects.record(),
        "accuracy": _accuracy(found),
        "calibration": calibration_record(found),
        "shift": found.shift,
        "measured_truth": truth_record(labels, folder / FOLDER),
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
    }
    content["notes"] = notes(content)
    write_page(folder, content, shards)
    write_json(folder / AUDIT, content)
    return content


def _accuracy(found: Estimates) -> dict[str, float | None]:
    counts = found.statistics.counts
    weights = counts.sum(axis=(1, 2)) / counts.sum()
    agreeing = counts.sum(axis=0).diagonal().sum() / counts.sum()
    hold_out = None if found.hold_out is None else found.hold_out.predictions.accuracy(weights)
    return {"agreement": float(agreeing), "holdout": hold_out}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "timm", "numpy", "cleanlab")}
    return {"nrat_scale": nrat_scale.__version__, "python": platform.python_version(), **packages}
