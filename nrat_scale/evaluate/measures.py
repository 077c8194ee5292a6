"""Which images a model still classifies correctly under an attack.

Training's validation and the final evaluation both call `block_outcome` on fixed blocks of consecutive images. Random starts
are seeded by image id, AutoAttack by block, so that the results do not depend on which process evaluates which block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.core.memory import ran_out_of_memory
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.data.augment import to_float
from nrat_scale.data.batches import to_nchw
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.attacks import ATTACKS, Attack, Block, parse_attack
from nrat_scale.evaluate.autoattack import AutoAttackLog

NOT_ATTACKED = -1  # instead of a predicted class


class OutOfMemory(UserError):
    """The memory of the device is exhausted."""


class Interrupted(Exception):
    """The caller's `stopped` ended an evaluation early."""


@contextmanager
def memory_errors(what: str, batch_size: int) -> Iterator[None]:
    """Raise `OutOfMemory`, with the way out, if the memory of the device is exhausted.

    Args:
        what: names the computation in the message.
        batch_size: images per evaluation block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        way_out = "Free memory on the device, or choose another one with --device."
        if batch_size > 1:
            way_out = (
                f"Give a smaller --batch-size, such as {batch_size // 2}. The size belongs to the key of a result: results of "
                "another size need another --out."
            )
        message = f"{what} does not fit into the memory of the device (blocks of {batch_size} images). {way_out}"
        raise OutOfMemory(message) from error


@dataclass(frozen=True)
class Images:
    """Images to evaluate: pixels uint8 [n, C, H, W], labels int64 [n], and ids int64 [n] that seed each image's noise."""

    pixels: Tensor
    labels: Tensor
    ids: np.ndarray

    def __post_init__(self) -> None:
        # A byte divided by 255 is in [0, 1], so that no check of the range is needed.
        assert self.pixels.dtype == torch.uint8, f"images are evaluated as uint8, not {self.pixels.dtype}"

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: np.ndarray) -> "Images":
        """The images in `rows` [m]."""
        return Images(self.pixels[rows], self.labels[rows], self.ids[rows])

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """The rows [m] of each block of `size` consecutive images; the last block may be shorter."""
        return (np.arange(start, min(start + size, len(self))) for start in range(0, len(self), size))


def read_images(shards: ShardSet, count: int | None = None, seed: int = 0) -> Images:
    """All images of `shards`, or a fixed seeded choice of `count` of them, in source order."""
    positions = shards.in_source_order()
    if count is not None and count < len(shards):
        positions = positions[np.sort(KeyedPermutation(len(shards), seed, "evaluate")(np.arange(count)))]
    images, labels = to_nchw(shards.images(positions)), torch.from_numpy(shards.labels(positions))
    return Images(images, labels, shards.source_ids(positions))


def correct_under(
    attack: str,
    model: nn.Module,
    images: Images,
    threat: ThreatSpec,
    *,
    seed: int = 0,
    batch_size: int = 256,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """`block_outcome` over all blocks: which images the model still classifies correctly under `attack`, bool [n].

    Args:
        attack: see `parse_attack`.
        model, threat, seed: see `block_outcome`.
        batch_size: size of the blocks; AutoAttack's outcome depends on it.
        stopped: called before each block.

    Raises:
        Interrupted: `stopped` returned true.
        UserError: an unknown attack.
        FloatingPointError: logits or gradients are not finite.
    """
    parsed, outcome = parse_attack(attack), np.zeros(len(images), bool)
    for rows in images.blocks(batch_size):
        if stopped():
            raise Interrupted
        outcome[rows] = block_outcome(parsed, model, images.take(rows), threat, seed=seed)
    return outcome


def block_outcome(
    attack: Attack,
    model: nn.Module,
    images: Images,
    threat: ThreatSpec,
    *,
    seed: int = 0,
    source: nn.Module | None = None,
    broken: np.ndarray | None = None,
    log: AutoAttackLog | None = None,
    predicted: np.ndarray | None = None,
) -> np.ndarray:
    """Which images of one block the model still classifies correctly under `attack`: bool [n].

    Misclassified images are not attacked. AutoAttack skips them itself and gets the whole block, so that its outcome is that
    of a direct call on the same block.

    Args:
        model: in evaluation mode, on the device to use; maps [0, 1] images to logits.
        images: the block.
        threat: eps, step length, norm and space.
        seed: of the random starts and of AutoAttack.
        source: make the adversarial images on this model instead (transfer attack).
        broken: bool [n], images that an earlier attack broke: they are not attacked and count as wrong.
        log: receives AutoAttack's warnings and which component broke each image.
        predicted: int [n], receives the class that the model predicts: for the adversarial image that broke it, for the natural
            image if it is misclassified without an attack; -1 for images in `broken`.

    Raises:
        FloatingPointError: logits or gradients are not finite.
    """
    attacked, kind = model if source is None else source, ATTACKS[attack.kind]
    assert not model.training and not attacked.training, "models are evaluated in evaluation mode"
    device = next(model.parameters()).device
    x, y = to_float(images.pixels.to(device)), images.labels.to(device)
    natural = _predictions(model, x)
    outcome: np.ndarray = natural.eq(y).cpu().numpy()
    classes = np.full(len(images), NOT_ATTACKED) if predicted is None else predicted
    classes[:] = natural.cpu().numpy()
    if broken is not None:
        outcome &= ~broken
        classes[broken] = NOT_ATTACKED
    if kind.perturb is None:
        return outcome
    for restart in range(attack.restarts):
        if not outcome.any():
            break
        rows = np.arange(len(images)) if kind.whole_blocks else np.flatnonzero(outcome)
        index = torch.from_numpy(rows).to(device)
        block = Block(attacked, x[index], y[index], images.ids[rows], threat, seed, restart, log)
        attacked_as = _predictions(model, kind.perturb(attack, block))
        # Images that are wrong already keep the class of what broke them, also in whole blocks.
        standing = outcome[rows]
        classes[rows[standing]] = attacked_as.cpu().numpy()[standing]
        outcome[rows] &= attacked_as.eq(block.y).cpu().numpy()
    return outcome


@torch.no_grad()
def count_classes(model: nn.Module, images: Images) -> int:
    """The number of logits of `model`."""
    logits: Tensor = model(to_float(images.pixels[:1].to(next(model.parameters()).device)))
    return logits.shape[1]


@torch.no_grad()
def _predictions(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    if not bool(logits.isfinite().all()):
        # argmax of NaN is 0 and would count as a prediction of class 0.
        raise FloatingPointError("The model's logits are not finite: its accuracy would be meaningless.")
    return logits.float().argmax(1) if logits.dtype == torch.bool else logits.argmax(1)
