"""Random crop, flip and CutMix on the device, in this order.

Each rank draws the random numbers of the whole global batch from (seed, step) and uses its slice, so the augmentation of
an image does not depend on the rank. A CutMix partner is another image of the global batch, after its own crop and flip.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nrat_scale.core.errors import check_value
from nrat_scale.core.seeds import KeyedPermutation, torch_generator


@dataclass(frozen=True)
class AugmentSpec:
    """Random augmentation of training images."""

    crop: int = 4  # pixels of zero padding before a random crop back to the image size; 0 for none
    flip: bool = True  # mirror left to right with probability one half (not for digits)
    cutmix: float = 0.0  # probability of CutMix

    def __post_init__(self) -> None:
        check_value("data.augment.crop", self.crop, self.crop >= 0, "at least 0")
        check_value("data.augment.cutmix", self.cutmix, 0.0 <= self.cutmix <= 1.0, "a probability in [0, 1]")


def cutmix_partners(global_size: int, seed: int, step: int) -> np.ndarray:
    """int64 [global_size]: for each place of global batch `step`, the place that its CutMix rectangle comes from."""
    return KeyedPermutation(global_size, seed, "cutmix partners", step)(np.arange(global_size))


def crop_and_flip(images: Tensor, places: Tensor, spec: AugmentSpec, global_size: int, seed: int, step: int) -> Tensor:
    """uint8 [b, C, H, W], cropped and flipped at random; `places` (int64 [b], CPU) are indices in the global batch."""
    generator = torch_generator("cpu", seed, "augment", step)
    offsets = torch.randint(0, 2 * spec.crop + 1, (global_size, 2), generator=generator)
    mirrored = torch.rand(global_size, generator=generator) < 0.5
    if spec.crop:
        images = _crop(images, offsets[places].to(images.device, non_blocking=True), spec.crop)
    if spec.flip:
        chosen = mirrored[places].to(images.device, non_blocking=True)
        images = torch.where(chosen[:, None, None, None], images.flip(3), images)
    return images


def _crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Crops of the zero-padded images, at offsets [b, 2] (row, column)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    number = torch.arange(len(images), device=images.device)
    return padded.permute(0, 2, 3, 1)[number[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutmix(
    images: Tensor, partners: Tensor, places: Tensor, spec: AugmentSpec, global_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Paste rectangles of `partners` into `images`, both [b, C, H, W] of any dtype and already cropped and flipped.

    CutMix (Yun et al. 2019): before it is clipped at the border, the rectangle has the aspect ratio of the image, a uniform
    centre, and the area 1 - lambda with lambda ~ Beta(1, 1). Labels are to be mixed in proportion to the areas.

    Returns the images, and float32 [b] on their device: the fraction of each image's area that is still its own.
    """
    height, width = images.shape[2:]
    corners, own = _boxes(places, spec, global_size, seed, step, (height, width))
    box = corners.to(images.device, non_blocking=True)[:, :, None]
    rows, columns = (torch.arange(n, device=images.device)[None] for n in (height, width))
    inside_rows, inside_columns = (rows >= box[0]) & (rows < box[1]), (columns >= box[2]) & (columns < box[3])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(inside, partners, images), own.to(images.device, non_blocking=True)


def cutmix_areas(
    places: Tensor, spec: AugmentSpec, global_size: int, seed: int, step: int, shape: tuple[int, int]
) -> Tensor:
    """float32 [b]: the fraction of each image's area that `cutmix` leaves its own; `shape` is (H, W)."""
    return _boxes(places, spec, global_size, seed, step, shape)[1]


def _boxes(
    places: Tensor, spec: AugmentSpec, global_size: int, seed: int, step: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(top, bottom, left, right of each rectangle as int64 [4, b]; the fraction of the area outside, float32 [b])."""
    height, width = shape
    generator = torch_generator("cpu", seed, "cutmix", step)
    draws = torch.rand(global_size, 4, generator=generator, dtype=torch.float64)[places]
    chosen = draws[:, 0] < spec.cutmix
    half = 0.5 * (1.0 - draws[:, 1]).sqrt() * chosen
    top, bottom = _interval(draws[:, 2], half, height)
    left, right = _interval(draws[:, 3], half, width)
    own = 1.0 - ((bottom - top) * (right - left)).double() / (height * width)
    return torch.stack([top, bottom, left, right]), own.float()


def _interval(centre: Tensor, half: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """[b] int64 start and end of the pixels within `half` (a fraction of `length`) of `centre`, clipped."""
    start, end = (((centre + sign * half) * length).round().clamp(0, length).long() for sign in (-1, 1))
    return start, end


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [0, 1], contiguous; the only place that divides by 255."""
    return images.float().div(255).contiguous()
