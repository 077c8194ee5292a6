"""Grids: which trainings a table, a figure or the benchmark consists of, read from YAML files.

    recipes/grids/NAME.yaml       one grid: its stages (methods, noises, seeds), what is run first
    recipes/grids/editions.yaml   what it is run on: base recipe, test images, evaluation, exceptions
    recipes/grids/methods.yaml    what each method sets in the base recipe
    recipes/grids/base_*.yaml     the base recipes

A *cell* is one training with its evaluation. Grids share cells: one edition has one recipe for each (method, noise, seed).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nrat_scale.attacks import SPACES
from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean, first_line, quoted
from nrat_scale.labels import NOISES
from nrat_scale.recipe import RecipeSpec, load_recipe

GRIDS = Path(__file__).parent / "grids"  # recipes/grids of the repository; in an installed package a folder of its own
EDITIONS, METHODS = "editions.yaml", "methods.yaml"
PAPER_SPACE = "released_code"
# `--noise`: the kind that stands for `asymmetric` in the grids.
ASYMMETRIC = {"default": "asymmetric", "text": "asymmetric_bidirectional", "released": "asymmetric_released"}
_NOISE = re.compile(r"([a-z][a-z0-9_]*)-(0|1|0\.[0-9]+)")
_METHOD = re.compile(r"[a-z][a-z0-9_.-]*")  # it becomes the name of a folder
_FACTS = ("title", "source")  # of a method; its other keys are recipe keys


@dataclass(frozen=True)
class Noise:
    """One level of label noise, written `KIND-RATE`; `none-0` are the labels as they are."""

    kind: str
    rate: float

    def __str__(self) -> str:
        return f"{self.kind}-{self.rate:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets in a recipe."""
        return {"data.real.noise.kind": self.kind, "data.real.noise.rate": self.rate}


@dataclass(frozen=True)
class Override:
    """An exception of an edition: what it sets for some methods and noises."""

    settings: dict[str, Any]
    source: str  # where the values come from
    methods: tuple[str, ...] = ()  # empty: all
    noises: tuple[str, ...] = ()  # kinds or KIND-RATE; empty: all

    def applies(self, method: str, noise: Noise) -> bool:
        """Whether it is for cells of this method and noise."""
        return (not self.methods or method in self.methods) and (
            not self.noises or noise.kind in self.noises or str(noise) in self.noises
        )


@dataclass(frozen=True)
class Edition:
    """What a grid is run on."""

    name: str
    title: str
    base: Path  # the recipe that all methods share
    test_shards: str
    test_prepare: str  # the commands that make them
    attacks: str  # such as "natural,pgd20,cw20,aa"
    images: int | None = None  # a fixed seeded choice of the test images; None: all
    aa_images: int | None = None  # the same for AutoAttack alone
    last_attacks: str | None = None  # of the last checkpoint, if they are fewer than those of the best
    seeds: dict[str, int] = field(default_factory=lambda: {"default": 1})  # by method
    overrides: tuple[Override, ...] = ()


@dataclass(frozen=True)
class Choices:
    """What the command line changes in all cells."""

    space: str = "pixel"  # `threat.space`; `released_code` is that of the paper's printed numbers
    noise: str = "default"  # key of `ASYMMETRIC`
    curves: str = "held-out"  # or `test`: the curve of natural and robust accuracy is that of the test images
    settings: tuple[str, ...] = ()  # further overrides, `key=value`

    def __post_init__(self) -> None:
        check_choice("--space", self.space, SPACES)
        check_choice("--noise", self.noise, ASYMMETRIC)
        check_choice("--curves", self.curves, ("held-out", "test"))

    @property
    def suffix(self) -> str:
        """What distinguishes the folder of these cells from that of the usual ones."""
        return ("-released_code" if self.space == PAPER_SPACE else "") + (
            "-test_curves" if self.curves == "test" else ""
        )


@dataclass(frozen=True)
class Cell:
    """One training with its evaluation."""

    edition: Edition
    method: str
    noise: Noise
    seed: int
    choices: Choices = field(default_factory=Choices)
    stage: str = ""  # of the grid
    settings: tuple[tuple[str, Any], ...] = ()  # of the method and of the edition's exceptions

    @property
    def id(self) -> str:
        """Its name within an edition, and its place under `cells/`: METHOD/KIND-RATE/seed-S."""
        return f"{self.method}/{self.noise}/seed-{self.seed}"

    @property
    def folder(self) -> str:
        """The edition, and what the command line changed in it."""
        return self.edition.name + self.choices.suffix

    def recipe(self, run_dir: Path | None = None) -> RecipeSpec:
        """The resolved recipe. The seed is that of weights, batches and attacks, and of the label noise.

        Raises:
            UserError: see `load_recipe`.
        """
        settings = {**dict(self.settings), **self.noise.settings, "data.real.noise.seed": self.seed, "seed": self.seed}
        settings |= {"name": f"{self.folder}/{self.id}".replace("/", "-")}
        if self.choices.space == PAPER_SPACE:
            settings["threat.space"] = PAPER_SPACE
        if self.choices.curves == "test":
            settings["release.every_epochs"] = 1
        for word in self.choices.settings:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise UserError(f"'{word}' is not an override. Write key=value, for instance train.epochs=2.")
            settings[key] = _scalar(value, word)
        if run_dir is not None:
            settings["run_dir"] = str(run_dir)
        return load_recipe(self.edition.base, settings)


@dataclass(frozen=True)
class Stage:
    """A part of a grid: every method at every noise."""

    name: str
    methods: tuple[str, ...]
    noises: tuple[Noise, ...]


@dataclass(frozen=True)
class Grid:
    """One table or figure."""

    name: str
    title: str
    stages: tuple[Stage, ...]
    methods: dict[str, dict[str, Any]]  # of methods.yaml, all of them
    editions: dict[str, Edition]  # all of them
    seeds: dict[str, int] = field(default_factory=dict)  # by method, instead of the edition's
    uses: dict[str, list[str]] = field(default_factory=dict)  # requested edition -> those it consists of
    paper: dict[str, dict[str, str]] = field(default_factory=dict)  # table of paper.csv -> our method -> its name there
    omissions: tuple[str, ...] = ()  # what the paper does not say, and what stands here instead

    def cells(self, edition: str, choices: Choices | None = None, seeds: int | None = None) -> list[Cell]:
        """The cells in the order in which they are run: stage by stage, and all methods and noises of a seed together.

        Args:
            edition: a name in editions.yaml; `paper` may stand for several.
            seeds: number of seeds, instead of the grid's and the edition's.

        Raises:
            UserError: there is no such edition, or two exceptions of it contradict each other.
        """
        choices = choices or Choices()
        check_choice("--edition", edition, self.editions)
        check_value("--seeds", seeds, seeds is None or seeds >= 1, "at least 1")
        found: dict[tuple[str, str], Cell] = {}
        for name in self.uses.get(edition, [edition]):
            for stage in self.stages:
                for cell in self._of_stage(stage, self.editions[name], choices, seeds):
                    found.setdefault((name, cell.id), cell)
        return list(found.values())

    def _of_stage(self, stage: Stage, edition: Edition, choices: Choices, seeds: int | None) -> Iterable[Cell]:
        usual = self.seeds or edition.seeds
        counts = {method: seeds or usual.get(method, usual["default"]) for method in stage.methods}
        for seed in range(max(counts.values())):
            for noise in stage.noises:
                kind = ASYMMETRIC[choices.noise] if noise.kind == "asymmetric" else noise.kind
                for method in stage.methods:
                    if seed < counts[method]:
                        yield self._cell(edition, method, Noise(kind, noise.rate), seed, choices, stage.name)

    def _cell(self, edition: Edition, method: str, noise: Noise, seed: int, choices: Choices, stage: str) -> Cell:
        settings = {key: value for key, value in self.methods[method].items() if key not in _FACTS}
        given: dict[str, Any] = {}
        for override in edition.overrides:
            if override.applies(method, noise):
                for key, value in override.settings.items():
                    if key in given and given[key] != value:
                        both = f"{key} is {given[key]} in one exception and {value} in another"
                        raise UserError(f"Edition {edition.name} contradicts itself for {method} at {noise}: {both}.")
                    given[key] = value
        return Cell(edition, method, noise, seed, choices, stage, tuple({**settings, **given}.items()))


# ---- reading --------------------------------------------------------------------------------------------------------


def grid_names(folder: Path = GRIDS) -> list[str]:
    """The grids in a folder."""
    names = (path.stem for path in folder.glob("*.yaml"))
    return sorted(name for name in names if f"{name}.yaml" not in (EDITIONS, METHODS) and not name.startswith("base_"))


