"""A folder that loads in one line anywhere: `python -m nrat_scale.release RUN --to FOLDER`.

    model.safetensors   the evaluated weights (the EMA where there is one), byte for byte those of the checkpoint
    config.json         timm's format: architecture, model_args (mean and std of the normalisation inside), class names
    recipe.yaml         what was trained, without local paths
    results.json        the robustness of exactly these weights
    README.md           model card

It is staged beside FOLDER, loaded back, compared with the run's model, and only then renamed into place.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

import torch

import nrat_scale
from nrat_scale import models
from nrat_scale.checkpoint import Checkpoint, named_checkpoint
from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import fsync_folder, make_folder, read_json, sha256_of, temporary_sibling, write_json
from nrat_scale.loading import load
from nrat_scale.recipe import RecipeSpec, load_recipe, to_yaml
from nrat_scale.report import markdown_table
from nrat_scale.subjects import RESULTS, is_run, run_model, skipped_shards


@dataclass(frozen=True)
class Contents:
    """What goes into a release."""

    name: str
    checkpoint: Checkpoint
    recipe: RecipeSpec
    description: dict[str, Any]
    noise: dict[str, Any] | None
    skipped: list[dict[str, Any]]
    results: dict[str, Any] | None


def release(run: Path, to: Path, checkpoint: str = "best", *, unevaluated: bool = False) -> Path:
    """Write the release of a run's `checkpoint` (`best` or `last`) into the new folder `to`.

    Raises:
        UserError: no such checkpoint, no results for exactly these weights (unless `unevaluated`), or `to` holds
            something else already.
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run (no recipe.yaml and checkpoints). Train one first.")
    contents = _gather(run, to.resolve().name, checkpoint)
    if contents.results is None and not unevaluated:
        raise UserError(
            f"{run / RESULTS} has no results for the {checkpoint} checkpoint. Evaluate it first with "
            f"python -m nrat_scale.evaluate {run} --data TEST_SHARDS, or release it as it is with --unevaluated."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        if _is_this(to, contents):
            return to
        raise UserError(f"{to} exists already and is never overwritten. Choose another --to, or remove it yourself.")
    make_folder(to.parent)
    staged = temporary_sibling(to)
    try:
        staged.mkdir()
        _write(staged, contents)
        _check_loads(run, staged, contents.checkpoint)
        if to.exists():
            to.rmdir()  # empty, checked above
        os.replace(staged, to)
        fsync_folder(to.parent)
    except OSError as error:
        raise UserError(f"The release cannot be written to {to} ({error.strerror}).") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return to


def _gather(run: Path, name: str, which: str) -> Contents:
    checkpoint = named_checkpoint(run, which)
    recipe = load_recipe(run / "recipe.yaml")
    description = read_json(run / "model.json", "description of the model")
    noise_path, results_path = run / "label_noise.json", run / RESULTS
    noise = read_json(noise_path, "description of the label noise") if noise_path.is_file() else None
    results = None
    if results_path.is_file():
        everything = read_json(results_path, "results")
        record = everything.get("checkpoints", {}).get(which, {})
        if record.get("sha256") == checkpoint.sha256[f"{checkpoint.evaluated}.safetensors"] and record.get("attacks"):
            results = {**everything, "checkpoints": {which: record}}
    return Contents(name, checkpoint, _without_paths(recipe), description, noise, skipped_shards(run), results)


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


def _is_this(folder: Path, contents: Contents) -> bool:
    weights = folder / "model.safetensors"
    wanted = contents.checkpoint.sha256[f"{contents.checkpoint.evaluated}.safetensors"]
    if not weights.is_file() or sha256_of(weights) != wanted:
        return False
    results = folder / RESULTS
    return (read_json(results, "results") if results.is_file() else None) == contents.results


def _write(folder: Path, contents: Contents) -> None:
    checkpoint = contents.checkpoint
    shutil.copyfile(checkpoint.folder / f"{checkpoint.evaluated}.safetensors", folder / "model.safetensors")
    write_json(folder / "config.json", timm_config(contents.description))
    (folder / "recipe.yaml").write_text(to_yaml(contents.recipe))
    if contents.results is not None:
        write_json(folder / RESULTS, contents.results)
    (folder / "README.md").write_text(model_card(contents))


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


def _check_loads(run: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """What was written loads, and gives the run's logits bit for bit."""
    original, released = run_model(run, checkpoint), load(folder)
    height, width, channels = read_json(run / "model.json", "description of the model")["image_shape"]
    x = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(original(x), released(x)), "the release does not give the run's logits"


# ---- model card -----------------------------------------------------------------------------------------------------


def model_card(contents: Contents) -> str:
    """README.md of a release: Hub metadata, how to load it, its robustness, what it was trained on, its limits."""
    recipe, results = contents.recipe, contents.results
    dataset = str(contents.description["dataset"])
    sections = [
        _metadata(contents, dataset),
        f"# {contents.name}",
        f"`{contents.description['architecture']}` trained with **{recipe.objective.name}** against l_inf perturbations of "
        f"eps = {_eps(recipe.threat.eps)} on `{dataset}`, by nrat_scale {nrat_scale.__version__}.",
        *(["> **Warning.** " + _SPACE_WARNING] if recipe.threat.space != "pixel" else []),
        "```python\n"
        "import nrat_scale\n\n"
        f'model = nrat_scale.load("{contents.name}")  # [0, 1] images [B, {_shape(contents)}] -> logits\n'
        "```\n\n"
        f'After `import nrat_scale`, `timm.create_model("local-dir:{contents.name}", pretrained=True)` gives the same model. '
        "Do not normalise images: it happens inside.",
        "## Robustness",
        _robustness(results),
        "## Training",
        _training(contents),
        "## Limits",
        "Robustness was measured against the attacks and the radius named above, on the data set named above, and holds for "
        "nothing else: not for other perturbations, larger radii or images of another kind.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_SPACE_WARNING = (
    "Trained and measured with `threat.space: released_code`, which applies eps and the clamp to [0, 1] in normalised units. "
    "These numbers cannot be compared with RobustBench."
)


def _metadata(contents: Contents, dataset: str) -> str:
    lines = ["library_name: timm", "tags:", "- image-classification", "- adversarial-robustness", "- nrat_scale"]
    lines += ["pipeline_tag: image-classification", f"datasets:\n- {json.dumps(dataset)}"]
    return "---\n" + "\n".join(lines) + "\n---"


def _robustness(results: dict[str, Any] | None) -> str:
    if results is None:
        return "**Not evaluated.** This release was made without any measurement of its robustness."
    record = next(iter(results["checkpoints"].values()))
    return (
        f"{markdown_table(results)}\n\n"
        f"Test data `{results['data']['dataset']}` (fingerprint `{results['data']['fingerprint'][:16]}`), l_inf eps = "
        f"{_eps(results['threat']['eps'])}, epoch {record['epoch']}, 95 % Wilson intervals. The checkpoint was selected on "
        "held-out training images, never on the test data."
    )


def _training(contents: Contents) -> str:
    recipe, noise = contents.recipe, contents.noise
    data, threat = recipe.data, recipe.threat
    lines = [
        f"objective `{recipe.objective.name}` (lam {recipe.objective.lam:g}, inner loss {recipe.objective.inner}), "
        f"{threat.num_steps} attack steps of {_eps(threat.step)}",
        f"{recipe.train.epochs} epochs, batches of {data.batch_size}, {recipe.precision}, seed {recipe.seed}",
    ]
    if data.real.shards:
        text = f"real images: `{data.real.shards}`"
        if noise is not None:
            text += (
                f", label noise {noise['kind']} ({100 * noise['realised_rate']:.1f} % of {noise['num_labels']} labels)"
            )
        lines.append(text)
    if data.generated.shards:
        share = 100 * data.generated.fraction if data.real.shards else 100
        lines.append(f"generated images: `{data.generated.shards}`, {share:g} % of every batch")
    if contents.skipped:
        total = sum(entry["num_images"] for entry in contents.skipped)
        names = ", ".join(f"{entry['source']} `{entry['shard']}`" for entry in contents.skipped)
        lines.append(
            f"{len(contents.skipped)} shard(s) with {total} images could not be used and were skipped: {names}"
        )
    validation = data.validation
    lines.append(f"selection: {validation.size} held-out {validation.source} images, {recipe.train.validation_attack}")
    return "\n".join(f"* {line}" for line in lines) + "\n\nThe complete recipe is in `recipe.yaml`."


def _shape(contents: Contents) -> str:
    height, width, channels = contents.description["image_shape"]
    return f"{channels}, {height}, {width}"


def _eps(value: float) -> str:
    levels = value * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 and levels >= 0.5 else f"{value:g}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.release",
        description="Export a run's checkpoint as a folder that nrat_scale.load and timm load in one line.",
        epilog="Example: python -m nrat_scale.release runs/quickstart --to releases/quickstart",
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: %(default)s")
    parser.add_argument("--unevaluated", action="store_true", help="release without results; the card says so")
    arguments = parser.parse_args(argv)
    folder = release(arguments.run, arguments.to, arguments.checkpoint, unevaluated=arguments.unevaluated)
    print(f'released to {folder}; load it with:\n  import nrat_scale; model = nrat_scale.load("{folder}")')


if __name__ == "__main__":
    run_cli(main)
