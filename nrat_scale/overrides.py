"""Overrides of a recipe's keys, and what someone meant who gave a section a scalar or changed the norm alone."""

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.attacks import parse_fraction
from nrat_scale.core.errors import UserError, did_you_mean, printable, quoted, warn
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.models import ModelSpec
from nrat_scale.presets import IKL_DEFAULTS, OBJECTIVES

# What papers and other code call a key of ours.
SYNONYMS = {
    "beta": "objective.lam",
    "lambda": "objective.lam",
    "loss": "objective.name",
    "epsilon": "threat.eps",
    "alpha": "threat.step",
    "step_size": "threat.step",
    "steps": "threat.num_steps",
    "arch": "model.name",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "optimizer": "optim.name",
    "bs": "data.batch_size",
    "dataset": "data.real.shards",
    "noise_rate": "data.real.noise.rate",
    "num_epochs": "train.epochs",
    "output_dir": "run_dir",
}
_CONSTANTS = ("lam", "inner", "smoothing", "smoothing_mode", "a", "b")


def _near_recipe(path: Path) -> str:
    """The YAML file beside a missing one that has nearly its name."""
    beside = {other.stem: other for kind in ("*.yml", "*.yaml") for other in path.parent.glob(kind)}
    near = get_close_matches(path.stem, beside, n=1)
    return f" Did you mean {beside[near[0]]}?" if near else ""


def read_yaml(path: Path) -> DictConfig:
    """The recipe at `path` as it is written; raises `UserError` if it is missing or no mapping."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"There is no recipe {path}.{_near_recipe(path)}") from None
    except IsADirectoryError:
        recipe = RunFolder(path).recipe
        way_out = f"a run: its recipe is {recipe}" if recipe.is_file() else "a folder. Name a YAML file in it"
        raise UserError(f"The recipe {path} is {way_out}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The recipe {path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"The recipe {path} must be a mapping of keys to values.")
    return loaded


def nearest_key(dotted: str, hints: Collection[str], recipe: type) -> str:
    """A sentence about the unknown key `dotted` of a section with the keys `hints`.

    It names the key for another paper's word, a key of that name in another section of `recipe`, or the nearest of `hints`.
    """
    name = dotted.rpartition(".")[2]
    if meant := SYNONYMS.get(name.lower()):
        return f"Did you mean '{meant}'?"
    same = [key for key in _all_keys(recipe) if key.endswith(f".{name}") and key != dotted]
    if same and not get_close_matches(name, hints, n=1):
        return f"Did you mean '{min(same, key=len)}'?"
    return did_you_mean(name, hints)


def _all_keys(spec: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe."""
    for key, hint in typing.get_type_hints(spec).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def read_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> DictConfig:
    """`key=value` words, or a mapping of dotted keys to values, as a tree; raises `UserError` for what is neither."""
    if isinstance(overrides, Mapping):
        merged = OmegaConf.create({})
        try:
            for key, value in overrides.items():
                OmegaConf.update(merged, str(key), str(value) if isinstance(value, Path) else value)
        except (ValueError, OmegaConfBaseException) as error:
            raise UserError(f"The overrides {quoted(dict(overrides))} cannot be read: {one_line(error)}") from error
        return merged
    overrides = [overrides] if isinstance(overrides, str) else overrides
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise UserError(f"'{override}' is not an override. Write key=value, for instance objective.name=trades.")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The overrides {' '.join(overrides)} cannot be read: {one_line(error)}") from error


def with_overrides(
    stored: DictConfig, overrides: Sequence[str] | Mapping[str, Any], path: Path
) -> tuple[DictConfig, DictConfig]:
    """(the file's values under the overrides, the overrides alone); later ones win, and `key={}` empties a mapping.

    What belongs to another model or objective is dropped: an override of `model.name` drops the file's `model.kwargs`, one of
    `objective.name` its losses, IKL's constants, and what the file's objective has by default, as a resolved recipe states
    it. A warning says so of all but defaults.

    Args:
        path: of the file, for the warning.
    """
    changes, words = read_overrides(overrides), () if isinstance(overrides, Mapping) else overrides
    merged: Any = OmegaConf.merge(stored)  # a copy
    before, after = (OmegaConf.merge(stored), OmegaConf.merge(stored, changes))
    was, now = (_section(conf, "model").get("name", ModelSpec.name) for conf in (before, after))
    kwargs = _section(stored, "model").get("kwargs")
    if was != now and kwargs:
        del merged["model"]["kwargs"]
        if _section(changes, "model").get("kwargs") != {}:
            warn(f"{path}: model.kwargs {quoted(kwargs)} is that of {quoted(was)} and is not used for model.name.")
    was, now = (str(_section(conf, "objective").get("name", "nrat")) for conf in (before, after))
    if was != now and was in OBJECTIVES:
        _drop_objective(merged, was, path)
    for word in [words] if isinstance(words, str) else words:
        layer, key = OmegaConf.from_dotlist([word]), word.partition("=")[0]
        merged = OmegaConf.merge(merged, layer)
        if word.partition("=")[2].replace(" ", "") == "{}":  # merging an empty mapping would change nothing
            OmegaConf.update(merged, key, {}, merge=False)
    if isinstance(overrides, Mapping):
        merged = OmegaConf.merge(merged, changes)
        for key, value in overrides.items():
            if isinstance(value, Mapping) and not value:
                OmegaConf.update(merged, key, {}, merge=False)
    assert isinstance(merged, DictConfig)
    return merged, changes


def _drop_objective(merged: Any, was: str, path: Path) -> None:
    """Drop what is the objective `was`'s own: its losses, label refinement and IKL's constants, and whatever it has by default."""
    usual = OBJECTIVES[was]
    own = ("loss", "divergence", *IKL_DEFAULTS)
    refine, ema = _section(merged, "objective").get("refine"), _section(merged, "ema")
    if refine is not None:
        del merged["objective"]["refine"]
        if isinstance(refine, dict) and not dataclasses.asdict(usual.refine).items() >= refine.items():
            warn(f"{path}: objective.refine {quoted(refine)} is that of {quoted(was)} and is not used.")
    if usual.ema_decay and ema.get("decay") == usual.ema_decay:
        del merged["ema"]["decay"]
    for section, keys in (("objective", (*own, *_CONSTANTS)), ("threat", ("init", "bn"))):
        for key, value in _section(merged, section).items():
            if key in keys and (key in own or value == getattr(usual, key)):
                del merged[section][key]
                if value != getattr(usual, key):
                    warn(f"{path}: {section}.{key} {quoted(value)} is that of {quoted(was)} and is not used.")


def _section(conf: Any, name: str) -> dict[str, Any]:
    """The raw section of a recipe; empty if there is none, or something else in its place."""
    tree = OmegaConf.to_container(conf)
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def check_norm_change(stored: DictConfig, changes: DictConfig) -> None:
    """Refuse overrides of `threat.norm` that keep the file's radius or step: lengths in l_inf and l_2 do not compare."""
    before, threat = stored.get("threat"), changes.get("threat")
    if not isinstance(before, DictConfig) or not isinstance(threat, DictConfig):
        return
    old = before.get("norm", "linf")
    kept = [f"threat.{key}" for key in ("eps", "step") if key in before and key not in threat]
    phases = bool(before.get("schedule")) and "schedule" not in threat
    kept += ["threat.schedule"] if phases else []
    if kept and threat.get("norm", old) != old:
        eps = _number(threat.get("eps", 0.5))
        example = (
            f"threat.eps={eps} threat.step={eps / 4:g}"
            if isinstance(eps, float)
            else "threat.eps=0.5 threat.step=0.125"
        )
        example += " threat.schedule=[]" if phases else ""
        raise UserError(
            f"threat.norm is changed from {printable(old)} to {printable(threat.norm)}, but {' and '.join(kept)} would stay "
            f"as in the recipe, in the other norm. Give {'all' if phases else 'both'}, for instance {example}."
        )


def _number(value: Any) -> Any:
    """A radius or step as a number, as far as it is one."""
    try:
        return parse_fraction(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Keys that a section's name alone stands for most often, in this order: of text, and of numbers.
_USUAL_TEXT = ("name", "shards", "real", "norm", "kind", "source", "action")
_USUAL_NUMBERS = (
    "eps", "rate", "size", "fraction", "lr", "lam", "epochs", "decay", "gamma", "every_epochs", "cutmix", "max_rewinds",
)  # fmt: skip


def meant_key(spec: type, prefix: str, value: Any, hidden: Collection[str] = ()) -> str:
    """The override that someone meant who gave the section `prefix` a scalar: `objective.name=trades`; empty if none fits.

    Args:
        hidden: fields that are no keys.
    """
    number = isinstance(value, int | float) or isinstance(_number(value), float)
    usual, wanted = (_USUAL_NUMBERS, (int, float)) if number else (_USUAL_TEXT, (str,))
    if value is None or isinstance(value, bool | list):
        return ""
    hints = {key: hint for key, hint in typing.get_type_hints(spec).items() if key not in hidden}
    for key in (*(name for name in usual if name in hints), *hints):
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            if key in usual and (found := meant_key(hint, f"{prefix}.{key}", value, hidden)):
                return found
        elif {hint, *typing.get_args(hint)} & set(wanted):
            return f"{prefix}.{key}={printable(value)}"
    return ""


def one_line(error: BaseException) -> str:
    """The message without OmegaConf's trailer, on one line and printable (it may quote the file)."""
    return printable(" ".join(str(error).split("\n    full_key")[0].split()))