def read_grid(what: str) -> Grid:
    """A grid of the package by name, or a file of your own; editions.yaml and methods.yaml beside it come first.

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
    methods, editions = (_beside(path, name) for name in (METHODS, EDITIONS))
    raw = _mapping(path)
    known_methods = _methods(methods)
    known_editions = _editions(editions, known_methods)
    _known(raw, ("title", "stages", "seeds", "editions", "paper", "omissions"), path)
    stages = tuple(_stage(one, number, known_methods, path) for number, one in enumerate(_list(raw, "stages", path), 1))
    check_value(f"{path}: stages", len(stages), len(stages) > 0, "at least one stage")
    used = {method for stage in stages for method in stage.methods}
    return Grid(
        path.stem,
        str(raw.get("title", path.stem)),
        stages,
        known_methods,
        known_editions,
        _seeds(raw.get("seeds"), used, path),
        _uses(raw.get("editions") or {}, known_editions, path),
        _paper(raw.get("paper") or {}, used, path),
        tuple(map(str, raw.get("omissions") or ())),
    )


def _beside(path: Path, name: str) -> Path:
    return own if (own := path.with_name(name)).is_file() else GRIDS / name


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML file; a key that is there twice is an error."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must be a mapping of names to values.")
    return content


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
        if name not in known:
            raise UserError(f"{where}: there is no {quoted(name)}. {did_you_mean(str(name), known)}")
        if name in value[:number]:
            raise UserError(f"{where} names {name} twice. Remove one.")
    return tuple(value)


def _methods(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, settings in _mapping(path).items():
        where = f"{path}: {name}"
        check_value(
            f"{path}: the method", name, _METHOD.fullmatch(name), "lower-case letters, digits, `_`, `.` and `-`"
        )
        if not isinstance(settings, dict) or "objective.name" not in settings:
            raise UserError(f"{where} must be a mapping of recipe keys to values, with objective.name.")
        found[name] = {str(key): value for key, value in settings.items()}
    return found


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
    if not isinstance(raw, dict):
        raise UserError(f"{where} must be a mapping with the keys base, test and evaluation.")
    _known(raw, ("title", "base", "test", "evaluation", "seeds", "overrides"), where)
    test, evaluation = (_section(raw, key, where) for key in ("test", "evaluation"))
    _known(test, ("shards", "prepare"), f"{where}: test")
    _known(evaluation, ("attacks", "images", "aa_images", "last"), f"{where}: evaluation")
    base = path.with_name(str(raw.get("base")))
    if not base.is_file():
        raise UserError(f"{where}: there is no base recipe {base}.")
    sizes = {key: evaluation.get(key) for key in ("images", "aa_images")}
    for key, size in sizes.items():
        check_value(f"{where}: {key}", size, size is None or (type(size) is int and size >= 1), "at least 1")
    return Edition(
        name,
        str(raw.get("title", name)),
        base,
        str(test.get("shards")),
        str(test.get("prepare", "")),
        str(evaluation.get("attacks")),
        **sizes,
        last_attacks=evaluation.get("last"),
        seeds=_seeds(raw.get("seeds", 1), methods, path),
        overrides=tuple(_override(one, f"{where}: overrides", methods) for one in raw.get("overrides") or ()),
    )


def _section(raw: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} is {quoted(value)}; it must be a mapping of keys to values.")
    return value


def _override(raw: Any, where: str, methods: Mapping[str, Any]) -> Override:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {quoted(raw)} must be a mapping with the keys set and source.")
    _known(raw, ("methods", "noises", "set", "source"), where)
    if not raw.get("source"):
        raise UserError(f"{where}: {quoted(raw)} has no source. Say where its values come from.")
    noises = raw.get("noises") or []
    for text in noises:
        if text not in NOISES:
            _noise(text, where)
    names = _names(raw["methods"], f"{where}: methods", methods) if raw.get("methods") else ()
    return Override(_section(raw, "set", where), str(raw["source"]), names, tuple(noises))


def _uses(raw: dict[str, Any], editions: Mapping[str, Edition], path: Path) -> dict[str, list[str]]:
    for name, parts in raw.items():
        _names([name], f"{path}: editions", editions)
        _names(parts, f"{path}: editions: {name}", editions)
    return raw


def _paper(raw: dict[str, Any], methods: Iterable[str], path: Path) -> dict[str, dict[str, str]]:
    """Table -> our method -> its name in the table."""
    for table, names in raw.items():
        _names(list(names or {}) or ["-"], f"{path}: paper: {table}", [*methods, "-"])
    return {table: {ours: str(theirs) for ours, theirs in (names or {}).items()} for table, names in raw.items()}


def _scalar(text: str, word: str) -> Any:
    """A value of the command line, read as YAML."""
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise UserError(f"The override '{word}' cannot be read: {first_line(error)}") from error
