"""A tiny recipe, its shards, and the training command in its own processes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards

ROOT = Path(__file__).parents[2]
RECIPE = """
threat: {eps: 0.1, step: 0.05, num_steps: 2}
model: {name: cnn4, kwargs: {width: 4, hidden: 16}}
data:
  batch_size: 16
  epoch_samples: 64
  real: {shards: REAL, noise: {kind: symmetric, rate: 0.4}, prepare: make real shards}
  generated: {shards: GENERATED, fraction: 0.5, prepare: make generated shards}
  validation: {size: 20}
  augment: {crop: 1, flip: false}
optim: {lr: 0.01, schedule: onecycle, pct_start: 0.5}
ema: {decay: 0.9, warmup_fraction: 0.25}
train: {epochs: 3, validation_attack: pgd2, keep: 5}
"""


def make_shards(
    folder: Path,
    n: int,
    seed: int,
    channels: int = 1,
    size: int = 12,
    *,
    dataset: str = "custom",
    shift: int = 0,
    **options: int,
) -> Path:
    """Images with a bright band whose place depends on the class, so that a tiny model can learn it.

    `shift` is added to the labels of every second ten images, which are then wrong.
    """
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    images = generator.integers(0, 90, (n, size, size, channels))
    for i, label in enumerate(labels):
        images[i, label : label + 3, :, :] += 120
    labels = np.where(np.arange(n) // 10 % 2 == 0, labels, (labels + shift) % 10)
    names = tuple("0123456789")
    return write_shards(
        LabelledArrays(images.astype(np.uint8), labels, dataset, names),
        folder,
        block_size=32,
        progress=False,
        **options,
    )


def digest(run: Path) -> dict[str, str]:
    """sha256 of what a resumed run must reproduce: the metrics and every tensor file of the last checkpoint."""
    checkpoint = named_checkpoint(run, "last")
    files = {name: value for name, value in checkpoint.sha256.items() if name.endswith(".safetensors")}
    return {"metrics": hashlib.sha256(RunFolder(run).metrics.read_bytes()).hexdigest(), **files}


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Train in two processes, by the command that users type."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "nrat_scale.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )
