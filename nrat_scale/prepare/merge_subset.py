"""What `shard_dataset.py` does with shards that exist: verify, info (with a contact sheet), merge, subset.

Each subcommand is one function that returns the line or lines to print, and raises `UserError` where the user erred or the
shards are damaged. None changes the shards that it is given.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json, write_json
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.index import INDEX
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.prepare.info import label_chunks
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")  # as `shards` admits


# ---- merge ----------------------------------------------------------------------------------------------------------


def merge(folders: Sequence[Path], out: Path) -> str:
    """Write the index `out` (PARENT/index.json) over shard folders that lie in PARENT; no shard is copied or changed.

    The ids of each set are shifted by the id spaces of those before it.

    Raises:
        UserError: a folder is not in PARENT, is given twice, is damaged or differs in shape or classes; `out` exists.
    """
    if out.name != INDEX:
        raise UserError(f"--out must be PARENT/{INDEX}, where PARENT holds the shard folders, not {out}.")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already and is never overwritten. Remove it yourself.")
    names = [_name_in(folder, out.parent) for folder in folders]
    if len(set(names)) != len(names):
        raise UserError("A folder is given twice. Every set can be merged once.")
    sets = [open_shards(folder, str(folder)) for folder in folders]
    for folder, shards in zip(folders, sets, strict=True):
        for what, mine, other in (
            ("image shape", list(shards.image_shape), list(sets[0].image_shape)),
            ("classes", list(shards.class_names), list(sets[0].class_names)),
        ):
            if mine != other:
                raise UserError(
                    f"{folder} has other {what} than {folders[0]}: {_short(mine)} instead of {_short(other)}."
                )
        shards.verify()
    merged = _merged(names, sets)
    ShardSet(out.parent, merged, str(out))  # what is written can be opened
    write_json(out, merged)
    return f"{out}: {merged['num_images']} images in {len(merged['shards'])} shards of {len(sets)} folders"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _name_in(folder: Path, parent: Path) -> str:
    """The path of `folder` below `parent`, as the names of shards begin."""
    here, there = Path(os.path.abspath(folder)), Path(os.path.abspath(parent))
    if not here.is_relative_to(there) or here == there:
        raise UserError(f"{folder} does not lie in {parent}. Merged folders must lie below the index that names them.")
    name = here.relative_to(there).as_posix()
    if not _FOLDER_NAME.fullmatch(name):
        raise UserError(f"{name} cannot stand in an index. Rename it: letters, digits, '.', '_' and '-' only.")
    return name


def _merged(names: Sequence[str], sets: Sequence[ShardSet]) -> dict[str, Any]:
    indices = [read_json(Path(shards.folder) / INDEX, "index") for shards in sets]
    parts, first_id = [], 0
    for index, shards in zip(indices, sets, strict=True):
        parts += [{**part, "first_id": part["first_id"] + first_id} for part in index["parts"]]
        first_id += shards.num_ids
    datasets = {shards.dataset for shards in sets}
    return {
        **indices[0],
        "dataset": datasets.pop() if len(datasets) == 1 else "custom",
        "num_images": sum(len(shards) for shards in sets),
        "class_counts": np.sum([shards.class_counts for shards in sets], axis=0).tolist(),
        "parts": parts,
        "source": [file for index in indices for file in index["source"]],
        "shards": [
            {**shard, "name": f"{name}/{shard['name']}"}
            for name, index in zip(names, indices, strict=True)
            for shard in index["shards"]
        ],
    }


# ---- subset ---------------------------------------------------------------------------------------------------------


class _Chosen:
    """The images at some positions of shards, as an array that is read only where it is indexed."""

    def __init__(self, shards: ShardSet, positions: np.ndarray) -> None:
        self._shards, self._positions = shards, positions
        self.shape = (len(positions), *shards.image_shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._shards.images(self._positions[rows])


def subset(
    where: str,
    out: Path,
    *,
    per_class: int | None = None,
    ids: Path | None = None,
    scores: Path | None = None,
    keep: str | None = None,
    seed: int = 0,
    **sizes: Any,
) -> str:
    """Write some samples of the shards at `where` as shards of their own, in their order and under their source ids.

    Args:
        per_class: that many of each class, the first in an order drawn with `seed`.
        ids: file of source ids, .npy (integers [m]) or .txt (one a line).
        scores: .npy of numbers [number of source ids]; the samples with the highest are kept, of equal ones the first.
        keep: with `scores`, how many: a number, or a fraction such as 0.8.
        sizes: see `write_shards`.

    Raises:
        UserError: not exactly one selection, or an impossible one.
    """
    if [per_class, ids, scores].count(None) != 2 or (scores is None) != (keep is None):
        raise UserError("Give exactly one selection: --per-class N, --ids FILE, or --scores FILE with --keep.")
    shards = open_shards(where, where)
    shards.verify()
    here = shards.source_ids(np.arange(len(shards)))
    if per_class is not None:
        positions, how = _first_of_each_class(shards, here, per_class, seed), {"per_class": per_class, "seed": seed}
    elif ids is not None:
        positions, how = _positions_of_ids(shards, _read_ids(ids), ids), {}
    else:
        assert scores is not None and keep is not None
        positions, how = _highest(_read_scores(scores, shards)[here], here, keep), {}
    positions = np.sort(positions)  # in stored order, which is mixed already
    source = LabelledArrays(
        _Chosen(shards, positions), shards.labels(positions), shards.dataset, shards.class_names,
        tuple(shards.source_files),
    )  # fmt: skip
    options = {"shards": shards.fingerprint, **how}
    write_shards(source, out, ids=here[positions], num_ids=shards.num_ids, options=options, **sizes)
    return f"{out}: {len(positions)} of the {len(shards)} images of {where}"


def _first_of_each_class(shards: ShardSet, ids: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    rank = hash64(derive(seed, "subset"), ids)  # of the id, so that it does not depend on the order of the shards
    labels = np.concatenate(list(label_chunks(shards)))
    chosen = []
    for label, name in enumerate(shards.class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise UserError(f"The class '{name}' has only {len(members)} images. Lower --per-class ({per_class}).")
        chosen.append(members[np.argsort(rank[members], kind="stable")[:per_class]])
    return np.concatenate(chosen)


def _load_npy(path: Path, what: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"The {what} {path} is no .npy file of numbers ({error}).") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1:
        raise UserError(f"The {what} {path} must be an .npy file with one array of one dimension.")
    return array


def _read_ids(path: Path) -> np.ndarray:
    """int64 [m] of a .npy or .txt file."""
    what = "file of ids"
    if path.suffix == ".npy":
        ids = _load_npy(path, what)
        if ids.dtype.kind not in "iu":
            raise UserError(f"The {what} {path} has dtype {ids.dtype}, expected integers.")
    else:
        try:
            lines = path.read_text(encoding="utf-8").split()
            ids = np.asarray([int(line) for line in lines], np.int64)
        except OSError as error:
            raise UserError(f"The {what} {path} cannot be read ({error.strerror}).") from error
        except (ValueError, OverflowError) as error:
            raise UserError(f"The {what} {path} must have one integer on each line ({error}).") from error
    if not len(ids):
        raise UserError(f"The {what} {path} is empty.")
    if int(ids.max()) > np.iinfo(np.int64).max:
        raise UserError(f"There is no sample with the source id {int(ids.max())}, which {path} names.")
    return ids.astype(np.int64)


def _positions_of_ids(shards: ShardSet, ids: np.ndarray, path: Path) -> np.ndarray:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise UserError(f"{path} names the source id {unique[counts > 1][0]} more than once.")
    positions = shards.positions_of(ids)
    if (positions < 0).any():
        raise UserError(
            f"There is no sample with the source id {ids[positions < 0][0]}, which {path} names "
            f"({int((positions < 0).sum())} unknown ids)."
        )
    return positions


def _read_scores(path: Path, shards: ShardSet) -> np.ndarray:
    """float [number of source ids]."""
    scores = _load_npy(path, "file of scores")
    if scores.dtype.kind not in "iuf":
        raise UserError(f"The file of scores {path} has dtype {scores.dtype}, expected numbers.")
    if len(scores) != shards.num_ids:
        raise UserError(
            f"The file of scores {path} has {len(scores)} numbers, expected {shards.num_ids}: one for each source id."
        )
    if np.isnan(scores).any():
        raise UserError(
            f"The file of scores {path} holds NaN, for instance for the source id {np.isnan(scores).argmax()}."
        )
    return scores


def _highest(scores: np.ndarray, ids: np.ndarray, keep: str) -> np.ndarray:
    """int64 [m]: the places of the highest of `scores` [N]; of equal ones those with the lowest `ids` [N] come first."""
    try:
        number = int(keep) if keep.isdecimal() else max(1, round(float(keep) * len(scores)))
        possible = 1 <= number <= len(scores) and (keep.isdecimal() or 0 < float(keep) <= 1)
    except (ValueError, OverflowError):
        possible = False
    if not possible:
        raise UserError(f"--keep {keep} is neither a number in 1..{len(scores)} nor a fraction such as 0.8.")
    return np.lexsort((ids, -scores.astype(np.float64)))[:number]
