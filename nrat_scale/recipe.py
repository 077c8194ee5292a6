"""A recipe: one YAML file that composes the specs of the modules below into a complete experiment.

Values are layered, later ones win: defaults of the specs < the objective's preset < the recipe file < overrides from
the command line. They are checked once, here, and never change afterwards.
"""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.attacks import ThreatSpec
from nrat_scale.collapse import GuardSpec
from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.data.spec import DataSpec
from nrat_scale.models import ModelSpec
from nrat_scale.objectives import OBJECTIVES, Objective, ObjectiveSpec, build
from nrat_scale.optim import OptimSpec
from nrat_scale.weights import AwpSpec, EmaSpec

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
RESUMES = ("auto", "never")
_FRACTION = re.compile(r"\s*([0-9.]+)\s*/\s*([0-9.]+)\s*")
# What may differ between the parts of one run: where and how far it runs, not what it computes.
_NOT_IDENTITY = (
    "run_dir",
    "resume",
    "train.max_steps",
    "train.timeout_minutes",
    "train.log_every",
    "release.every_epochs",
    "train.compile",
    "data.workers",
    "data.resident",
    "data.max_bad_shards",
    "data.remote.cache",
    "data.remote.cache_gb",
    "data.real.prepare",
    "data.generated.prepare",
)


@dataclass(frozen=True)
class TrainSpec:
    """Length of a run, and how often it validates and saves.

    Attributes:
        epochs: length of the schedule.
        max_steps: stop after this many optimizer steps in all; the schedule remains that of `epochs`.
        accumulate: micro-batches per step, whose gradients are averaged; each process holds
            batch_size / (processes * accumulate) images at a time.
        max_grad_norm: clip the gradient to this norm.
        validate_every: epochs between validations.
        validation_attack: `pgdN` or `cwN`, N steps, on the held-out images at the recipe's eps.
        save_every: epochs between checkpoints.
        keep: how many of the newest checkpoints to keep besides the best.
        log_every: steps between lines of progress.
        channels_last: channels-last memory format for images and weights, in which convolutions are fastest.
        fold_batchnorm: fold BatchNorm into convolutions while attacking with `threat.bn: eval`.
        compile: torch.compile for attack and training: `auto` (on CUDA, and eager if it fails), `true` or `false`.
        timeout_minutes: the run ends if a process does not answer the others for this long; it must exceed the time
            that the main process takes to verify the data.
    """

    epochs: int = 1
    max_steps: int | None = None
    accumulate: int = 1
    max_grad_norm: float | None = None
    validate_every: int = 1
    validation_attack: str = "pgd10"
    save_every: int = 1
    keep: int = 1
    log_every: int = 50
    channels_last: bool = True
    fold_batchnorm: bool = True
    compile: bool | str = "auto"
    timeout_minutes: float = 15.0

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "validate_every", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.timeout_minutes > 0:
            raise UserError(f"train.timeout_minutes is {self.timeout_minutes}; it must be greater than 0.")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"train.max_steps is {self.max_steps}; it must be at least 1.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"train.max_grad_norm is {self.max_grad_norm}; it must be greater than 0.")
        if not re.fullmatch(r"(pgd|cw)[1-9][0-9]*", self.validation_attack):
            raise UserError(f"train.validation_attack is '{self.validation_attack}'; write pgd10, cw40 or the like.")
        if self.compile not in ("auto", True, False):
            raise UserError(f"train.compile is '{self.compile}'; it must be auto, true or false.")


@dataclass(frozen=True)
class ReleaseSpec:
    """What is put aside for publication while a run trains.

    Attributes:
        every_epochs: put the verified checkpoint aside every so many epochs, in `RUN/releases`, where pruning leaves it alone;
            `python -m nrat_scale.release RUN --push user/repo --queued` sends what is missing. None: never.
    """

    every_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.every_epochs is not None and self.every_epochs < 1:
            raise UserError(f"release.every_epochs is {self.every_epochs}; it must be at least 1.")


