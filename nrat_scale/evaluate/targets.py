"""What can be evaluated: checkpoints of a run, a release (a folder or on the Hub), a weight file, a timm model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from nrat_scale import models
from nrat_scale.attacks import ThreatSpec, evaluation_threat
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of
from nrat_scale.core.run_folder import RECIPE, RESULTS, RunFolder
from nrat_scale.evaluate.key import ModelKey, model_key
from nrat_scale.loading.checks import read_configuration
from nrat_scale.loading.foreign import pretrained
from nrat_scale.loading.load import load
from nrat_scale.loading.release_folder import CONFIG, WEIGHT_FILES, WEIGHTS, resolve
from nrat_scale.recipe import load_recipe

CHECKPOINTS = ("best", "last")
WEIGHT_CHOICES = ("evaluated", "ema", "raw")


@dataclass(frozen=True)
class Target:
    """One set of weights to evaluate."""

    label: str  # its name in results.json
    model: nn.Module  # in evaluation mode, on the CPU
    identity: dict[str, Any]  # its facts in results.json; "sha256" is that of the weight file
    key: ModelKey


@dataclass(frozen=True)
class FoundTargets:
    """The targets behind a name on the command line."""

    targets: list[Target]
    threat: ThreatSpec | None  # for which they were trained, if known
    results: Path  # default results file
    run: RunFolder | None = None
    earlier: Path | None = None  # default of earlier versions, if another


@dataclass(frozen=True)
class TargetOptions:
    """Which weights of a run to evaluate, and how to build the model of a weight file.

    Raises:
        UserError: an unknown choice, or a normalisation without `arch`.
    """

    checkpoints: Sequence[str] = CHECKPOINTS  # of a run
    # Of a run, from WEIGHT_CHOICES; `evaluated`: the EMA if there is one, else raw.
    weights: Sequence[str] = ("evaluated",)
    arch: str | None = None  # of a weight file: a name known to timm; or package.module:factory, also of a release
    mean: Sequence[float] | None = None  # normalisation of a weight file
    std: Sequence[float] | None = None
    weights_key: str | None = None  # of a weight file with several sets of weights
    trust_code: bool = False  # import the code of a run that is not under the working directory
    arch_args: Mapping[str, Any] = field(default_factory=dict)  # further arguments of `arch`, such as width

    def __post_init__(self) -> None:
        checkpoint, weights = (self.checkpoints, CHECKPOINTS), (self.weights, WEIGHT_CHOICES)
        for option, (given, choices) in {"checkpoint": checkpoint, "weights": weights}.items():
            if unknown := sorted(set(given) - set(choices)):
                raise UserError(f"--{option} names '{unknown[0]}'; expected {', '.join(choices)}.")
        if self.arch is None and (self.mean or self.std or self.weights_key is not None or self.arch_args):
            options = "--mean, --std, --arch-args and --weights-key"
            raise UserError(f"{options} describe a weight file; they need --arch, such as --arch wrn28_10_silu.")


def find_targets(what: str, options: TargetOptions) -> FoundTargets:
    """The targets that `what` names.

    Raises:
        UserError: there is nothing of that name, an option does not apply to it, or its weights do not fit its architecture.
    """
    path = Path(what)
    run = RunFolder(path)
    if path.is_file():
        return _weight_file(path, options)
    if options.arch is not None and (run.is_run or not models.is_own(options.arch)):
        raise UserError(f"--arch needs a weight file; {what} is not a file.")
    if run.is_run:
        recipe = load_recipe(run.recipe, run_code=False)
        return FoundTargets(
            _run_targets(run, options, recipe.objective.title), evaluation_threat(recipe.threat), run.results, run
        )
    if path.is_dir() or ("/" in what and path.suffix not in WEIGHT_FILES):
        return _release(what, options.arch)
    if path.suffix in WEIGHT_FILES:
        raise UserError(f"There is no file {what}.")
    if options.arch is None and timm.is_model(what):
        return _timm_model(what)
    choices = "a run directory, a release folder, user/repo on the Hub, a weight file with --arch, or a timm model"
    raise UserError(f"There is no {what} here, and timm has no model of that name. Give {choices}.")


def _run_targets(run: RunFolder, options: TargetOptions, objective: str) -> list[Target]:
    """Each checkpoint with each choice of weights, labelled `best`, `best-ema`, ...; equal weights are loaded once."""
    description, skipped = run.read_model(), run.read_skipped_shards()
    loaded: dict[tuple[int, str], Target] = {}
    targets = []
    for name in options.checkpoints:
        checkpoint = named_checkpoint(run.path, name)
        for choice in options.weights:
            kind = {"evaluated": checkpoint.evaluated, "ema": "ema", "raw": "model"}[choice]
            if f"{kind}.safetensors" not in checkpoint.sha256:
                raise UserError(f"The run {run.path} trained without an EMA (ema.decay). Drop ema from --weights.")
            if (checkpoint.step, kind) not in loaded:
                identity = {
                    "step": checkpoint.step,
                    "epoch": checkpoint.state["epoch"],
                    "weights": "ema" if kind == "ema" else "raw",
                    "objective": objective,
                    "sha256": checkpoint.sha256[f"{kind}.safetensors"],
                    "skipped_shards": skipped,
                }
                architecture, arguments = str(description["architecture"]), dict(description["model_args"])
                trust = options.trust_code or run.is_below_working_directory
                model = models.create(architecture, arguments, trust_code=trust).eval()
                try:
                    model.load_state_dict(checkpoint.tensors(kind))
                except (RuntimeError, SafetensorError) as error:
                    raise UserError(f"{checkpoint.folder} does not fit the model of {run.model}: {error}") from error
                key = model_key(model, architecture, arguments)
                loaded[checkpoint.step, kind] = Target(name, model, identity, key)
            label = name if choice == "evaluated" else f"{name}-{choice}"
            targets.append(replace(loaded[checkpoint.step, kind], label=label))
    return targets


def _release(source: str, arch: str | None) -> FoundTargets:
    factory = None if arch is None else models.find_factory(arch, trust_code=True)  # the user has named the code
    folder = resolve(source)
    recipe = folder / RECIPE
    trained = load_recipe(recipe, run_code=False) if recipe.is_file() else None
    identity: dict[str, Any] = {"sha256": sha256_of(folder / WEIGHTS), "weights": "released"}
    identity |= {"objective": trained.objective.title} if trained else {}
    if not Path(source).is_dir():
        identity |= {"repo": source.partition("@")[0], "commit": folder.name}
    model = load(folder, model=factory)
    target = Target("release", model, identity, model_key(model, *read_configuration(folder / CONFIG)[:2]))
    return _found(source, evaluation_threat(trained.threat) if trained else None, target)


def _weight_file(path: Path, options: TargetOptions) -> FoundTargets:
    if options.arch is None:
        raise UserError(f"{path} is a weight file: name its model with --arch, such as --arch wrn28_10_silu.")
    constants: dict[str, Any] = {"mean": options.mean, "std": options.std, "weights_key": options.weights_key}
    model = load(path, arch=options.arch, **constants, **options.arch_args)
    identity = {"sha256": sha256_of(path), "weights": "file", "file": path.name, "architecture": options.arch}
    if options.weights_key is not None:
        identity["weights_key"] = options.weights_key
    if assumed := getattr(model, "assumed_normalisation", ""):
        identity["assumed_normalisation"] = assumed
    arguments = {**_shape_arguments(model), **options.arch_args}
    target = Target("file", model, identity, model_key(model, options.arch, arguments))
    return _found(path.stem, None, target)


def _timm_model(name: str) -> FoundTargets:
    model = pretrained(name)
    key = model_key(model, name, _shape_arguments(model))
    # timm does not report which file it read: the hash is that of the tensors.
    identity = {"sha256": key.weights_sha256, "weights": "pretrained", "architecture": name}
    target = Target("pretrained", model, identity, key)
    return _found(name, None, target)


def _shape_arguments(model: nn.Module) -> dict[str, Any]:
    return {
        name: int(value) for name in ("num_classes", "in_chans") if (value := getattr(model, name, None)) is not None
    }


def _found(name: str, threat: ThreatSpec | None, target: Target) -> FoundTargets:
    """One target, with its results in evaluations/NAME-<8 hex>: other weights of this name have another folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or target.label
    folder = Path("evaluations")
    results, earlier = (folder / part / RESULTS for part in (f"{name}-{target.key.digest[:8]}", name))
    return FoundTargets([target], threat, results, earlier=earlier)
