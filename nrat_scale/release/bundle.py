"""Build a release folder.

    model.safetensors   the evaluated weights (the EMA, if the run has one), byte for byte those of the checkpoint
    config.json         timm's format: architecture, model_args, mean and std of the normalisation, class names
    recipe.yaml         the resolved recipe without local paths
    data.json           fingerprints of the training data, to tell whether the model has seen some images
    results.json, .npz  accuracies of exactly these weights; outcomes per image
    curves.png          learning curves
    README.md           model card
    .eval_results/      the same accuracies in the Hub's format for leaderboards, if the data set has a repository there
    robustbench/        texts for a submission to RobustBench
    model.onnx, .pt2    with --onnx and --torch-export
    manifest.json       bytes and sha256 of every other file

The folder is staged beside its destination, loaded back, compared with the run's model and then renamed into place.
"""

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from nrat_scale import models
from nrat_scale.core import files
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import DATA, OUTCOMES, RECIPE, RESULTS, RunFolder
from nrat_scale.evaluate.results import write_arrays
from nrat_scale.loading.load import load
from nrat_scale.loading.release_folder import CONFIG, WEIGHTS
from nrat_scale.recipe import to_yaml
from nrat_scale.release.card import evaluation_results, model_card
from nrat_scale.release.contents import Contents, Publication, Weights, checkpoint_weights, gather
from nrat_scale.release.export import export_onnx, export_torch
from nrat_scale.release.robustbench import new_model_issue, robustbench_info
from nrat_scale.report.curves import draw_curves
from nrat_scale.report.run import read_run

CURVES, CARD, ONNX, EXPORTED = "curves.png", "README.md", "model.onnx", "model.pt2"
EVALUATION = ".eval_results/nrat_scale.yaml"
INFO, ISSUE = "robustbench/model_info.json", "robustbench/new_model_issue.md"
# Every file that a release can hold; no other file is ever pushed.
FILES = (
    WEIGHTS,
    CONFIG,
    RECIPE,
    DATA,
    RESULTS,
    OUTCOMES,
    CURVES,
    CARD,
    EVALUATION,
    INFO,
    ISSUE,
    ONNX,
    EXPORTED,
    files.MANIFEST,
)
EXPORTERS = {ONNX: export_onnx, EXPORTED: export_torch}


