"""Sidecars of audits with chosen scores, written without the code that writes them in earnest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.data.shards import ShardSet


def write_sidecar(
    folder: Path,
    shards: ShardSet,
    quality: np.ndarray,
    *,
    given: np.ndarray | None = None,
    suggested: np.ndarray | None = None,
    noise: dict[str, Any] | None = None,
    **columns: np.ndarray,
) -> Path:
    """The folder of an audit of `shards` with `quality` [N] by position.

    Args:
        given: labels by position; by default those in the shards.
        suggested: by default the next class wherever the quality is below 0.5, else the given label.
        columns: replace other arrays.
    """
    positions = np.arange(len(shards))
    given = shards.labels(positions) if given is None else given
    other = np.where(quality < 0.5, (given + 1) % shards.num_classes, given)
    suggested = other if suggested is None else suggested
    arrays = {
        "ids": shards.source_ids(positions),
        "given": given.astype("<i4"),
        "suggested": suggested.astype("<i4"),
        "p_given": quality.astype("<f4"),
        "p_suggested": (1 - quality).astype("<f4"),
        "quality": quality.astype("<f4"),
        "suspect": (quality < 0.5) & (suggested != given),
        **columns,
    }
    out = folder / "scores"
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, values in arrays.items():
        path = out / f"{name}.npy"
        np.save(path, values)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest = {
        "format": "nrat_scale.audit_scores",
        "version": 1,
        "num_images": len(shards),
        "num_classes": shards.num_classes,
        "class_names": list(shards.class_names),
        "fingerprint": shards.fingerprint,
        "noise": noise,
        "models": [],
        "audit": "0123456789abcdef",
        "files": files,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    return folder
