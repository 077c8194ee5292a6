"""Convert CIFAR-10N's human labels from the published torch file to an npz, which training reads without unpickling.

CIFAR-10_human.pt (https://github.com/UCSC-REAL/cifar-10-100n, Wei et al. 2022) is a pickled dict of six NumPy arrays.
torch's restricted unpickler opens it and may rebuild nothing but int64 arrays.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, first_line, printable
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.readers.checks import read_small

CLEAN = "clean_label"

# numpy's function that creates an empty array to be filled; numpy 2 renamed its module, and files contain either name.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_NAMES = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_ALLOWED: list[Any] = [*((_RECONSTRUCT, name) for name in _NAMES), np.ndarray, np.dtype, type(np.dtype(np.int64))]


def convert_human_labels(path: Path, shards: Path, out: Path) -> str:
    """Write human and clean labels into the new npz `out`, int64 [n] in source order; returns the error rate of each set.

    Args:
        path: CIFAR-10_human.pt.
        shards: of CIFAR-10's training images, whose labels must equal the clean labels in the file.

    Raises:
        UserError: not that file, labels of other images, or `out` exists or cannot be written.
    """
    from nrat_scale.labels import HUMAN_SETS  # imports torch, which the other commands do not need

    if out.exists() or out.is_symlink():
        raise UserError(f"{out} already exists and is never overwritten. Choose another --out, or remove it yourself.")
    data = open_shards(shards)
    data.verify()
    clean = data.labels(data.in_source_order())
    labels = _read(path, [CLEAN, *HUMAN_SETS.values()], len(clean), data.num_classes)
    if wrong := int((labels[CLEAN] != clean).sum()):
        raise UserError(
            f"`{CLEAN}` in {path} differs from the shards {shards} in {wrong} of {len(clean)} labels. Give the shards of "
            "the training split: python -m nrat_scale.prepare cifar10 ROOT --split train."
        )
    content = io.BytesIO()
    np.savez(content, **labels)  # type: ignore[arg-type]  # a key could be the name of an option; these are not
    make_folder(out.parent)
    write_atomically(out, content.getvalue())
    rates = {name: 100 * float((labels[key] != clean).mean()) for name, key in HUMAN_SETS.items()}
    return "\n".join(f"{name}: {rate:.2f} % of {len(clean)} labels are wrong" for name, rate in rates.items())


def _read(path: Path, keys: list[str], num_labels: int, num_classes: int) -> dict[str, np.ndarray]:
    """The arrays `keys`, int64 [num_labels] in [0, num_classes)."""
    content = _unpickled(path)
    if not isinstance(content, dict) or set(content) != set(keys):
        found = ", ".join(sorted(map(str, content))[:10]) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} contains {printable(found)}; expected a dict of {', '.join(keys)} (CIFAR-10N).")
    for key in keys:
        labels = content[key]
        if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (num_labels,):
            what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else type(labels).__name__
            raise UserError(f"`{key}` in {path} is {what}, expected int64 [{num_labels}]: one label for each image.")
        if labels.min() < 0 or labels.max() >= num_classes:
            found = f"values from {labels.min()} to {labels.max()}"
            raise UserError(f"`{key}` in {path} has {found}, expected 0..{num_classes - 1}.")
    return {key: np.ascontiguousarray(content[key]) for key in keys}


def _unpickled(path: Path) -> object:
    data = io.BytesIO(read_small(path, "file of human labels", 1 << 28))  # the published one has 2.4 MB
    import torch

    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch's unpickler raise anything
        reason = first_line(error)[:200]
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for {asked[1]}, which is not allowed and was not run"
        elif isinstance(error, pickle.UnpicklingError):  # torch's message advises `weights_only=False`
            reason = "it is damaged, or contains something other than arrays of int64"
        raise UserError(f"{path} is not the file of CIFAR-10N's labels ({reason}).") from error
