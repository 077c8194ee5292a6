"""A grid of a few seconds: digits-like images, two methods, two noises, two steps of training."""

from pathlib import Path

from tests.support.runs import make_shards

GRID = """
title: A tiny grid
paper: {table1: {}}
stages:
  - {methods: [nrat, trades], noises: [none-0, symmetric-0.4]}
"""
EDITIONS = """
tiny:
  title: bands
  base: base_tiny.yaml
  test: {shards: TEST, prepare: make test shards}
  evaluation: {attacks: "natural,pgd2", images: 30}
  seeds: {default: 1, nrat: 2}
"""
BASE = """
threat: {eps: 0.1, step: 0.05, num_steps: 2}
model: {name: cnn4, kwargs: {width: 4, hidden: 8}}
objective: {name: nrat}
data:
  batch_size: 16
  epoch_samples: 32
  real: {shards: TRAIN, prepare: make train shards}
  validation: {size: 20}
  augment: {crop: 1, flip: false}
train: {epochs: 2, validation_attack: pgd2, trackers: []}
"""


def write_grid(folder: Path, *, shards: bool = True, **texts: str) -> Path:
    """Write tiny.yaml, editions.yaml and base_tiny.yaml, and the data that they name; returns the path of tiny.yaml.

    Args:
        texts: by name of a file without `.yaml`, its content instead of the usual one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shards:
        make_shards(folder / "train", 200, 0)
        make_shards(folder / "test", 60, 1)
    for name, text in ({"tiny": GRID, "editions": EDITIONS, "base_tiny": BASE} | texts).items():
        content = text.replace("TRAIN", str(folder / "train")).replace("TEST", str(folder / "test"))
        (folder / f"{name}.yaml").write_text(content)
    return folder / "tiny.yaml"
