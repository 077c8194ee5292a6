"""A recipe: one YAML file that composes the specs of the modules below into a complete experiment.

Later layers win: defaults of the specs < the objective's preset < the recipe file < overrides from the command line.
A spec validates its values when it is built and is immutable afterwards.
"""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from nrat_scale.added_losses import stand_in
from nrat_scale.attacks import ThreatSpec, parse_fraction
from nrat_scale.collapse import GuardSpec
from nrat_scale.core.errors import UserError, check_choice, check_value, quoted, warn
from nrat_scale.core.imports import import_code
from nrat_scale.data.spec import GENERATED, REAL, AuditSpec, DataSpec
from nrat_scale.label_refinement import RefineSpec
from nrat_scale.labels import NONE, UNKNOWN, UNSET, GeneratedNoiseSpec
from nrat_scale.models import ModelSpec
from nrat_scale.optim import OptimSpec
from nrat_scale.overrides import check_norm_change, meant_key, nearest_key, one_line, read_yaml, with_overrides
from nrat_scale.presets import IKL_DEFAULTS, OBJECTIVES, PRESET_ONLY, ObjectiveSpec, preset
from nrat_scale.threat import TRAINING_ONLY, read_phases
from nrat_scale.tracking import TRACKERS
from nrat_scale.weights import AwpSpec, EmaSpec

# Retired keys of stored recipes: key -> (old default, dropped silently; reason, printed if another value is dropped).
RETIRED = {"data.workers": (0, "a thread of the training process gathers batches faster than loader processes did")}
# Keys that may differ when a run is resumed: they set where, how fast and how long it runs, not what it computes.
_NOT_IDENTITY = (
    "run_dir", "resume", "train.max_steps", "train.timeout_minutes", "train.log_every", "train.trackers", "train.compile",
    "train.threads", "train.graphs", "train.deterministic",
    "release.every_epochs", "data.resident", "data.max_bad_shards", "data.remote.cache", "data.remote.cache_gb",
    "data.real.prepare", "data.generated.prepare", *RETIRED,
)  # fmt: skip
# Keys added since runs were stored -> their defaults. At its default a key is not part of the identity, so that a run that
# was stored without it can be resumed.
_ADDED: dict[str, Any] = {
    **{f"data.generated.noise.{key}": value for key, value in dataclasses.asdict(GeneratedNoiseSpec()).items()},
    "data.generated.noise.kind": NONE,
    "data.real.noise.matrix": None,
    "data.real.noise.scores": None,
    **{
        f"data.{kind}.audit.{key}": value
        for kind in (REAL, GENERATED)
        for key, value in dataclasses.asdict(AuditSpec()).items()
    },
    "data.validation.shards": None,
    **{f"objective.{key}": value for key, value in IKL_DEFAULTS.items()},
    "objective.warm_start": 0.0,
    **{f"objective.refine.{key}": value for key, value in dataclasses.asdict(RefineSpec()).items()},
    "imports": [],
    "train.tf32": True,
    "model.init": None,
    "model.init_key": None,
    **{f"threat.{key}": value for key, value in TRAINING_ONLY.items()},
}
# Other values of the same meaning: nothing is injected, and the labels of generated images are never known to be clean.
_EQUAL: dict[str, tuple[Any, ...]] = {"data.generated.noise.kind": (UNKNOWN, UNSET)}
# Keys of `objective` in every resolved recipe from before `objective.loss` and `objective.divergence` were keys.
_FORMER_OBJECTIVE = {"name", "lam", "inner", "smoothing", "smoothing_mode", "a", "b"}
_FORMER_AWP_WARMUP = 10  # the default before the 9 of TRADES-AWP


