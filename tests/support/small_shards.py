"""Small shards of random images."""

from pathlib import Path

import numpy as np

from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards


def random_source(
    num_images: int = 70, shape: tuple[int, int, int] = (8, 6, 3), num_classes: int = 7, seed: int = 0
) -> LabelledArrays:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    labels = generator.integers(0, num_classes, num_images)
    return LabelledArrays(
        images, labels, "custom", tuple(f"class {i}" for i in range(num_classes)), ({"name": "made.npz"},)
    )


def write_small(folder: Path, source: LabelledArrays | None = None, *, seed: int = 0) -> Path:
    """Shards of 32 images in blocks of 16; the default source of 70 images gives three shards of 32, 32 and 6."""
    return write_shards(source or random_source(), folder, block_size=16, shard_size=32, seed=seed, progress=False)


def listing(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
