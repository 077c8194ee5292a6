"""Predicted class probabilities of every image, streamed shard by shard into files: an interrupted audit continues with the next.

Each process predicts every W-th shard. It holds its models, a few chunks of images, and the probabilities of one shard.
"""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.audit.folds import npy_bytes
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.data.augment import to_float
from nrat_scale.data.batches import to_nchw
from nrat_scale.data.prefetch import ShardPrefetcher, prefetched
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.measures import memory_errors


class Probabilities:
    """The files of one set of shards: `NNNNN.npy`, float32 [images of the shard, M, K], M the predictions of an image.

    Args:
        folder: of the files.
        shards: the images.
        models: M; 1 for data, of which each image has the prediction of its own fold's model, F for a hold-out.
    """

    def __init__(self, folder: Path, shards: ShardSet, models: int) -> None:
        self.folder, self.shards, self._models = folder, shards, models

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npy"

    def _shape(self, number: int) -> tuple[int, int, int]:
        images = int(self.shards.shard_starts[number + 1] - self.shards.shard_starts[number])
        return images, self._models, self.shards.num_classes

    def missing(self) -> list[int]:
        """The shards without a complete file."""
        return [number for number in range(len(self.shards.names)) if not self._is_complete(number)]

    def _is_complete(self, number: int) -> bool:
        try:
            return np.load(self._path(number), "r", allow_pickle=False).shape == self._shape(number)
        except (OSError, ValueError, EOFError):
            return False

    def read(self, number: int) -> np.ndarray:
        """float32 [n, M, K] of shard `number`; raises `UserError` if the file is damaged, or these are no probabilities."""
        path = self._path(number)
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}). Remove it; the same command predicts it again."
            ) from error
        right = values.shape == self._shape(number) and values.dtype == np.float32
        if not right or not (values >= 0).all() or not (abs(values.sum(axis=2) - 1) < 1e-3).all():
            raise UserError(f"{path} does not hold probabilities. Remove it; the same command predicts it again.")
        return np.asarray(values)

    def predict(
        self,
        models: Sequence[nn.Module],
        fold_of: Callable[[np.ndarray], np.ndarray] | None,
        process: tuple[int, int],
        batch_size: int,
        progress: Callable[[int], Any] = lambda number: None,
    ) -> None:
        """Predict this process's part of the missing shards.

        Args:
            models: in evaluation mode on their device: [0, 1] images -> logits.
            fold_of: positions -> number of the model that predicts an image; None: all models predict all images.
            process: (rank, number of processes).
            batch_size: images in one forward pass.
            progress: called with the number of each shard that is done.

        Raises:
            UserError: a shard cannot be read, a file cannot be written, the device has too little memory.
            FloatingPointError: logits are not finite.
        """
        make_folder(self.folder)
        rank, num_processes = process
        mine = [
            number for number in range(rank, len(self.shards.names), num_processes) if not self._is_complete(number)
        ]
        prefetcher = ShardPrefetcher(self.shards) if self.shards.is_remote else None
        try:
            for place, number in enumerate(mine):
                if prefetcher is not None:
                    prefetcher.want(mine[place : place + 3])
                out = np.empty(self._shape(number), np.float32)
                for rows, positions, images in prefetched(self._chunks(number, batch_size)):
                    with memory_errors("The model of the audit", batch_size):
                        out[rows] = _predicted(models, images, fold_of and fold_of(positions))
                write_atomically(self._path(number), npy_bytes(out))
                progress(number)
        finally:
            if prefetcher is not None:
                prefetcher.close()

    def _chunks(self, number: int, batch_size: int) -> Generator[tuple[slice, np.ndarray, Tensor], None, None]:
        first, last = self.shards.shard_starts[number : number + 2].tolist()
        for start in range(first, last, batch_size):
            positions = np.arange(start, min(start + batch_size, last))
            images = to_nchw(self.shards.images(positions))
            yield slice(start - first, start - first + len(positions)), positions, images


@torch.no_grad()
def _predicted(models: Sequence[nn.Module], images: Tensor, fold: np.ndarray | None) -> np.ndarray:
    """float32 [n, M, K]: of each image the probabilities by the model of its fold, or by all models."""
    device = next(models[0].parameters()).device
    x = to_float(images.to(device))
    if fold is None:
        return torch.stack([_probabilities(model, x) for model in models], dim=1).cpu().numpy()
    out: np.ndarray | None = None
    for number, model in enumerate(models):
        rows = np.flatnonzero(fold == number)
        if not len(rows):
            continue
        values = _probabilities(model, x[torch.from_numpy(rows).to(device)]).cpu().numpy()
        out = np.empty((len(images), values.shape[1]), np.float32) if out is None else out
        out[rows] = values
    assert out is not None, "every image is in a fold"
    return out[:, None]


def _probabilities(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x).float()
    if not torch.isfinite(logits).all():
        raise FloatingPointError(
            "The model's logits are not finite: it predicts no probabilities. Audit with another model."
        )
    # In float64, so that the sum is 1 to the last digit of float32 with any number of classes.
    return torch.softmax(logits.double(), dim=1).float()
