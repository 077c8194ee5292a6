"""Run one cell in this process: train, evaluate best and last, write cell.json. Training and evaluation resume by themselves."""

import base64
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import nrat_scale
from nrat_scale import models
from nrat_scale.attacks import threat_text
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import read_json, write_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.cost import forward_equivalents
from nrat_scale.data.shards import open_shards
from nrat_scale.data.spec import REAL
from nrat_scale.evaluate.api import Evaluation, evaluate
from nrat_scale.evaluate.measures import correct_under, read_images
from nrat_scale.evaluate.results import read_arrays
from nrat_scale.recipe import RecipeSpec, load_recipe
from nrat_scale.reproduce.cells import Place
from nrat_scale.train.api import train

# Of an attack's entry in results.json: what was done, without the model. Cells are compared if these are equal.
_SETTINGS = (
    "attack_version",
    "components",
    "norm",
    "eps",
    "space",
    "step",
    "steps",
    "restarts",
    "n",
    "seed",
    "batch_size",
)
_QUEUED_WEIGHTS = "model.safetensors"  # in a folder of `RunFolder.releases`


def run_cell(place: Place) -> dict[str, Any]:
    """Train and evaluate a cell that this process has claimed; returns the content of cell.json.

    Raises:
        UserError, FloatingPointError: see `train` and `evaluate`; cell.json then says so.
    """
    try:
        train(place.recipe)
        record = _record(place, _evaluated(place))
        write_json(place.result, record)
    except Exception as error:
        place.fail(
            str(error)
            if isinstance(error, UserError | FloatingPointError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise
    return record


def _evaluated(place: Place) -> Evaluation:
    """Best and last on the test images of the edition, with one step of PGD and CW for all of its cells."""
    edition = place.cell.edition
    step = load_recipe(edition.base).threat.step  # a method may train with another one
    images, aa_images = edition.images, edition.aa_images
    measured = partial(evaluate, place.run, edition.test_shards, step=step, images=images, aa_images=aa_images)
    if edition.last_attacks is None:
        return measured(attacks=edition.attacks)
    asked = {"best": edition.attacks, "last": edition.last_attacks}
    for label, attacks in asked.items():  # one results.json for both
        evaluation = measured(attacks=attacks, checkpoint=label)
    return replace(evaluation, labels=tuple(asked))


def _record(place: Place, evaluation: Evaluation) -> dict[str, Any]:
    """The content of cell.json."""
    run, recipe = RunFolder(place.run), place.recipe
    rows = run.read_metrics()
    validations = [row for row in rows if row.get("kind") == "validation"]
    first = next(iter(evaluation.entries.values()))
    data = {kind: entry["fingerprint"] for kind, entry in read_json(run.data, "record of the training data").items()}
    return {
        **place.facts(),
        "evaluation": {
            "attacks": list(first),
            "images": max(entry["n"] for entry in first.values()),
            "data": evaluation.results["data"]["fingerprint"],
            "threat": threat_text(recipe.threat.norm, recipe.threat.eps, recipe.threat.space),
            "keys": {name: {key: entry[key] for key in _SETTINGS if key in entry} for name, entry in first.items()},
        },
        "training_data": data,
        "results": _results(evaluation),
        "curve": _test_curve(place) if place.cell.choices.curves == "test" else [_point(row) for row in validations],
        "memorisation": [
            {"epoch": row["epoch"], "noisy_fitted": row["noisy_memorised"], "clean_fitted": row["clean_accuracy"]}
            for row in rows
            if row.get("kind") == "train" and row.get("noisy_memorised") is not None
        ],
        "noise_realised": _noise(run, recipe),
        "cost": _cost(run, recipe, rows, evaluation),
        "best_epoch": evaluation.results["checkpoints"]["best"]["epoch"],
        "flags": evaluation.flags,
        "versions": {"nrat_scale": nrat_scale.__version__, "torch": version("torch")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _results(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Checkpoint -> attack -> counts, interval, and the outcome of each image as bits in base64, in the order of the ids."""
    arrays = read_arrays(evaluation.path)
    found: dict[str, dict[str, Any]] = {}
    for label, entries in evaluation.entries.items():
        found[label] = {}
        for name, entry in entries.items():
            ids, right = arrays[f"{label}/{name}"]
            outcomes = base64.b64encode(np.packbits(right[np.argsort(ids)]).tobytes()).decode()
            found[label][name] = {key: entry[key] for key in ("correct", "n", "accuracy", "low", "high")} | {
                "outcomes": outcomes
            }
    return found


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the curve from a validation row: by the clean labels, and by those that training sees, which select."""
    clean = row["natural_clean"] is not None
    natural, robust = (row[f"{name}_clean" if clean else name]["accuracy"] for name in ("natural", "robust"))
    return {
        "epoch": row["epoch"],
        "step": row["step"],
        "natural": natural,
        row["attack"]: robust,
        "n": row["natural"]["n"],
        "split": "held-out",
        "labels": "clean" if clean else row["labels"],
        "selection": row["robust"]["accuracy"],
    }


def _test_curve(place: Place) -> list[dict[str, Any]]:
    """Natural accuracy and that under the validation attack on the test images, by epoch. Nothing is selected by it."""
    run, recipe, edition = RunFolder(place.run), place.recipe, place.cell.edition
    attack, images = recipe.train.validation_attack, read_images(open_shards(edition.test_shards), edition.images)
    description, points = run.read_model(), []
    model = models.create(str(description["architecture"]), dict(description["model_args"])).eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)
    for epoch in range(1, recipe.train.epochs + 1):
        folder = run.release(epoch)
        if not (folder / _QUEUED_WEIGHTS).is_file():
            raise UserError(
                f"{folder} is missing: without the weights of every epoch there is no curve on test images."
            )
        measured = folder / f"curve-{attack}.json"  # so that an interrupted curve goes on
        if not measured.is_file():
            model.load_state_dict(load_file(folder / _QUEUED_WEIGHTS))
            right = {name: correct_under(name, model, images, recipe.threat) for name in ("natural", attack)}
            write_json(measured, {name: float(outcome.mean()) for name, outcome in right.items()})
        step = read_json(folder / "queued.json", "description of queued weights")["step"]
        facts = {"epoch": epoch, "step": step, **read_json(measured, "point of a curve")}
        points.append({**facts, "n": len(images), "split": "test", "labels": "clean"})
    return points


def _noise(run: RunFolder, recipe: RecipeSpec) -> dict[str, float]:
    """The fraction of wrong labels among the real ones, and among those of a batch."""
    rate = float((run.read_label_noise(REAL) or {}).get("realised_rate", 0.0))
    return {"rate": rate, "effective_rate": rate * recipe.data.shares.get(REAL, 0.0)}


def _cost(run: RunFolder, recipe: RecipeSpec, rows: list[dict[str, Any]], evaluation: Evaluation) -> dict[str, Any]:
    """What the cell cost: seconds of finished epochs and validations, and of attacks, those that were repeated not counted."""
    timing = run.read_timing()
    entries: dict[str, dict[str, Any]] = {}
    for label in evaluation.labels:
        entries |= {entry["key"]: entry for entry in evaluation.entries[label].values()}
    spent = {
        (row["kind"], row["epoch"]): row["seconds"] for row in timing if row.get("kind") in ("epoch", "validation")
    }
    starts = [row for row in timing if row.get("kind") == "start"]
    facts = starts[-1] if starts else {}
    threads = f", {facts['threads']} thread(s)" if "threads" in facts else ""
    return {
        "train_seconds": round(sum(spent.values()), 2),
        "evaluate_seconds": round(sum(entry["seconds"] for entry in entries.values()), 2),
        "forward_equivalents": forward_equivalents(recipe),
        "steps": max((row["step"] for row in rows), default=0),
        "images": recipe.data.batch_size,
        "hardware": f"{facts.get('device_name', 'unknown')}{threads}",
    }
