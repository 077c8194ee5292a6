"""A folder that loads in one line anywhere, and its way to the Hub: `python -m nrat_scale.release RUN --to FOLDER --push user/repo`.

    model.safetensors   the evaluated weights (the EMA where there is one), byte for byte those of the checkpoint
    config.json         timm's format: architecture, model_args (mean and std of the normalisation inside), class names
    recipe.yaml         what was trained, without local paths
    results.json        the robustness of exactly these weights; results.npz: of each image
    curves.png          learning curves
    README.md           model card
    robustbench/        what RobustBench asks of a new model
    model.onnx, model.pt2   with --onnx and --torch-export
    manifest.json       bytes and sha256 of every other file

It is staged beside FOLDER, loaded back, compared with the run's model, and only then renamed into place.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file

from nrat_scale import models
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json
from nrat_scale.core.run_folder import RESULTS, RunFolder
from nrat_scale.evaluate.results import arrays_file, read_arrays, write_arrays
from nrat_scale.loading.load import load
from nrat_scale.loading.release_folder import CONFIG, MANIFEST, WEIGHTS
from nrat_scale.recipe import RecipeSpec, load_recipe, to_yaml
from nrat_scale.release.card import Contents, model_card
from nrat_scale.release.export import export_onnx, export_torch
from nrat_scale.release.robustbench import info_json, robustbench_issue
from nrat_scale.report.curves import draw_curves
from nrat_scale.report.run import read_run

CURVES, RECIPE, CARD = "curves.png", "recipe.yaml", "README.md"
ONNX, EXPORTED = "model.onnx", "model.pt2"
ROBUSTBENCH = ("robustbench/model_info.json", "robustbench/new_model_issue.md")
# Everything that a release can hold, and nothing else is ever sent.
FILES = (WEIGHTS, CONFIG, RECIPE, RESULTS, "results.npz", CURVES, CARD, *ROBUSTBENCH, ONNX, EXPORTED, MANIFEST)


@dataclass(frozen=True)
class Weights:
    """The weights to release: a file whose sha256 is known, and what of the run it is.

    Attributes:
        label: `best`, `last` or `epoch-NNNN`.
        kind: `ema` or `model`.
    """

    label: str
    path: Path
    sha256: str
    kind: str
    step: int
    epoch: int


@dataclass(frozen=True)
class Options:
    """What else is wanted of a release."""

    unevaluated: bool = False
    onnx: bool = False
    torch_export: bool = False


def release(run: Path, to: Path, checkpoint: str = "best", *, unevaluated: bool = False, **exports: bool) -> Path:
    """Write the release of a run's `checkpoint` (`best` or `last`) into the new folder `to`.

    Args:
        exports: `onnx`, `torch_export`: write these files too.

    Raises:
        UserError: no such checkpoint, no results for exactly these weights (unless `unevaluated`), or `to` holds
            something else already.
    """
    require_run(run)
    return build_release(run, checkpoint_weights(run, checkpoint), to, Options(unevaluated, **exports))


def require_run(run: Path) -> None:
    if not RunFolder(run).is_run:
        raise UserError(f"{run} is not a run (no recipe.yaml and checkpoints). Train one first.")


def checkpoint_weights(run: Path, name: str) -> Weights:
    checkpoint = named_checkpoint(run, name)
    kind = checkpoint.evaluated
    file = f"{kind}.safetensors"
    epoch = int(checkpoint.state["epoch"])
    return Weights(name, checkpoint.folder / file, checkpoint.sha256[file], kind, checkpoint.step, epoch)


def build_release(run: Path, weights: Weights, to: Path, options: Options) -> Path:
    contents = _gather(run, to.resolve().name, weights)
    if contents.results is None and not options.unevaluated:
        raise UserError(
            f"{run / RESULTS} has no results for the {weights.label} checkpoint. Evaluate it first with "
            f"python -m nrat_scale.evaluate {run} --data TEST_SHARDS, or release it as it is with --unevaluated."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        if _is_this(to, contents, options):
            return to
        raise UserError(f"{to} exists already and is never overwritten. Choose another --to, or remove it yourself.")
    make_folder(to.parent)
    staged = temporary_sibling(to)
    try:
        staged.mkdir()
        _write(staged, run, contents, weights, options)
        if to.exists():
            to.rmdir()  # empty, checked above
        os.replace(staged, to)
        fsync_folder(to.parent)
    except OSError as error:
        raise UserError(f"The release cannot be written to {to} ({error.strerror}).") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return to


def _gather(run: Path, name: str, weights: Weights) -> Contents:
    recipe = load_recipe(run / "recipe.yaml")
    description = read_json(run / "model.json", "description of the model")
    noise_path, results_path = run / "label_noise.json", run / RESULTS
    noise = read_json(noise_path, "description of the label noise") if noise_path.is_file() else None
    results = None
    if results_path.is_file():
        everything = read_json(results_path, "results")
        for record in everything.get("checkpoints", {}).values():
            if record.get("sha256") == weights.sha256 and record.get("attacks"):
                results = {**everything, "checkpoints": {weights.label: record}}
    return Contents(
        name, weights.epoch, weights.step, weights.kind, weights.sha256, _without_paths(recipe), description, noise,
        RunFolder(run).read_skipped_shards(), results,
    )  # fmt: skip


def _without_paths(recipe: RecipeSpec) -> RecipeSpec:
    """The recipe with nobody's folders and passwords in it: of an absolute path only the last name is kept, of an address
    neither user nor query."""

    def shown(path: str | None) -> str | None:
        if path and "://" in path:
            parts = urlsplit(path)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return PurePath(path).name if path and PurePath(path).is_absolute() else path

    real, generated = recipe.data.real, recipe.data.generated
    noise = replace(real.noise, human_labels=shown(real.noise.human_labels))
    data = replace(
        recipe.data,
        real=replace(real, shards=shown(real.shards), exclude=shown(real.exclude), noise=noise, prepare=None),
        generated=replace(generated, shards=shown(generated.shards), exclude=shown(generated.exclude), prepare=None),
        remote=replace(recipe.data.remote, cache=None),
    )
    return replace(recipe, data=data, run_dir=f"runs/{recipe.name}")


def _is_this(folder: Path, contents: Contents, options: Options) -> bool:
    """Whether `folder` is this very release already, untouched."""
    if not (folder / MANIFEST).is_file() or not (folder / WEIGHTS).is_file():
        return False
    wanted = [name for name, asked in ((ONNX, options.onnx), (EXPORTED, options.torch_export)) if asked]
    if sha256_of(folder / WEIGHTS) != contents.sha256 or not all((folder / name).is_file() for name in wanted):
        return False
    results = folder / RESULTS
    return (read_json(results, "results") if results.is_file() else None) == contents.results


def _write(folder: Path, run: Path, contents: Contents, weights: Weights, options: Options) -> None:
    shutil.copyfile(weights.path, folder / WEIGHTS)
    if sha256_of(folder / WEIGHTS) != weights.sha256:
        raise UserError(
            f"{weights.path} is damaged: its sha256 is not the one that was saved. Choose another checkpoint."
        )
    write_json(folder / CONFIG, timm_config(contents.description))
    (folder / RECIPE).write_text(to_yaml(contents.recipe))
    if contents.results is not None:
        write_json(folder / RESULTS, contents.results)
        _write_outcomes(run, folder, contents, weights.label)
    report = read_run(run, run.name)
    if report.validation:
        (folder / CURVES).write_bytes(draw_curves(report))
    (folder / CARD).write_text(model_card(contents))
    (folder / ROBUSTBENCH[0]).parent.mkdir()
    (folder / ROBUSTBENCH[0]).write_text(info_json(contents))
    (folder / ROBUSTBENCH[1]).write_text(robustbench_issue(contents))
    model, x = _check_loads(run, folder, weights)
    if options.onnx:
        export_onnx(model, x, folder / ONNX)
    if options.torch_export:
        export_torch(model, x, folder / EXPORTED)
    files = [name for name in FILES if (folder / name).is_file()]
    facts = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in files}
    write_json(folder / MANIFEST, {"format": "nrat_scale.release", "version": 1, "files": facts})


def _write_outcomes(run: Path, folder: Path, contents: Contents, label: str) -> None:
    """The per-image outcomes of these weights, under the label of the release."""
    if not arrays_file(run / RESULTS).is_file():
        return
    arrays = read_arrays(run / RESULTS)
    everything = read_json(run / RESULTS, "results")["checkpoints"]
    own = next(name for name, record in everything.items() if record.get("sha256") == contents.sha256)
    chosen = {f"{label}/{attack}": arrays.get(f"{own}/{attack}") for attack in contents.record["attacks"]}
    write_arrays(folder / RESULTS, {name: outcome for name, outcome in chosen.items() if outcome is not None})


def timm_config(description: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json for the model that a run's model.json describes."""
    arguments = dict(description["model_args"])
    height, width, channels = description["image_shape"]
    model = models.create(str(description["architecture"]), arguments)
    known = getattr(model, "pretrained_cfg", {})
    return {
        "architecture": description["architecture"],
        "num_classes": arguments["num_classes"],
        "num_features": int(getattr(model, "num_features", 0)),
        "label_names": list(description["class_names"]),
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": arguments["num_classes"],
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


def _check_loads(run: Path, folder: Path, weights: Weights) -> tuple[torch.nn.Module, torch.Tensor]:
    """What was written loads, and gives the run's logits bit for bit; the model, and images like those it takes."""
    description = read_json(run / "model.json", "description of the model")
    original = models.create(str(description["architecture"]), dict(description["model_args"]))
    original.load_state_dict(load_file(weights.path))
    released = load(folder)
    height, width, channels = description["image_shape"]
    x = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(original.eval()(x), released(x)), "the release does not give the run's logits"
    return released, x
