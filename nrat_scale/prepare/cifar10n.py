"""CIFAR-10N's human labels: from the published torch file to an npz that training reads without unpickling.

CIFAR-10_human.pt (https://github.com/UCSC-REAL/cifar-10-100n, Wei et al. 2022) is a pickle of a dict of six NumPy
arrays. It is opened by torch's restricted unpickler, which here may rebuild int64 arrays and nothing else; its labels are
checked against the shards that they belong to.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.data.shards import open_shards
from nrat_scale.labels import HUMAN_SETS
from nrat_scale.prepare.readers.arrays import reading

CLEAN = "clean_label"
_KEYS = (CLEAN, *HUMAN_SETS.values())
_MAX_BYTES = 1 << 28  # the published file has 2.4 MB

# numpy's function that makes an empty array to be filled. torch knows it by the name of this numpy; files carry either.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ADMITTED: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.int64)),
]


def convert_human_labels(path: Path, shards: Path, out: Path) -> list[str]:
    """Write the five sets of human labels and the clean labels into the new npz `out`, int64 [n] each, in source order.

    Args:
        path: CIFAR-10_human.pt.
        shards: of the training images that they belong to.

    Returns:
        A line for each set: its name and its share of wrong labels.

    Raises:
        UserError: not that file, labels of other images, or `out` exists or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already and is never overwritten. Choose another --out, or remove it yourself.")
    data = open_shards(shards)
    data.verify()
    clean = data.labels(data.in_source_order())
    labels = _loaded(path, len(clean), data.num_classes)
    if wrong := int((labels[CLEAN] != clean).sum()):
        raise UserError(
            f"`{CLEAN}` in {path} differs from the shards {shards} in {wrong} of {len(clean)} labels: they are not the same "
            "images in the same order. Convert the training split: shard_dataset.py cifar10 ROOT --split train."
        )
    content = io.BytesIO()
    np.savez(content, **labels)  # type: ignore[arg-type]  # a key might be an option's name; these are not
    make_folder(out.parent)
    write_atomically(out, content.getvalue())
    rates = {name: 100 * float((labels[key] != clean).mean()) for name, key in HUMAN_SETS.items()}
    return [f"{name}: {rate:.2f} % of {len(clean)} labels are wrong" for name, rate in rates.items()]


def _loaded(path: Path, num_labels: int, num_classes: int) -> dict[str, np.ndarray]:
    """The six arrays, int64 [num_labels] in [0, num_classes)."""
    content = _unpickled(path)
    if not isinstance(content, dict) or set(content) != set(_KEYS):
        there = ", ".join(sorted(map(str, content))[:10]) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds {there}; expected a dict of {', '.join(_KEYS)} (CIFAR-10N).")
    for key in _KEYS:
        labels = content[key]
        if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (num_labels,):
            what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else type(labels).__name__
            raise UserError(f"`{key}` in {path} is {what}, expected int64 [{num_labels}]: one label for each image.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"`{key}` in {path} has values from {labels.min()} to {labels.max()}, expected 0..{num_classes - 1}."
            )
    return {key: np.ascontiguousarray(content[key]) for key in _KEYS}


def _unpickled(path: Path) -> object:
    with reading(path, "file of human labels"):
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, too many for CIFAR-10N's labels.")
        data = io.BytesIO(path.read_bytes())
    try:
        import torch  # the other subcommands do without

        with torch.serialization.safe_globals(_ADMITTED):
            return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever a damaged file makes its parts raise
        raise UserError(f"{path} is no file of CIFAR-10N's labels ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """In our words where torch would advise to open the file without any guard."""
    if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {asked[1]}, which is not admitted and was not run"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds something else than arrays of int64, and was not opened any further"
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
