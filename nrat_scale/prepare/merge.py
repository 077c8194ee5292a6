"""Merge folders of shards under one index, without copying them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import read_json, write_json
from nrat_scale.data.index import INDEX
from nrat_scale.data.shards import ShardSet, open_shards

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")  # as shard names in an index


def merge(folders: Sequence[Path], out: Path) -> str:
    """Write the index `out` (PARENT/index.json) over shard folders below PARENT; returns a summary line.

    The source ids of each folder are shifted by the number of ids of the folders before it.

    Raises:
        UserError: a folder is not below PARENT, given twice, damaged, or of other shape or classes; `out` exists.
    """
    if out.name != INDEX:
        raise UserError(f"--out must be PARENT/{INDEX}, where PARENT contains the shard folders, not {out}.")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} already exists and is never overwritten. Remove it yourself.")
    names = [_name_in(folder, out.parent) for folder in folders]
    if len(set(names)) != len(names):
        raise UserError("A folder is given twice. Each can be merged once.")
    sets = [open_shards(folder, str(folder)) for folder in folders]
    for folder, shards in zip(folders, sets, strict=True):
        for what, name in ("image shape", "image_shape"), ("classes", "class_names"):
            found, expected = getattr(shards, name), getattr(sets[0], name)
            if found != expected:
                difference = f"{quoted(list(found), 120)} instead of {quoted(list(expected), 120)}"
                raise UserError(f"The {what} of {folder} differs from {folders[0]}: {difference}.")
        shards.verify()
    index = _merged(names, sets)
    ShardSet(out.parent, index, str(out))  # checks the index before it is written
    write_json(out, index)
    return f"{out}: {index['num_images']} images in {len(index['shards'])} shards of {len(sets)} folders"


def _name_in(folder: Path, parent: Path) -> str:
    """The path of `folder` below `parent`: the prefix of its shards' names in the merged index."""
    name = Path(os.path.relpath(folder, parent)).as_posix()
    if name == "." or name.partition("/")[0] == "..":
        raise UserError(f"{folder} is not below {parent}. Merged folders must be below the folder of their index.")
    if not _FOLDER_NAME.fullmatch(name):
        raise UserError(f"{name} is not allowed in an index. Rename it: letters, digits, '.', '_' and '-' only.")
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