@dataclass(frozen=True)
class TrainSpec:
    """Length of a run, how often it validates and saves, and how fast it computes."""

    epochs: int = 1  # length of the schedule
    max_steps: int | None = None  # stop after this many optimizer steps in all; the schedule remains that of `epochs`
    # Micro-batches per step, whose gradients are averaged; a process holds batch_size / (processes * accumulate) images.
    accumulate: int = 1
    max_grad_norm: float | None = None  # clip the gradient to this norm
    validate_every: int = 1  # epochs between validations
    validation_attack: str = "pgd10"  # `pgdN` or `cwN`, N steps, on the held-out images at the recipe's eps
    save_every: int = 1  # epochs between checkpoints
    keep: int = 1  # newest checkpoints to keep besides the best
    log_every: int = 50  # steps between progress lines
    # Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`.
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    # CPU threads of each process; None: OMP_NUM_THREADS, and without it the process's share of the cores.
    threads: int | None = None
    channels_last: bool = True  # memory format of images and weights, in which convolutions are fastest
    fold_batchnorm: bool = True  # fold BatchNorm into convolutions while attacking with `threat.bn: eval`
    compile: bool | str = "auto"  # torch.compile for attack and training; `auto`: on CUDA, and eager if it fails
    graphs: bool | str = "auto"  # CUDA graphs for attack and training; `auto`: on one GPU, and eager if they fail
    tf32: bool = True  # float32 convolutions in TF32 on GPUs that have it, torch's default; validation is always IEEE
    deterministic: bool = False  # only deterministic algorithms: a resumed run on a GPU has the same bits; slower
    # Timeout of collectives between processes. It must exceed the time in which the main process verifies the data.
    timeout_minutes: float = 15.0

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "max_steps",
            "accumulate",
            "validate_every",
            "save_every",
            "keep",
            "log_every",
            "threads",
        ):
            value = getattr(self, name)
            check_value(f"train.{name}", value, value is None or value >= 1, "at least 1")
        for name in ("max_grad_norm", "timeout_minutes"):
            value = getattr(self, name)
            check_value(f"train.{name}", value, value is None or value > 0, "greater than 0")
        known = re.fullmatch(r"(pgd|cw)[1-9][0-9]*", self.validation_attack) is not None
        check_value("train.validation_attack", self.validation_attack, known, "pgdN or cwN, for instance pgd10 or cw40")
        for name in ("compile", "graphs"):
            value = getattr(self, name)
            check_value(f"train.{name}", value, value in ("auto", True, False), "auto, true or false")
        for name in self.trackers:
            check_choice("train.trackers", name, TRACKERS)
        known = len(set(self.trackers)) == len(self.trackers)
        check_value("train.trackers", self.trackers, known, "different names")


@dataclass(frozen=True)
class ReleaseSpec:
    """Checkpoints to publish while a run trains, uploaded by `python -m nrat_scale.release RUN --push REPO --queued`."""

    every_epochs: int | None = None  # epochs between copies of the checkpoint in `RUN/releases`, which are never pruned

    def __post_init__(self) -> None:
        holds = self.every_epochs is None or self.every_epochs >= 1
        check_value("release.every_epochs", self.every_epochs, holds, "at least 1")


