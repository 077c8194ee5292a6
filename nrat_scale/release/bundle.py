"""The folder of a release, which loads in one line anywhere.

    model.safetensors   the evaluated weights (the EMA, if the run has one), byte for byte those of the checkpoint
    config.json         timm's format: architecture, model_args (with mean and std of the normalisation), class names
    recipe.yaml         the resolved recipe without local paths
    results.json, .npz  accuracies of exactly these weights; outcomes per image
    curves.png          learning curves
    README.md           model card
    robustbench/        texts for a submission to RobustBench
    model.onnx, .pt2    with --onnx and --torch-export
    manifest.json       bytes and sha256 of every other file

The folder is staged beside its destination, loaded back, compared with the run's model and then renamed into place.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nrat_scale import models
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import (
    fsync_folder,
    make_folder,
    manifest_entry,
    read_json,
    sha256_of,
    temporary_sibling,
    write_json,
)
from nrat_scale.core.run_folder import RECIPE, RESULTS, RunFolder
from nrat_scale.evaluate.results import read_arrays, write_arrays
from nrat_scale.loading.load import load
from nrat_scale.loading.release_folder import CONFIG, MANIFEST, WEIGHTS
from nrat_scale.recipe import to_yaml
from nrat_scale.release.card import model_card
from nrat_scale.release.contents import Contents, Weights, checkpoint_weights, gather
from nrat_scale.release.export import export_onnx, export_torch
from nrat_scale.release.robustbench import new_model_issue, robustbench_info
from nrat_scale.report.curves import draw_curves
from nrat_scale.report.run import read_run

CURVES, CARD, ONNX, EXPORTED = "curves.png", "README.md", "model.onnx", "model.pt2"
INFO, ISSUE = "robustbench/model_info.json", "robustbench/new_model_issue.md"
# Every file that a release can hold; no other file is ever pushed.
FILES = (WEIGHTS, CONFIG, RECIPE, RESULTS, "results.npz", CURVES, CARD, INFO, ISSUE, ONNX, EXPORTED, MANIFEST)


_EXPORTERS = {ONNX: export_onnx, EXPORTED: export_torch}


def release(
    run: Path,
    to: Path,
    checkpoint: str = "best",
    *,
    unevaluated: bool = False,
    onnx: bool = False,
    torch_export: bool = False,
) -> Path:
    """Write the release of a run's `checkpoint` (`best` or `last`) into the new folder `to`.

    Args:
        unevaluated: allow weights without results.
        onnx, torch_export: write these files too.

    Raises:
        UserError: there is no such checkpoint, its weights have no results (unless `unevaluated`), or `to` is not empty.
    """
    exports = [ONNX] * onnx + [EXPORTED] * torch_export
    return build_release(run, checkpoint_weights(run, checkpoint), to, unevaluated=unevaluated, exports=exports)


def build_release(
    run: Path, weights: Weights, to: Path, *, unevaluated: bool = False, exports: Sequence[str] = ()
) -> Path:
    """`release` for any weights of a run; a folder that already holds this release is kept as it is."""
    contents = gather(run, weights, to.resolve().name)
    if contents.results is None and not unevaluated:
        raise UserError(
            f"{RunFolder(run).results} has no results for the {weights.label} checkpoint. Evaluate it first with "
            f"python -m nrat_scale.evaluate {run} --data TEST_SHARDS, or release it without results by --unevaluated."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        if _is_this(to, contents, exports):
            return to
        raise UserError(f"{to} exists already and is never overwritten. Choose another --to, or remove it yourself.")
    make_folder(to.parent)
    staged = temporary_sibling(to)
    try:
        staged.mkdir()
        _write(staged, run, contents, exports)
        if to.exists():
            to.rmdir()  # empty, as checked above
        os.replace(staged, to)
        fsync_folder(to.parent)
    except OSError as error:
        raise UserError(f"The release cannot be written to {to} ({error.strerror}).") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return to


def _is_this(folder: Path, contents: Contents, exports: Sequence[str]) -> bool:
    """Whether `folder` already holds this release, unchanged."""
    if not all((folder / name).is_file() for name in (WEIGHTS, MANIFEST, *exports)):
        return False
    results = folder / RESULTS
    released = read_json(results, "results") if results.is_file() else None
    return sha256_of(folder / WEIGHTS) == contents.weights.sha256 and released == contents.results


def _write(folder: Path, run: Path, contents: Contents, exports: Sequence[str]) -> None:
    weights = contents.weights
    shutil.copyfile(weights.path, folder / WEIGHTS)
    if sha256_of(folder / WEIGHTS) != weights.sha256:
        raise UserError(
            f"{weights.path} is damaged: its sha256 is not the one saved with it. Choose another checkpoint."
        )
    write_json(folder / CONFIG, timm_config(contents.description))
    (folder / RECIPE).write_text(to_yaml(contents.recipe))
    if contents.results is not None:
        write_json(folder / RESULTS, contents.results)
        _write_outcomes(run, folder, contents)
    report = read_run(run, run.name)
    if report.validation:
        (folder / CURVES).write_bytes(draw_curves(report))
    (folder / CARD).write_text(model_card(contents))
    (folder / INFO).parent.mkdir()
    write_json(folder / INFO, robustbench_info(contents))
    (folder / ISSUE).write_text(new_model_issue(contents))
    model, x = _load_and_compare(folder, contents)
    for name in exports:
        _EXPORTERS[name](model, x, folder / name)
    files = {name: manifest_entry(folder / name) for name in FILES if (folder / name).is_file()}
    write_json(folder / MANIFEST, {"format": "nrat_scale.release", "version": 1, "files": files})


def _write_outcomes(run: Path, folder: Path, contents: Contents) -> None:
    """The outcomes per image of these weights, under their label in the release."""
    arrays = read_arrays(RunFolder(run).results)
    names = {f"{contents.weights.label}/{attack}": f"{contents.results_label}/{attack}" for attack in contents.attacks}
    if outcomes := {name: arrays[old] for name, old in names.items() if old in arrays}:
        write_arrays(folder / RESULTS, outcomes)


def timm_config(description: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json for the model that a run's model.json describes."""
    model = _create(description)
    known = getattr(model, "pretrained_cfg", {})
    height, width, channels = description["image_shape"]
    num_classes = description["model_args"]["num_classes"]
    return {
        "architecture": description["architecture"],
        "num_classes": num_classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "label_names": list(description["class_names"]),
        "model_args": dict(description["model_args"]),
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [channels, height, width],
            "fixed_input_size": False,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": [0.0] * channels,  # normalisation is inside the model
            "std": [1.0] * channels,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


def _create(description: dict[str, Any]) -> nn.Module:
    return models.create(str(description["architecture"]), dict(description["model_args"]))


def _load_and_compare(folder: Path, contents: Contents) -> tuple[nn.Module, Tensor]:
    """The released model, whose logits are bit for bit the run's, and a batch of images of the size that it takes."""
    original = _create(contents.description)
    original.load_state_dict(load_file(contents.weights.path))
    released = load(folder)
    height, width, channels = contents.description["image_shape"]
    x = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(original.eval()(x), released(x)), "the release does not give the run's logits"
    return released, x
