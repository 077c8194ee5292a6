"""Grids: which trainings a table, a figure or the benchmark consists of, read from YAML files.

    recipes/grids/NAME.yaml       one grid: its stages (methods, noises, seeds), what is run first
    recipes/grids/editions.yaml   what it is run on: base recipe, test images, evaluation, exceptions
    recipes/grids/methods.yaml    what each method sets in the base recipe
    recipes/grids/base_*.yaml     the base recipes

A *cell* is one training with its evaluation. Grids share cells: one edition has one recipe for each (method, noise, seed).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nrat_scale.core.errors import UserError, check_choice, check_value, first_line
from nrat_scale.recipe import RecipeSpec, load_recipe
from nrat_scale.threat import SPACES

PAPER_SPACE = "released_code"
# `--noise`: the kind that stands for `asymmetric` in the grids.
ASYMMETRIC = {"default": "asymmetric", "text": "asymmetric_bidirectional", "released": "asymmetric_released"}
FACTS = ("title", "source")  # of a method; its other keys are recipe keys
# Keys that no override may set: they are the axes of a grid, or follow from the cell. Key -> what sets it.
AXES = {
    "objective.name": "its methods; choose some with --only",
    "data.real.noise.kind": "its noises; choose some with --only",
    "data.real.noise.rate": "its noises; choose some with --only",
    "data.real.noise.seed": "its seeds; choose their number with --seeds",
    "seed": "its seeds; choose their number with --seeds",
    "threat.space": "--space",
    "run_dir": "--out",
    "name": "the cell",
    "release.every_epochs": "--curves",
}


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


@dataclass(frozen=True, eq=False)
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
        for key in self.overrides:
            if key in AXES:
                raise UserError(f"{key} cannot be set for all cells of a grid: it is set by {AXES[key]}.")

    @property
    def overrides(self) -> dict[str, Any]:
        """`settings` as keys and values; raises `UserError` for what is no override."""
        found = {}
        for word in self.settings:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise UserError(f"'{word}' is not an override. Write key=value, for instance train.epochs=2.")
            found[key] = _scalar(value, word)
        return found

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
            UserError: see `load_recipe`; or a section, or the base recipe, changes what the cell is named by.
        """
        settings = {**dict(self.settings), **self.noise.settings, "data.real.noise.seed": self.seed, "seed": self.seed}
        settings |= {"name": f"{self.folder}/{self.id}".replace("/", "-")}
        if self.choices.space == PAPER_SPACE:
            settings["threat.space"] = PAPER_SPACE
        if self.choices.curves == "test":
            settings["release.every_epochs"] = 1
        settings |= self.choices.overrides
        if run_dir is not None:
            settings["run_dir"] = str(run_dir)
        try:
            recipe = load_recipe(self.edition.base, settings)
            self._check_axes(recipe)
        except UserError as error:
            raise UserError(f"{self.edition.name}/{self.id}: {error}") from error
        return recipe

    def _check_axes(self, recipe: RecipeSpec) -> None:
        """Refuse another seed, noise or space than the cell's: a whole section such as `threat={...}`, or the base, set it."""
        noise = recipe.data.real.noise
        for key, found, wanted in (
            ("seed", recipe.seed, self.seed),
            ("data.real.noise.kind", noise.kind, self.noise.kind),
            ("data.real.noise.rate", noise.rate, self.noise.rate),
            ("data.real.noise.seed", noise.seed, self.seed),
            ("threat.space", recipe.threat.space, self.choices.space),
        ):
            if found != wanted:
                raise UserError(f"{key} is {found} instead of {wanted}: it is set by {AXES[key]}. Remove it elsewhere.")


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
    references: dict[str, str] = field(default_factory=dict)  # method -> the one that is subtracted from it, not NRAT
    prepare: dict[str, str] = field(
        default_factory=dict
    )  # edition -> commands that make what its cells need besides data sets
    allowed: tuple[str, ...] = ()  # editions that it makes sense on; empty: all
    path: Path = Path("recipes/grids/GRID.yaml")  # its file, as it is printed

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
        if self.allowed and edition not in self.allowed:
            raise UserError(
                f"{self.name} is not for the edition {edition}: {self.title}. It is for {', '.join(self.allowed)}."
            )
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
        settings = {key: value for key, value in self.methods[method].items() if key not in FACTS}
        for key in choices.overrides:
            if key in settings:
                raise UserError(f"{key} cannot be set for all cells of this grid: the method {method} has its own.")
        given: dict[str, Any] = {}
        for override in edition.overrides:
            if override.applies(method, noise):
                for key, value in override.settings.items():
                    if key in given and given[key] != value:
                        both = f"{key} is {given[key]} in one exception and {value} in another"
                        raise UserError(f"Edition {edition.name} contradicts itself for {method} at {noise}: {both}.")
                    given[key] = value
        return Cell(edition, method, noise, seed, choices, stage, tuple({**settings, **given}.items()))


def _scalar(text: str, word: str) -> Any:
    """A value of the command line, read as YAML."""
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise UserError(f"The override '{word}' cannot be read: {first_line(error)}") from error
