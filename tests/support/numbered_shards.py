"""Shards whose images contain their own source id."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from nrat_scale.data.batches import Batch
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, ValidationSpec
from nrat_scale.data.training_data import TrainingData
from nrat_scale.labels import NoiseSpec
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards

COLUMNS = ("images", "labels", "clean_labels", "generated", "ids")


def numbered_shards(folder: Path, n: int, *, seed: int = 0, size: int = 8, dataset: str = "custom") -> Path:
    """Shards of `n` images whose first two pixels are the source id, to compare images, labels and ids."""
    images = np.random.default_rng(n).integers(0, 256, (n, size, size, 1)).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(n) // 256, np.arange(n) % 256
    source = LabelledArrays(images, np.arange(n) % 10, dataset, tuple("0123456789"))
    return write_shards(source, folder, block_size=32, shard_size=64, seed=seed, progress=False)


def two_sources(folder: Path) -> DataSpec:
    """130 real images in 3 shards, 640 generated ones in 10."""
    real, generated = numbered_shards(folder / "real", 130), numbered_shards(folder / "generated", 640)
    return DataSpec(
        batch_size=24,
        real=RealSpec(str(real), NoiseSpec("symmetric", 0.4)),
        generated=GeneratedSpec(str(generated), 0.7),
        validation=ValidationSpec(source="generated", size=40),
    )


def columns(batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """The columns of several batches, joined."""
    batches = list(batches)
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in COLUMNS}


def damage(folder: str | None, number: int) -> None:
    """Change the last byte of a shard."""
    path = Path(str(folder)) / f"shard-{number:05d}.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def not_validated(data: TrainingData, count: int) -> list[int]:
    """Numbers of `count` generated shards without a validation image."""
    source = data.sources[1]
    used = set(source.shards.shards_of(source.held_out).tolist())
    return [number for number in range(len(source.shards.names)) if number not in used][:count]