@dataclass(frozen=True)
class RecipeSpec:
    """A complete experiment.

    Attributes:
        threat, data, model, objective, optim, ema, awp, train, guard, release: see the specs.
        name: of the recipe; its file's name by default.
        run_dir: where the run is written, `runs/<name>` by default.
        seed: of weights, sample plan, augmentation and attack noise (label noise has its own).
        precision: `fp32`, `bf16`, `fp16` (autocast) or `fp64` (everything, to test exactness).
        resume: `auto` continues the same recipe's newest checkpoint; `never` wants an empty run directory.
    """

    threat: ThreatSpec
    data: DataSpec
    model: ModelSpec = field(default_factory=ModelSpec)
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    ema: EmaSpec = field(default_factory=EmaSpec)
    awp: AwpSpec = field(default_factory=AwpSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    guard: GuardSpec = field(default_factory=GuardSpec)
    release: ReleaseSpec = field(default_factory=ReleaseSpec)
    name: str = ""
    run_dir: str = ""
    seed: int = 0
    precision: str = "fp32"
    resume: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is '{self.precision}'. {did_you_mean(self.precision, PRECISIONS)}")
        if self.resume not in RESUMES:
            raise UserError(f"resume is '{self.resume}'. {did_you_mean(self.resume, RESUMES)}")
        family = build_objective(self.objective).family
        if family == "mart" and self.data.augment.cutmix:
            raise UserError("data.augment.cutmix mixes labels, and MART needs hard ones. Set it to 0.")
        if self.objective.smoothing and self.objective.smoothing_mode == "off":
            raise UserError(
                f"objective.smoothing is {self.objective.smoothing} but objective.smoothing_mode is 'off' "
                f"(the default of {self.objective.name}). Choose mixed or plugin, or set the smoothing to 0."
            )

    @property
    def identity(self) -> str:
        """A hash of everything that decides what is computed; runs resume only under the same one."""
        return hashlib.sha256(json.dumps(_identifying(self), sort_keys=True).encode()).hexdigest()


def _identifying(recipe: RecipeSpec) -> dict[str, Any]:
    """Dotted key -> value of everything that decides what is computed."""

    def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in values.items():
            name = f"{prefix}{key}"
            entries |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
        return entries

    return {key: value for key, value in flat(dataclasses.asdict(recipe), "").items() if key not in _NOT_IDENTITY}


def difference(old: RecipeSpec, new: RecipeSpec) -> str:
    """The first thing that tells two recipes of different identity apart, for an error message."""
    there, here = _identifying(old), _identifying(new)
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)} there and {here.get(key)} here"
    return "nothing tells them apart"


def build_objective(spec: ObjectiveSpec, num_classes: int | None = None) -> Objective:
    """The objective that `spec` describes."""
    return build(**dataclasses.asdict(spec), num_classes=num_classes)


def to_yaml(recipe: RecipeSpec) -> str:
    """The resolved recipe, readable by `load_recipe`."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe))))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSpec:
    """Read, compose and check a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` with dotted keys, for instance `objective.name=trades` or `threat.eps=4/255`.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), or a value that cannot be.
    """
    path = Path(path)
    given = OmegaConf.merge(_read_yaml(path), _read_overrides(overrides))
    try:
        container = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    assert isinstance(container, dict)
    raw: dict[str, Any] = {str(key): value for key, value in container.items()}
    _check_keys(raw, RecipeSpec, "", path)
    objective = raw.get("objective")
    if isinstance(objective, dict) and objective.get("smoothing_mode") is False:
        objective["smoothing_mode"] = "off"  # what YAML 1.1 makes of the word
    threat = raw.get("threat")
    if isinstance(threat, dict):
        raw["threat"] = {key: _fraction(value) for key, value in threat.items()}
    name = str(raw.get("name") or path.stem)
    defaults = {"name": name, "run_dir": f"runs/{name}"}
    raw = {key: value for key, value in raw.items() if not (key in defaults and not value)}
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RecipeSpec), defaults, _preset(raw), raw))
    except UserError as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{path}: {key}{_first_line(error)}") from error
    assert isinstance(recipe, RecipeSpec)
    return recipe


def _preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The layer of the objective's preset: plain data that recipe keys override."""
    objective = raw.get("objective")
    name = objective.get("name", ObjectiveSpec.name) if isinstance(objective, dict) else ObjectiveSpec.name
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective '{name}' (objective.name). {did_you_mean(str(name), OBJECTIVES)}")
    preset = OBJECTIVES[name]
    return {
        "objective": {key: getattr(preset, key) for key in ("lam", "inner", "smoothing", "smoothing_mode")},
        "threat": {"init": preset.init, "bn": preset.bn},
    }


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"There is no recipe {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"The recipe {path} must be a mapping of keys to values.")
    return loaded


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise UserError(f"'{override}' is not an override. Write key=value, for instance objective.name=trades.")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The overrides {' '.join(overrides)} cannot be read: {_first_line(error)}") from error


def _check_keys(raw: dict[str, Any], spec: type, prefix: str, path: Path) -> None:
    """Unknown keys end here with the nearest known one, wherever they stand."""
    hints = typing.get_type_hints(spec)
    for key, value in raw.items():
        if key not in hints:
            raise UserError(f"{path}: unknown key '{prefix}{key}'. {did_you_mean(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _check_keys(value, typing.cast(type, hints[key]), f"{prefix}{key}.", path)


def _fraction(value: Any) -> Any:
    """`8/255` as a number; everything else as it is."""
    match = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    try:
        return float(match[1]) / float(match[2])
    except (ValueError, ZeroDivisionError):
        return value


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
