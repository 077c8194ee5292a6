"""Grid files: recipes/grids/*.yaml, read and checked. Every error names the file and the key."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean, quoted
from nrat_scale.evaluate.attacks import parse_attack
from nrat_scale.labels import NOISES
from nrat_scale.overrides import one_line
from nrat_scale.reproduce.grid import AXES, FACTS, Edition, Grid, Noise, Override, Stage
from nrat_scale.reproduce.paper import printed_numbers

GRIDS = Path(__file__).parent / "grids"  # recipes/grids of the repository; in an installed package a folder of its own
EDITIONS, METHODS = "editions.yaml", "methods.yaml"
_NOISE = re.compile(r"([a-z][a-z0-9_]*)-(0|1|0\.[0-9]+)")
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")  # of a method or an edition: it becomes the name of a folder


def grid_names(folder: Path = GRIDS) -> list[str]:
    """The grids in a folder."""
    names = (path.stem for path in folder.glob("*.yaml"))
    return sorted(name for name in names if f"{name}.yaml" not in (EDITIONS, METHODS) and not name.startswith("base_"))


def read_grid(what: str) -> Grid:
    """A grid of the package by name, or a file of your own; methods.yaml and editions.yaml beside it add to the package's.

    Raises:
        UserError: there is no such grid, or its files are wrong; the message names the file and the key.
    """
    path = Path(what) if what.endswith((".yaml", ".yml")) else GRIDS / f"{what}.yaml"
    if what.endswith((".yaml", ".yml")):
        if not path.is_file():
            raise UserError(f"There is no grid file {path}.")
    elif what not in grid_names():
        hint = did_you_mean(what, grid_names())
        raise UserError(
            f"There is no grid {quoted(what)}. {hint} A grid of your own: give its path, such as my_grid.yaml."
        )
    raw = _mapping(path)
    known_methods = {name: one for file in _files(path, METHODS) for name, one in _methods(file).items()}
    known_editions = {
        name: one for file in _files(path, EDITIONS) for name, one in _editions(file, known_methods).items()
    }
    _known(
        raw, ("title", "stages", "seeds", "editions", "paper", "omissions", "differences", "prepare", "allowed"), path
    )
    stages = tuple(_stage(one, number, known_methods, path) for number, one in enumerate(_list(raw, "stages", path), 1))
    check_value(f"{path}: stages", len(stages), len(stages) > 0, "at least one stage")
    used = {method for stage in stages for method in stage.methods}
    return Grid(
        path.stem,
        _text(raw, "title", path, default=path.stem),
        stages,
        known_methods,
        known_editions,
        _seeds(raw.get("seeds"), used, path),
        _uses(_section(raw, "editions", path, optional=True), known_editions, path),
        _paper(_section(raw, "paper", path, optional=True), used, path),
        tuple(_sentences(raw, "omissions", path)),
        _references(_section(raw, "differences", path, optional=True), used, path),
        _prepare(_section(raw, "prepare", path, optional=True), known_editions, path),
        _names(raw["allowed"], f"{path}: allowed", known_editions) if raw.get("allowed") else (),
        path if path.parent != GRIDS else Path("recipes/grids", path.name),
    )


def _files(path: Path, name: str) -> list[Path]:
    """The package's file of this name, then the one beside the grid, whose entries replace those of the package."""
    own = path.with_name(name)
    return [GRIDS / name, *([own] if own.is_file() and path.parent != GRIDS else [])]


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML file; a key that is there twice is an error."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must be a mapping of names to values.")
    return {str(key): value for key, value in content.items()}


def _known(raw: Mapping[str, Any], keys: Sequence[str], where: Path | str) -> None:
    for key in raw:
        if key not in keys:
            raise UserError(f"{where}: unknown key {quoted(key)}. {did_you_mean(str(key), keys)}")


def _list(raw: Mapping[str, Any], key: str, where: Path | str) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key} is {quoted(value)}; it must be a list with at least one entry.")
    return value


def _names(value: Any, where: str, known: Iterable[str]) -> tuple[str, ...]:
    """A list of different known names."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {quoted(value)}; it must be a list with at least one entry.")
    for number, name in enumerate(value):
        if not isinstance(name, str) or name not in known:
            raise UserError(f"{where}: there is no {quoted(name)}. {did_you_mean(str(name), known)}")
        if name in value[:number]:
            raise UserError(f"{where} names {name} twice. Remove one.")
    return tuple(value)


def _methods(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, settings in _mapping(path).items():
        where = f"{path}: {name}"
        _check_name(f"{path}: the method", name)
        if not isinstance(settings, dict) or "objective.name" not in settings:
            raise UserError(f"{where} must be a mapping of recipe keys to values, with objective.name.")
        found[name] = {str(key): value for key, value in settings.items()}
        _check_no_axis([key for key in found[name] if key != "objective.name"], where)
        for fact in FACTS:
            if fact in settings:
                _text(settings, fact, where)
    return found


def _check_name(what: str, name: str) -> None:
    bound = "lower-case letters, digits, `_`, `.` and `-`, a letter first"
    check_value(what, name, _NAME.fullmatch(name) is not None, bound)


def _check_no_axis(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key in AXES:
            raise UserError(f"{where} sets {key}, which is set by {AXES[key]}. Remove it.")


def _noise(text: Any, where: str) -> Noise:
    parts = _NOISE.fullmatch(str(text))
    if parts is None:
        raise UserError(f"{where}: {quoted(text)} is no noise. Write KIND-RATE, such as none-0 or symmetric-0.4.")
    kind, rate = parts[1], float(parts[2])
    check_choice(f"{where}: the kind of noise", kind, NOISES)
    if (kind == "none") != (rate == 0):
        raise UserError(
            f"{where}: {text} contradicts itself: the kind none has rate 0, and every other kind a rate above 0."
        )
    return Noise(kind, rate)


def _stage(raw: Any, number: int, methods: Mapping[str, Any], path: Path) -> Stage:
    where = f"{path}: stage {number}"
    if not isinstance(raw, dict):
        raise UserError(f"{where} is {quoted(raw)}; it must have the keys methods and noises.")
    _known(raw, ("name", "methods", "noises"), where)
    noises = tuple(_noise(text, f"{where}: noises") for text in _list(raw, "noises", where))
    if len(set(noises)) < len(noises):
        raise UserError(f"{where}: noises has an entry twice. Remove one.")
    return Stage(str(raw.get("name", number)), _names(raw.get("methods"), f"{where}: methods", methods), noises)


def _seeds(raw: Any, methods: Iterable[str], path: Path) -> dict[str, int]:
    """Number of seeds by method; a number alone is that of all of them."""
    if raw is None:
        return {}
    counts = raw if isinstance(raw, dict) else {"default": raw}
    if "default" not in counts:
        raise UserError(f"{path}: seeds has no default. Add the number of seeds of all other methods.")
    for name, count in counts.items():
        if name != "default" and name not in methods:
            raise UserError(
                f"{path}: seeds: there is no method {quoted(name)} here. {did_you_mean(str(name), methods)}"
            )
        check_value(f"{path}: seeds of {name}", count, type(count) is int and count >= 1, "a whole number, at least 1")
    return counts


def _editions(path: Path, methods: Mapping[str, Any]) -> dict[str, Edition]:
    return {name: _edition(name, raw, methods, path) for name, raw in _mapping(path).items()}


def _edition(name: str, raw: Any, methods: Mapping[str, Any], path: Path) -> Edition:
    where = f"{path}: {name}"
    _check_name(f"{path}: the edition", name)
    if not isinstance(raw, dict):
        raise UserError(f"{where} must be a mapping with the keys base, test and evaluation.")
    _known(raw, ("title", "base", "test", "evaluation", "seeds", "overrides"), where)
    test, evaluation = (_section(raw, key, where) for key in ("test", "evaluation"))
    _known(test, ("shards", "prepare"), f"{where}: test")
    _known(evaluation, ("attacks", "images", "aa_images", "last"), f"{where}: evaluation")
    base = path.parent / _text(raw, "base", where)
    if not base.is_file():
        raise UserError(f"{where}: there is no base recipe {base}.")
    sizes = {key: evaluation.get(key) for key in ("images", "aa_images")}
    for key, size in sizes.items():
        check_value(f"{where}: {key}", size, size is None or (type(size) is int and size >= 1), "at least 1")
    return Edition(
        name,
        _text(raw, "title", where, default=name),
        base,
        _text(test, "shards", f"{where}: test"),
        _text(test, "prepare", f"{where}: test", default=""),
        _attacks(evaluation, "attacks", f"{where}: evaluation"),
        **sizes,
        last_attacks=None if evaluation.get("last") is None else _attacks(evaluation, "last", f"{where}: evaluation"),
        seeds=_seeds(1 if raw.get("seeds") is None else raw["seeds"], methods, path),
        overrides=tuple(
            _override(one, f"{where}: overrides", methods)
            for one in (_list(raw, "overrides", where) if raw.get("overrides") else ())
        ),
    )


def _text(raw: Mapping[str, Any], key: str, where: Path | str, default: str | None = None) -> str:
    """The text of a key; commands may have several lines."""
    value = raw.get(key, default)
    lines = value.splitlines() if isinstance(value, str) else []
    if value != default and not (lines and all(line.isprintable() for line in lines)):
        raise UserError(f"{where}: {key} is {quoted(value)}; it must be text, without control characters.")
    if value is None:
        raise UserError(f"{where}: {key} is missing.")
    return str(value)


def _sentences(raw: Mapping[str, Any], key: str, where: Path | str) -> list[str]:
    values = _list(raw, key, where) if raw.get(key) else []
    return [_text({key: value}, key, where) for value in values]


def _attacks(raw: Mapping[str, Any], key: str, where: str) -> str:
    """Names of attacks, comma-separated, each of which is known."""
    text = _text(raw, key, where)
    names = text.split(",")
    for name in names:
        try:
            parse_attack(name)
        except UserError as error:
            raise UserError(f"{where}: {key}: {error}") from error
    check_value(f"{where}: {key}", text, len(set(names)) == len(names), "attacks that differ")
    return text


def _section(raw: Mapping[str, Any], key: str, where: Path | str, *, optional: bool = False) -> dict[str, Any]:
    value = raw.get(key)
    if optional and value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} is {quoted(value)}; it must be a mapping of keys to values.")
    return value


def _override(raw: Any, where: str, methods: Mapping[str, Any]) -> Override:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {quoted(raw)} must be a mapping with the keys set and source.")
    _known(raw, ("methods", "noises", "set", "source"), where)
    if not raw.get("source"):
        raise UserError(f"{where}: {quoted(raw)} has no source. Say where its values come from.")
    noises = _list(raw, "noises", where) if raw.get("noises") else []
    for text in noises:
        if not isinstance(text, str) or text not in NOISES:
            _noise(text, where)
    names = _names(raw["methods"], f"{where}: methods", methods) if raw.get("methods") else ()
    settings = _section(raw, "set", where)
    _check_no_axis(settings, where)
    return Override(settings, _text(raw, "source", where), names, tuple(noises))


def _references(raw: dict[str, Any], methods: Iterable[str], path: Path) -> dict[str, str]:
    """Method -> the method that is subtracted from it."""
    for method, reference in raw.items():
        _names([method], f"{path}: differences", methods)
        _names([reference], f"{path}: differences: {method}", [name for name in methods if name != method])
    return {method: str(reference) for method, reference in raw.items()}


def _prepare(raw: dict[str, Any], editions: Iterable[str], path: Path) -> dict[str, str]:
    """Edition -> commands."""
    for name in raw:
        _names([name], f"{path}: prepare", editions)
    return {name: _text(raw, name, f"{path}: prepare") for name in raw}


def _uses(raw: dict[str, Any], editions: Mapping[str, Edition], path: Path) -> dict[str, list[str]]:
    for name, parts in raw.items():
        _names([name], f"{path}: editions", editions)
        _names(parts, f"{path}: editions: {name}", editions)
    return raw


def _paper(raw: dict[str, Any], methods: Iterable[str], path: Path) -> dict[str, dict[str, str]]:
    """Table -> our method -> its name in the table."""
    known = {(table, theirs) for table, theirs, *_ in printed_numbers()}
    _names(list(raw) or ["-"], f"{path}: paper", {*(table for table, _ in known), "-"})
    for table in raw:
        names = _section(raw, table, f"{path}: paper", optional=True)
        _names(list(names) or ["-"], f"{path}: paper: {table}", [*methods, "-"])
        for theirs in names.values():
            _names([theirs], f"{path}: paper: {table}", [name for one, name in known if one == table])
    return {table: {ours: str(theirs) for ours, theirs in (names or {}).items()} for table, names in raw.items()}