@dataclass(frozen=True)
class RecipeSpec:
    """A complete experiment.

    Raises:
        UserError: a value is unknown, or two specs contradict each other.
    """

    threat: ThreatSpec
    data: DataSpec
    model: ModelSpec = field(default_factory=ModelSpec)
    objective: ObjectiveSpec = field(default_factory=lambda: OBJECTIVES["nrat"])
    optim: OptimSpec = field(default_factory=OptimSpec)
    ema: EmaSpec = field(default_factory=EmaSpec)
    awp: AwpSpec = field(default_factory=AwpSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    guard: GuardSpec = field(default_factory=GuardSpec)
    release: ReleaseSpec = field(default_factory=ReleaseSpec)
    name: str = ""  # by default the file's name
    run_dir: str = ""  # folder that the run is written to, by default `runs/<name>`
    seed: int = 0  # of weights, sample plan, augmentation and attack noise; label noise has its own
    precision: str = "fp32"  # or `bf16`, `fp16` (autocast), `fp64` (everything, to test exactness)
    resume: str = "auto"  # resume from the newest checkpoint of this recipe; `never` requires an empty run directory
    # Modules of your own that training imports first, for instance one that adds to `LOSSES`; their code is run.
    imports: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16", "fp64"))
        check_choice("resume", self.resume, ("auto", "never"))
        if self.objective.family == "mart" and self.data.augment.cutmix:
            raise UserError("data.augment.cutmix mixes labels, but MART needs hard labels. Set it to 0.")
        cutmix, refine = self.data.augment.cutmix, self.objective.refine
        refine.check_recipe(ema_decay=self.ema.decay, cutmix=cutmix, awp_gamma=self.awp.gamma)
        self.threat.check_recipe(cutmix=cutmix, objective=self.objective.name, family=self.objective.family)

    @property
    def identity(self) -> str:
        """A hash of everything that decides what is computed; a run is resumed only by a recipe of equal identity."""
        return hashlib.sha256(json.dumps(identity_values(self), sort_keys=True).encode()).hexdigest()


def _values(recipe: RecipeSpec) -> dict[str, Any]:
    """The recipe's keys and values as plain data."""
    values = dataclasses.asdict(recipe)
    for name in PRESET_ONLY:
        del values["objective"][name]
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat_values(recipe: RecipeSpec) -> dict[str, Any]:
    """The recipe's dotted keys and their values."""
    return dict(_flat(_values(recipe)))


def identity_values(recipe: RecipeSpec) -> dict[str, Any]:
    """The keys that decide what is computed. Keys added later do not count at their default: stored runs keep their identity."""
    values = {key: value for key, value in _flat(_values(recipe)) if key not in _NOT_IDENTITY}
    usual = dict(_ADDED)
    if own := OBJECTIVES.get(recipe.objective.name):
        usual |= {"objective.loss": own.loss, "objective.divergence": own.divergence}
    if not recipe.awp.gamma:
        values["awp.warmup_epochs"] = _FORMER_AWP_WARMUP
    return {
        key: value
        for key, value in values.items()
        if key not in usual or value not in (usual[key], *_EQUAL.get(key, ()))
    }


def stored_values(recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dotted keys of a stored recipe that decide what is computed, and its seeds, which the first do not include."""
    values = {key: value for key, value in _flat(recipe) if key not in _NOT_IDENTITY}
    seeds = {key: value for key, value in values.items() if key.rpartition(".")[2] == "seed"}
    return {key: value for key, value in values.items() if key not in seeds}, seeds


def difference(old: RecipeSpec, new: RecipeSpec) -> str:
    """The first key in which two recipes of different identity differ, for an error message."""
    there, here = ({**_ADDED, **identity_values(spec)} for spec in (old, new))
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            before, now = (
                known.get(key, dict(_flat(_values(spec)))[key]) for known, spec in ((there, old), (here, new))
            )
            return f"{key} is {before} there and {now} here"
    return "no key differs"


def outdated(path: Path) -> str:
    """What a stored recipe of an older version trained that this version cannot: the end of a sentence, or empty."""
    raw = OmegaConf.to_container(read_yaml(path), resolve=True)
    assert isinstance(raw, dict)
    objective, augment = raw.get("objective"), (raw.get("data") or {}).get("augment") or {}
    if not isinstance(objective, dict) or not _is_former(objective):
        return ""
    name, inner = objective["name"], objective["inner"]
    if "ikl" in (OBJECTIVES[name].divergence if name in OBJECTIVES else "", inner):
        return f"objective {quoted(name)} weighed IKL by lam and had class means of the last 100 steps"
    if inner == "nfl_rce":
        return "the gradient of nfl_rce was not that of its authors' code"
    if name == "dm_at" and augment.get("cutmix") and objective["smoothing"]:
        return "dm_at also smoothed the labels of CutMix"
    return ""


def _is_former(objective: Any) -> bool:
    """Whether the raw section `objective` is of a resolved recipe that an older version stored."""
    return isinstance(objective, dict) and set(objective) >= _FORMER_OBJECTIVE and "loss" not in objective


def _keep_meaning(objective: dict[str, Any], path: Path) -> None:
    """Change the resolved `objective` of an older version so that presets with another formula today keep theirs."""
    if objective["name"] == "score":
        objective |= {"loss": "ce", "divergence": "lse"}
    elif objective["name"] in ("trades_ikl", "nrat_ikl"):
        lam = objective["lam"]
        objective |= {"lam": 1.0, "ikl_alpha": lam, "ikl_beta": lam, "ikl_temperature": 1.0}
        what = f"{objective['name']} of an older version weighed IKL by lam {lam}, read as ikl_alpha and ikl_beta"
        warn(f"{path}: {what}; its class means of the last 100 steps are now those of the previous epoch.")
    elif objective["inner"] == "ikl":
        objective |= {"ikl_alpha": 1.0, "ikl_beta": 1.0, "ikl_temperature": 1.0}


def to_yaml(recipe: RecipeSpec) -> str:
    """The resolved recipe, readable by `load_recipe`."""
    return str(OmegaConf.to_yaml(OmegaConf.create(_values(recipe))))


def load_recipe(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, run_code: bool = True
) -> RecipeSpec:
    """Read, compose and check a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` with dotted keys, for instance `objective.name=trades` or `threat.eps=4/255`; or a mapping of
            dotted keys to values.
        run_code: import the modules of `imports`. For the recipe of a run or a release, which training need not repeat, it is
            False: losses that this process does not know are then replaced by ones that cannot be computed.

    Raises:
        UserError: a missing file, invalid YAML, an unknown key (the message names the nearest known one), or a value
            that its spec refuses.
    """
    path = Path(path)
    stored = read_yaml(path)
    given, changes = with_overrides(stored, overrides, path)
    try:
        container = OmegaConf.to_container(given, resolve=True)
        assert isinstance(container, dict)
        raw = _known_keys(container, RecipeSpec, "", path)
        raw["name"] = raw.get("name") or path.stem
        raw["run_dir"] = raw.get("run_dir") or f"runs/{raw['name']}"
        _normalise(raw)
        check_norm_change(stored, changes)
        objective = raw.get("objective", {})
        if run_code:
            _import(raw["imports"], path)
        else:
            stand_in(objective)
        if _is_former(objective):
            _keep_meaning(objective, path)
        spec = preset(str(objective.get("name", "nrat")), str(objective.get("divergence", "")))
        layer = {
            "objective": dataclasses.asdict(spec),
            "threat": {"init": spec.init, "bn": spec.bn},
            "ema": {"decay": spec.ema_decay},
        }
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RecipeSpec), layer, raw))
    except (UserError, OmegaConfBaseException) as error:
        if isinstance(error, MissingMandatoryValue) and (missing := _missing(raw)):
            way_out = "Every recipe sets them; `prepare template SHARDS` writes one that fits your data"
            raise UserError(f"{path}: {', '.join(missing)} not set. {way_out}.") from error
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {key + ': ' if key else ''}{one_line(error)}") from error
    assert isinstance(recipe, RecipeSpec)
    return recipe


def _import(modules: list[str], path: Path) -> None:
    """Import `modules`, unless the recipe is that of a release: a release comes from others, and never runs code."""
    if modules and (path.parent / "model.safetensors").is_file() and (path.parent / "config.json").is_file():
        what = f"imports {', '.join(map(quoted, modules))}, which runs code, and is part of a release"
        raise UserError(f"the recipe {what}. Read that code, then copy the recipe to another folder.")
    for module in modules:
        import_code(module, "imports")


def _known_keys(raw: dict[Any, Any], spec: type, prefix: str, path: Path) -> dict[str, Any]:
    """`raw` without retired keys; raises `UserError` for an unknown key, with the nearest known one."""
    hidden = PRESET_ONLY if spec is ObjectiveSpec else ()
    hints = {key: hint for key, hint in typing.get_type_hints(spec).items() if key not in hidden}
    kept = {}
    for key, value in raw.items():
        dotted = f"{prefix}{key}"
        if key in hints:
            section = dataclasses.is_dataclass(hints[key])
            if section and not isinstance(value, dict):
                hint = f" Did you mean {meant}?" if (meant := meant_key(hints[key], dotted, value, PRESET_ONLY)) else ""
                if value is None and dotted in ("data.real", "data.generated"):
                    hint = f" To train without these images: {dotted}.shards=null."
                raise UserError(f"{dotted} is {quoted(value)}; it must be a mapping of keys to values.{hint}")
            kept[key] = _known_keys(value, hints[key], f"{dotted}.", path) if section else value
            if dotted == "threat.schedule":
                kept[key] = read_phases(value)
        elif dotted not in RETIRED:
            raise UserError(f"unknown key {quoted(dotted)}. {nearest_key(dotted, hints, RecipeSpec)}")
        elif value != RETIRED[dotted][0]:
            warn(f"{path}: {dotted} is ignored: {RETIRED[dotted][1]}.")
    return kept


def _missing(raw: dict[str, Any]) -> list[str]:
    """The keys without a default that `raw` does not set; OmegaConf writes such a value as ???."""
    threat = raw.get("threat", {})
    missing = [f"threat.{key}" for key in ("eps", "step", "num_steps") if threat.get(key, "???") == "???"]
    return missing if raw.get("data") else [*missing, "data.real.shards"]


def _normalise(raw: dict[str, Any]) -> None:
    """Replace notation by values: `8/255` in `threat`, `off`, which YAML 1.1 reads as False, and one name for a list."""
    objective, threat, imports = raw.get("objective", {}), raw.get("threat", {}), raw.get("imports") or []
    raw["imports"] = [imports] if isinstance(imports, str) else imports
    if not isinstance(raw["imports"], list) or not all(isinstance(name, str) for name in raw["imports"]):
        raise UserError(f"imports is {quoted(imports)}; it must be a list of modules, for instance [my_losses].")
    train = raw.get("train", {})
    if isinstance(train.get("trackers"), str):
        train["trackers"] = [train["trackers"]]
    if objective.get("smoothing_mode") is False:
        objective["smoothing_mode"] = "off"
    for key in ("eps", "step"):
        if isinstance(threat.get(key), str) and threat[key] != MISSING:
            try:
                threat[key] = parse_fraction(threat[key])
            except ValueError as error:
                raise UserError(f"threat.{key}: {error}") from error
