"""Feeding through MosaicML `streaming` and `litdata`, each with the fastest of the settings that its documentation names.

Both store raw bytes without compression and collate by joining them, which was faster here than their array types with torch's own
collation. `streaming`: MDS, shuffling `py1e` (its default and advice), `stratified` batches, so that 30 % of each are real images.
`litdata`: `optimize` to chunks of 64 MB, `CombinedStreamingDataset` with weights 0.3 and 0.7.
"""

import functools
import importlib.metadata
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH, REAL_SHARE = 512, 0.3
SOURCES = ("real", "generated")
PACKAGES = {"streaming": "mosaicml-streaming", "litdata": "litdata"}  # module -> name on PyPI, in the extra `bench`
_PART = 5_000  # images of one call of litdata's function


def version(package: str) -> str | None:
    """The installed version of a package of PyPI, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(kind: str, folder: Path) -> None:
    """Write `real.npz` and `generated.npz` of `folder` in the format of the loader `kind`, a key of PACKAGES."""
    for source in SOURCES:
        _WRITERS[kind](folder / f"{source}.npz", folder / f"{kind}-{source}")


def _write_mds(npz: Path, out: Path) -> None:
    from streaming import MDSWriter

    with np.load(npz) as file, MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
        images, labels = file["image"], file["label"]
        for image, label in zip(images, labels, strict=True):
            writer.write({"image": image.tobytes(), "label": int(label)})


def _write_litdata(npz: Path, out: Path) -> None:
    for variable, name in (("DATA_OPTIMIZER_CACHE_FOLDER", "chunks"), ("DATA_OPTIMIZER_DATA_CACHE_FOLDER", "data")):
        os.environ[variable] = str(out.parent / f"litdata-{name}")  # instead of a folder in the home
    import litdata

    with np.load(npz) as file:
        num_images = len(file["label"])
    parts = [(first, min(first + _PART, num_images)) for first in range(0, num_images, _PART)]
    samples = functools.partial(_samples, npz)
    litdata.optimize(samples, parts, str(out), chunk_bytes="64MB", num_workers=1, start_method="fork", verbose=False)


def _samples(npz: Path, part: tuple[int, int]) -> Iterator[tuple[bytes, int]]:
    with np.load(npz) as file:
        images, labels = file["image"][slice(*part)], file["label"][slice(*part)]
    for image, label in zip(images, labels, strict=True):
        yield image.tobytes(), int(label)


_WRITERS = {"streaming": _write_mds, "litdata": _write_litdata}


# ---- reading --------------------------------------------------------------------------------------------------------


def joined(rows: list[Any]) -> tuple[Tensor, Tensor]:
    """A batch of (bytes, label) as uint8 [B, 32, 32, 3] and int64 [B]."""
    pairs = [(row["image"], row["label"]) if isinstance(row, dict) else row for row in rows]
    pixels = bytearray(b"".join(image for image, _ in pairs))
    labels = torch.tensor([label for _, label in pairs])
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 32, 32, 3), labels


def streaming(folder: Path, workers: int) -> Iterator[Any]:
    """MosaicML streaming: two streams in the proportions 0.3 and 0.7."""
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # an interrupted benchmark leaves some
    shares = dict(zip(SOURCES, (REAL_SHARE, 1 - REAL_SHARE), strict=True))
    streams = [Stream(local=str(folder / f"streaming-{name}"), proportion=share) for name, share in shares.items()]
    options: dict[str, Any] = {"shuffle": True, "shuffle_algo": "py1e", "batching_method": "stratified"}
    dataset = StreamingDataset(streams=streams, batch_size=BATCH, epoch_size=1_000 * BATCH, **options)
    return iter(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True, collate_fn=joined))


def litdata(folder: Path, workers: int) -> Iterator[Any]:
    """litdata: a combination with the weights 0.3 and 0.7, begun anew when one of the two ends."""
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset

    sets = [StreamingDataset(str(folder / f"litdata-{name}"), shuffle=True, drop_last=True) for name in SOURCES]
    both = CombinedStreamingDataset(sets, weights=(REAL_SHARE, 1 - REAL_SHARE), iterate_over_all=False)
    loader = StreamingDataLoader(both, batch_size=BATCH, num_workers=workers, drop_last=True, collate_fn=joined)
    return itertools.chain.from_iterable(itertools.repeat(loader))
