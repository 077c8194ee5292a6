"""Which samples of a source are not trained on: the validation split, and ids that the recipe excludes."""

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.data.shards import ShardSet
from nrat_scale.data.spec import ValidationSpec


def choose_held_out(shards: ShardSet, spec: ValidationSpec) -> np.ndarray:
    """The sorted positions int64 [size] that validation uses: a function of (index, spec), not of label noise.

    Of `data.validation.shards` it may use all; of training images, some must be left.

    `stratified` takes classes in proportion to their number in the index (largest remainders first), by the stored
    labels. It visits shards, and the samples of each, in a keyed random order. Shards are permuted when written, so the
    split reads one or two shards and fetches no others.

    Raises:
        UserError: there are too few images, or a class would be missing.
    """
    if spec.shards is not None and spec.size >= len(shards):
        return np.arange(len(shards))
    if spec.size >= len(shards):
        raise UserError(
            f"data.validation.size is {spec.size}, but {shards.folder} has only {len(shards)} images. "
            "Choose a smaller size, so that some are left to train on."
        )
    chosen = shards.first_in_source_order(spec.size) if spec.take == "first" else _stratified(shards, spec)
    held_out = np.bincount(shards.labels(chosen), minlength=shards.num_classes)
    missing = np.flatnonzero((held_out == 0) & (np.asarray(shards.class_counts) > 0))
    if len(missing):
        why = "the source is sorted by class, as the published 1m.npz is" if spec.take == "first" else "it is too small"
        raise UserError(
            f"The validation split (size {spec.size}, take {spec.take}) has no image of {len(missing)} of "
            f"{shards.num_classes} classes, such as '{shards.class_names[missing[0]]}': {why}. "
            "Set data.validation.take: stratified, and a size of at least one image a class."
        )
    return np.sort(chosen)


def _stratified(shards: ShardSet, spec: ValidationSpec) -> np.ndarray:
    exact = np.asarray(shards.class_counts) * spec.size / len(shards)
    quota = exact.astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: spec.size - quota.sum()]] += 1  # largest remainders
    chosen: list[np.ndarray] = []
    num_shards = len(shards.names)
    for number in KeyedPermutation(num_shards, spec.seed, "validation shards")(np.arange(num_shards)).tolist():
        first, last = shards.shard_starts[number], shards.shard_starts[number + 1]
        order = KeyedPermutation(int(last - first), spec.seed, "validation", number)
        positions = first + order(np.arange(last - first))
        labels = shards.labels(positions)
        for label in np.flatnonzero(quota):
            members = positions[labels == label][: quota[label]]
            quota[label] -= len(members)
            chosen.append(members)
        if not quota.any():
            break
    assert not quota.any(), "the class counts of the index are wrong"
    return np.concatenate(chosen)


def read_excluded(path: str, shards: ShardSet, key: str) -> np.ndarray:
    """The sorted positions of the source ids in an .npy file; `key` is the recipe key that names the file.

    Raises `UserError` if there is no such file, it does not hold integers [m], or the shards lack an id.
    """
    try:
        with open(path, "rb") as file:
            ids = np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except FileNotFoundError:
        raise UserError(f"There is no file of source ids at {path} ({key}).") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} ({key}) cannot be read as an .npy array of source ids ({error}).") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{path} ({key}) must hold integers of shape [m], not {ids.dtype} of shape {list(ids.shape)}.")
    positions = shards.positions_of(ids)
    if (positions < 0).any():
        raise UserError(f"{path} ({key}) names the source id {ids[positions < 0][0]}, which {shards.folder} lacks.")
    return np.unique(positions)
