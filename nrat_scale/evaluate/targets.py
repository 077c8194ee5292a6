"""What can be evaluated: a run's checkpoints, a release (here or on the Hub), a file of weights, a model of timm's."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from nrat_scale import models
from nrat_scale.attacks import ThreatSpec
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.checkpoint.format import Checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json, sha256_of
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.loading.foreign import pretrained
from nrat_scale.loading.load import load
from nrat_scale.loading.release_folder import resolve
from nrat_scale.recipe import load_recipe

RESULTS = "results.json"
CHECKPOINTS = ("best", "last")
WEIGHTS = ("evaluated", "ema", "raw")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")


@dataclass(frozen=True)
class Target:
    """One set of weights to evaluate.

    Attributes:
        label: what results call it.
        model: in evaluation mode, on the CPU.
        identity: what its results say of it; `sha256` is that of the file of weights.
    """

    label: str
    model: nn.Module
    identity: dict[str, Any]


@dataclass(frozen=True)
class FoundTargets:
    """What a name on the command line stands for.

    Attributes:
        subjects: to be evaluated.
        threat: that they were trained for, where that is known.
        results: where results are written unless the user says otherwise.
        run: the run directory, if it is one.
    """

    subjects: list[Target]
    threat: ThreatSpec | None
    results: Path
    run: Path | None = None


@dataclass(frozen=True)
class TargetOptions:
    """How to read what the name alone does not say.

    Attributes:
        checkpoints: of a run, from `CHECKPOINTS`.
        weights: of a run, from `WEIGHTS`; `evaluated` are the EMA's where there is one.
        arch: of a file of weights, a name that timm knows.
        mean, std: normalisation of a file of weights.
    """

    checkpoints: Sequence[str] = CHECKPOINTS
    weights: Sequence[str] = ("evaluated",)
    arch: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def find_targets(what: str, options: TargetOptions) -> FoundTargets:
    """The subjects that `what` names.

    Raises:
        UserError: nothing of that name, an option that does not fit it, or weights that do not fit their architecture.
    """
    path = Path(what)
    if options.arch is None and (options.mean or options.std):
        raise UserError("--mean and --std describe a file of weights; they need --arch, such as --arch wrn28_10_silu.")
    if path.is_file():
        return _file(path, options)
    if options.arch is not None:
        raise UserError(f"--arch is for a file of weights, and {what} is none.")
    if is_run(path):
        return _run(path, options)
    if path.is_dir():
        return _release(what)
    if path.suffix in _FILES:
        raise UserError(f"There is no file {what}.")
    if "/" not in what and timm.is_model(what):
        return _zoo(what)
    if "/" not in what:
        raise UserError(
            f"There is no {what} here, and timm knows no model of that name. Give a run directory, a release folder, "
            "user/repo on the Hub, a file of weights with --arch, or one of timm's models."
        )
    return _release(what)


# ---- runs -----------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run directory (and not a release)."""
    return (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir()


def run_model(run: Path, checkpoint: Checkpoint, weights: str | None = None) -> nn.Module:
    """A model with the `weights` (`ema` or `model`; by default the evaluated ones) of a run's checkpoint, in evaluation
    mode."""
    description = read_json(run / "model.json", "description of the model")
    model = models.create(str(description["architecture"]), dict(description["model_args"]))
    try:
        model.load_state_dict(checkpoint.tensors(weights or checkpoint.evaluated))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint.folder} does not fit the model of {run / 'model.json'}: {error}") from error
    return model.eval()


def skipped_shards(run: Path) -> list[dict[str, Any]]:
    """The shards that a run did without (`data.on_bad_shard: skip`): source, name, number of images, reason."""
    return RunFolder(run).read_skipped_shards()


def run_subjects(run: Path, names: Sequence[str], weights: Sequence[str] = ("evaluated",)) -> list[Target]:
    """The named checkpoints of a run, each with each of `weights`; what has the same tensors is loaded once.

    Labels are `best` and `last` for the evaluated weights, else `best-ema`, `best-raw` and so on.
    """
    known: dict[tuple[int, str], Target] = {}
    subjects = []
    for name in names:
        checkpoint = named_checkpoint(run, name)
        for choice in weights:
            label = name if choice == "evaluated" else f"{name}-{choice}"
            file = {"evaluated": checkpoint.evaluated, "ema": "ema", "raw": "model"}[choice]
            if f"{file}.safetensors" not in checkpoint.sha256:
                raise UserError(f"The run {run} trained without an EMA (ema.decay). Leave ema out of --weights.")
            if (checkpoint.step, file) not in known:
                identity = {
                    "step": checkpoint.step,
                    "epoch": checkpoint.state["epoch"],
                    "weights": "ema" if file == "ema" else "raw",
                    "sha256": checkpoint.sha256[f"{file}.safetensors"],
                    "skipped_shards": skipped_shards(run),
                }
                known[checkpoint.step, file] = Target(label, run_model(run, checkpoint, file), identity)
            subjects.append(replace(known[checkpoint.step, file], label=label))
    return subjects


def _run(run: Path, options: TargetOptions) -> FoundTargets:
    for given, choices, option in (
        (options.checkpoints, CHECKPOINTS, "checkpoint"),
        (options.weights, WEIGHTS, "weights"),
    ):
        if unknown := sorted(set(given) - set(choices)):
            raise UserError(f"--{option} names '{unknown[0]}'; a run has {', '.join(choices[:-1])} and {choices[-1]}.")
    threat = load_recipe(run / "recipe.yaml").threat
    return FoundTargets(run_subjects(run, options.checkpoints, options.weights), threat, run / RESULTS, run)


# ---- everything else ------------------------------------------------------------------------------------------------


def _release(source: str) -> FoundTargets:
    folder = resolve(source)
    recipe = folder / "recipe.yaml"
    threat = load_recipe(recipe).threat if recipe.is_file() else None
    identity: dict[str, Any] = {"sha256": sha256_of(folder / "model.safetensors"), "weights": "released"}
    if not Path(source).is_dir():
        identity |= {"repo": source.partition("@")[0], "commit": folder.name}
    return FoundTargets([Target("release", load(folder), identity)], threat, _beside(source))


def _file(path: Path, options: TargetOptions) -> FoundTargets:
    if options.arch is None:
        raise UserError(f"{path} is a file of weights: say of which model with --arch, such as --arch wrn28_10_silu.")
    model = load(path, arch=options.arch, mean=options.mean, std=options.std)
    identity = {"sha256": sha256_of(path), "weights": "file", "file": path.name, "architecture": options.arch}
    return FoundTargets([Target("file", model, identity)], None, _beside(path.stem))


def _zoo(name: str) -> FoundTargets:
    model = pretrained(name)
    digest = hashlib.sha256()  # timm does not say which file it read
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    identity = {"sha256": digest.hexdigest(), "weights": "pretrained", "architecture": name}
    return FoundTargets([Target("pretrained", model, identity)], None, _beside(name))


def _beside(name: str) -> Path:
    """Where results of something that is no run go: a folder of their own."""
    return Path("evaluations") / re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") / RESULTS