def release(
    run: Path,
    to: Path,
    checkpoint: str | Weights = "best",
    *,
    unevaluated: bool = False,
    exports: Sequence[str] = (),
    publication: Publication = Publication(),  # noqa: B008 (frozen)
    trust_code: bool = False,
) -> Path:
    """Write a release into the new folder `to`; a folder that already holds this release is kept.

    Args:
        checkpoint: `best`, `last`, or queued weights of the run.
        unevaluated: allow weights without results.
        exports: further files to write, from `EXPORTERS`.
        publication: address and licence for the card.
        trust_code: import the code of the model, if it is the user's own, also for a run outside the working directory.

    Raises:
        UserError: there is no such checkpoint, its weights have no results (unless `unevaluated`), or `to` is not empty.
    """
    weights = checkpoint_weights(run, checkpoint) if isinstance(checkpoint, str) else checkpoint
    contents = gather(run, weights, to.resolve().name, publication)
    if contents.results is None and not unevaluated:
        raise UserError(
            f"{RunFolder(run).results} has no results for the {weights.label} checkpoint. Run python -m nrat_scale.evaluate "
            f"{shlex.quote(str(run))} --data TEST_SHARDS first, or release it without results by --unevaluated."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        if _is_this(to, contents, exports):
            if (to / CARD).read_text() == _card(run, contents):
                return to
            raise UserError(
                f"{to} holds this release with another card: its address, licence or version differs. Choose another --to, "
                "or remove it; --push without --to needs no folder."
            )
        raise UserError(f"{to} exists already and is never overwritten. Choose another --to, or remove it.")
    files.make_folder(to.parent)
    staged = files.temporary_sibling(to)
    try:
        staged.mkdir()
        _write(staged, run, contents, exports, trust_code=trust_code or RunFolder(run).is_below_working_directory)
        if to.exists():
            to.rmdir()  # empty, as checked above
        os.replace(staged, to)
        files.fsync_folder(to.parent)
    except OSError as error:
        raise UserError(f"The release cannot be written to {to} ({error.strerror}).") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return to


def _is_this(folder: Path, contents: Contents, exports: Sequence[str]) -> bool:
    """Whether `folder` already holds a release with these weights, results and exports."""
    if not all((folder / name).is_file() for name in (WEIGHTS, files.MANIFEST, *exports)):
        return False
    same_weights = files.sha256_of(folder / WEIGHTS) == contents.weights.sha256
    return same_weights and RunFolder(folder).read_results() == contents.results


def _write(folder: Path, run: Path, contents: Contents, exports: Sequence[str], *, trust_code: bool) -> None:
    weights, description = contents.weights, contents.description
    shutil.copyfile(weights.path, folder / WEIGHTS)
    if files.sha256_of(folder / WEIGHTS) != weights.sha256:
        raise UserError(f"{weights.path} is damaged: it has another sha256. Choose another checkpoint.")
    name = str(description["architecture"])
    factory = models.find_factory(name, trust_code=trust_code) if models.is_own(name) else None
    model = models.create(name, dict(description["model_args"]), trust_code=trust_code).eval()
    files.write_json(folder / CONFIG, _timm_config(model, description))
    (folder / RECIPE).write_text(to_yaml(contents.recipe))
    if contents.data is not None:
        files.write_json(folder / DATA, contents.data)
    if contents.results is not None:
        files.write_json(folder / RESULTS, contents.results)
    if contents.outcomes:
        write_arrays(folder / RESULTS, contents.outcomes)
    report = read_run(run, run.name)
    if report.validation:
        (folder / CURVES).write_bytes(draw_curves(report))
    (folder / CARD).write_text(_card(run, contents))
    if results := evaluation_results(contents):
        (folder / EVALUATION).parent.mkdir()
        (folder / EVALUATION).write_text(results)
    info = robustbench_info(contents)
    (folder / INFO).parent.mkdir()
    files.write_json(folder / INFO, info)
    (folder / ISSUE).write_text(new_model_issue(contents, info))

    model.load_state_dict(load_file(weights.path))
    height, width, channels = description["image_shape"]
    x = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), load(folder, model=factory)(x)), "the release does not give the run's logits"
    for name in exports:
        EXPORTERS[name](model, x, folder / name)
    entries = {name: files.manifest_entry(folder / name) for name in FILES if (folder / name).is_file()}
    files.write_json(folder / files.MANIFEST, {"format": "nrat_scale.release", "version": 1, "files": entries})


def _card(run: Path, contents: Contents) -> str:
    return model_card(contents, CURVES if read_run(run, run.name).validation else None)


def _timm_config(model: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json for `model`, which a run's model.json describes.

    `model_args` are the arguments of the architecture as timm builds it. mean and std are in `pretrained_cfg` if a wrapper
    normalises, and timm's users normalise by them; a model that normalises by itself has them among its arguments.
    """
    known = getattr(model, "pretrained_cfg", {})
    height, width, channels = description["image_shape"]
    arguments = dict(description["model_args"])
    num_classes = arguments["num_classes"]
    layers = known.get("first_conv"), known.get("classifier")
    cfg = models.timm_cfg(*layers, (channels, height, width), num_classes)
    if isinstance(model, models.NormalisedModel):
        cfg |= {key: getattr(model, key).flatten().tolist() for key in ("mean", "std")}
        cfg |= {key: arguments.pop(key) for key in ("mean", "std") if key in arguments}
    return {
        "architecture": description["architecture"],
        "num_classes": num_classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "label_names": list(description["class_names"]),
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }
