"""The labels that an audit is of: as stored, or with the label noise that training would inject."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.data.shards import ShardSet, ShardUnusable
from nrat_scale.data.source import noisy_labels
from nrat_scale.data.spec import GENERATED, REAL
from nrat_scale.labels import MATRIX, NONE, NoiseSpec
from nrat_scale.recipe import RecipeSpec
from nrat_scale.remote.address import is_remote


@dataclass(frozen=True)
class AuditedLabels:
    """The given labels of every image by position; `given` and `clean` are None for labels as stored."""

    shards: ShardSet
    where: str  # the folder or address of the shards, as the user gave it: it can name some of a folder's shards
    noise: NoiseSpec | None  # None: no noise is injected
    given: np.ndarray | None  # int32 [N]
    clean: np.ndarray | None  # int32 [N]: the labels before the injection

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m], at `positions` [m]."""
        return self.shards.labels(positions) if self.given is None else self.given[positions].astype(np.int64)

    @property
    def description(self) -> dict[str, Any] | None:
        """The noise as audit.json and the sidecar name it: kind, rate, seed, and what else is not the default."""
        if self.noise is None:
            return None
        usual, values = asdict(NoiseSpec()), asdict(self.noise)
        return {key: value for key, value in values.items() if key in ("kind", "rate", "seed") or value != usual[key]}


def parse_noise(text: str) -> NoiseSpec:
    """The noise `KIND:RATE:SEED`, such as `symmetric:0.4:0`; `KIND:RATE` has seed 0, `none` injects nothing.

    `matrix:FILE:SEED` has the JSON or CSV file of a transition matrix instead of a rate.

    Raises:
        UserError: another form, an unknown kind, a rate that is none.
    """
    kind, *numbers = text.strip().split(":")
    if kind == MATRIX and numbers and numbers[0]:
        stated = len(numbers) > 1 and numbers[-1].lstrip("-").isdecimal()
        seed = int(numbers.pop()) if stated else 0
        return NoiseSpec(kind=MATRIX, matrix=":".join(numbers), seed=seed)
    try:
        rate, seed = float(numbers[0]) if numbers else 0.0, int(numbers[1]) if len(numbers) > 1 else 0
        if len(numbers) > 2 or (not numbers and kind != NONE):
            raise ValueError(text)
    except ValueError:
        raise UserError(f"--noise {quoted(text)} is not KIND:RATE:SEED, such as symmetric:0.4:0.") from None
    try:
        return NoiseSpec(kind=kind, rate=rate, seed=seed)
    except UserError as error:
        raise UserError(f"--noise {quoted(text)}: {error}") from error


def recipe_noise(recipe: RecipeSpec, data: str) -> NoiseSpec:
    """The noise that `recipe` injects into the labels of the shards `data`, which may be its real or its generated images.

    Raises:
        UserError: the recipe injects noise, and trains on other shards.
    """
    injected = []
    for kind in (REAL, GENERATED):
        noise, where = recipe.data.noise_of(kind), getattr(recipe.data, kind).shards
        if where is not None and _same(where, data):
            return noise
        if noise.injects and where is not None:
            injected.append(f"data.{kind}.noise.kind is '{noise.kind}' and data.{kind}.shards is {where}")
    if injected:
        raise UserError(
            f"The recipe's {injected[0]}, not {data}: it does not say which labels to audit. Give --noise none, or "
            "--noise KIND:RATE:SEED."
        )
    return NoiseSpec()


def _same(one: str, other: str) -> bool:
    """Whether two addresses or folders of shards are the same."""
    if one.rstrip("/") == other.rstrip("/"):
        return True
    return not is_remote(one) and not is_remote(other) and Path(one).resolve() == Path(other).resolve()


def audited_labels(shards: ShardSet, where: str, noise: NoiseSpec) -> AuditedLabels:
    """The labels of `shards`, which are at `where`, with `noise`; without noise nothing is read.

    Raises:
        UserError: the noise does not fit the labels.
    """
    if not noise.injects:
        return AuditedLabels(shards, where, None, None, None)
    try:
        given, clean = noisy_labels(shards, noise)
    except ShardUnusable:
        raise
    except UserError as error:
        if noise.kind == MATRIX:
            raise
        raise UserError(f"{error} An audit takes what --noise cannot say from the recipe of --recipe.") from error
    return AuditedLabels(shards, where, noise, given.astype(np.int32), clean.astype(np.int32))
