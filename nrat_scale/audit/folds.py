"""Train one model for each fold on the images outside it, so that every image gets a prediction by a model that never saw it.

A fold is expressed in the recipe itself: `data.real.exclude` names the source ids that the model is not trained on. So a fold is
an ordinary run directory, and an interrupted one is resumed as such.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nrat_scale.audit.audited_labels import AuditedLabels
from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.shards import ShardSet
from nrat_scale.data.spec import GENERATED, REAL, AuditSpec
from nrat_scale.recipe import RecipeSpec, load_recipe

DEFAULT_RECIPE = Path(__file__).with_name("folds.yaml")
_CHUNK = 1 << 20  # images


@dataclass(frozen=True)
class Folds:
    """Which fold an image is in: a hash of its source id, so that it depends on no other image and on no label."""

    shards: ShardSet
    number: int
    seed: int

    def of(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m] in [0, number), of the images at `positions` [m]."""
        if self.number == 1:
            return np.zeros(len(positions), np.int64)
        ids = self.shards.source_ids(positions)
        return (hash64(derive(self.seed, "audit folds"), ids) % np.uint64(self.number)).astype(np.int64)


def class_counts(labels: AuditedLabels, folds: Folds) -> np.ndarray:
    """int64 [F, K]: the images of each fold by given label."""
    num_images, num_classes = len(folds.shards), folds.shards.num_classes
    counts = np.zeros((folds.number, num_classes), np.int64)
    for start in range(0, num_images, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, num_images))
        np.add.at(counts, (folds.of(positions), labels.at(positions)), 1)
    return counts


def check_classes(counts: np.ndarray, shards: ShardSet) -> None:
    """Refuse an empty class, one with fewer images than folds, and one of which a fold's model would see nothing.

    Args:
        counts: int [F, K], of `class_counts`.
    """
    folds, total = len(counts), counts.sum(axis=0)
    if len(total) < 2:
        raise UserError(
            f"{shards.folder} has one class, so that no label can be wrong. Give shards of at least 2 classes."
        )
    if len(empty := np.flatnonzero(total == 0)):
        name = quoted(shards.class_names[empty[0]])
        raise UserError(
            f"No image of {shards.folder} has the label {name} ({len(empty)} of {len(total)} classes are empty): nothing can be "
            "estimated about it. Prepare the shards without empty classes."
        )
    if folds == 1:
        return
    few = np.flatnonzero((total < folds) | (counts == total).any(axis=0))
    if len(few):
        label = int(few[np.argmin(total[few])])
        raise UserError(
            f"The class {quoted(shards.class_names[label])} of {shards.folder} has {total[label]} images, too few for {folds} "
            f"folds: the model of one of them would see none. Give fewer --folds, or another --seed."
        )


def fold_recipe(
    recipe: Path | None, overrides: Sequence[str] | Mapping[str, Any], labels: AuditedLabels, counts: np.ndarray
) -> RecipeSpec:
    """The recipe of a fold, but for its folder and its excluded images; None is the default one.

    It trains on the audited labels alone, without generated images, and validates once, at the end: the last weights are used,
    so that no image selects the checkpoint that predicts it.
    """
    path = recipe or DEFAULT_RECIPE
    for key in overrides if isinstance(overrides, Mapping) else (word.partition("=")[0] for word in overrides):
        if any(key == name or key.startswith(f"{name}.") for name in _SET_HERE):
            raise UserError(f"The audit sets {key} for each fold. Omit it.")
    epochs = load_recipe(path, overrides).train.epochs  # checks the overrides, too
    changes = dict(overrides) if isinstance(overrides, Mapping) else dict(map(_key_and_value, overrides))
    total = counts.sum(axis=0)
    noise = {"kind": "unknown", "rate": 0.0, "matrix": None} if labels.noise is None else dict(vars(labels.noise))
    values: dict[str, Any] = {
        "data.real.shards": labels.where,
        "data.real.prepare": None,
        "data.generated.shards": None,
        "data.generated.noise.kind": "auto",
        "data.generated.noise.rate": 0.0,
        "data.generated.noise.matrix": None,
        # An audit is of all labels: an earlier one must not act on them.
        **{
            f"data.{kind}.audit.{key}": value
            for kind in (REAL, GENERATED)
            for key, value in asdict(AuditSpec()).items()
        },
        "data.validation.source": "real",
        "data.validation.shards": None,
        "data.validation.labels": "given",
        "data.validation.take": "stratified",
        # Stratified by class, so that the rarest class has an image or two.
        "data.validation.size": int(min(max(64, 2 * -(-total.sum() // total.min())), max(total.sum() // 4, 1))),
        "train.validate_every": epochs,
        "train.max_steps": None,
        "release.every_epochs": None,
        "resume": "auto",
        **{f"data.real.noise.{key}": value for key, value in noise.items()},
    }
    return load_recipe(path, {**changes, **values})


_SET_HERE = (
    "run_dir",
    "data.real.shards",
    "data.real.exclude",
    "data.generated",
    "data.real.noise",
    "data.real.audit",
    "data.validation",
)


def _key_and_value(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    return key, yaml.safe_load(value)


def write_excluded(folder: Path, folds: Folds) -> list[Path]:
    """The .npy file of each fold, with the source ids that its model is not trained on."""
    make_folder(folder)
    paths = [folder / f"fold-{number}.ids.npy" for number in range(folds.number)]
    if all(path.is_file() for path in paths):
        return paths
    ids = folds.shards.source_ids(np.arange(len(folds.shards)))
    of_fold = folds.of(np.arange(len(ids)))
    for number, path in enumerate(paths):
        write_atomically(path, npy_bytes(np.sort(ids[of_fold == number])))
    return paths


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of an .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()
