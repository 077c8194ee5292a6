"""Augmentation: exact crops and flips, CutMix by area, independent of the split over ranks."""

from dataclasses import replace

import pytest
import torch

from nrat_scale.data.augment import AugmentSpec, crop_and_flip, cutmix, cutmix_partners, to_float
from nrat_scale.data.spec import DataSpec
from nrat_scale.data.training_data import open_training_data


def test_augmentation_is_crop_and_flip() -> None:
    """Every result is one of the padded image's crops or its mirror image; all offsets and both directions occur."""
    images = torch.randint(0, 256, (300, 2, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = to_float(crop_and_flip(images, torch.arange(300), AugmentSpec(crop=1, flip=True), 300, 0, 0))
    assert out.dtype == torch.float32
    seen = set()
    for image, result in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        options = {(i, j, f): padded[:, i : i + 6, j : j + 5] for i in range(3) for j in range(3) for f in (0, 1)}
        matches = [k for k, v in options.items() if torch.equal((v.flip(2) if k[2] else v).float() / 255, result)]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 18


def test_augmentation_does_not_depend_on_the_split() -> None:
    """A rank's slice is augmented as within the global batch; steps and seeds differ."""
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    spec, everywhere = AugmentSpec(crop=2, flip=True), torch.arange(12)
    whole = crop_and_flip(images, everywhere, spec, 12, 3, 0)
    parts = [crop_and_flip(images[i : i + 4], everywhere[i : i + 4], spec, 12, 3, 0) for i in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, crop_and_flip(images, everywhere, spec, 12, 3, 1))
    assert not torch.equal(whole, crop_and_flip(images, everywhere, spec, 12, 4, 0))
    assert torch.equal(crop_and_flip(images, everywhere, AugmentSpec(crop=0, flip=False), 12, 3, 0), images)


def test_cutmix_replaces_one_rectangle_by_area() -> None:
    """The partner's pixels form one rectangle, `own` is the area of the rest, and lambda covers (0, 1)."""
    n, spec = 400, AugmentSpec(cutmix=0.5)
    zeros, ones = torch.zeros(n, 1, 16, 12, dtype=torch.uint8), torch.ones(n, 1, 16, 12, dtype=torch.uint8)
    mixed, own = cutmix(zeros, ones, torch.arange(n), spec, n, 0, 7)
    assert torch.allclose(own, 1 - mixed.float().mean((1, 2, 3)), atol=1e-6)
    for image in mixed[:, 0]:
        rows, columns = image.amax(1).nonzero(), image.amax(0).nonzero()
        if len(rows):
            assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    untouched = own.eq(1).float().mean()
    assert 0.4 < untouched < 0.6
    assert own.min() < 0.15
    assert 0.3 < own[own < 1].mean() < 0.8
    assert not cutmix(zeros, ones, torch.arange(n), AugmentSpec(cutmix=0.0), n, 0, 7)[0].any()


@pytest.mark.parametrize("world", [2, 4])
def test_cutmix_does_not_depend_on_the_split(spec: DataSpec, world: int) -> None:
    """A partner on another rank is the same image, augmented as it is there, and labels mix by area."""
    mixing = replace(spec, augment=AugmentSpec(crop=2, flip=True, cutmix=1.0))
    data, cpu = open_training_data(mixing, 3), torch.device("cpu")
    for step, batch in enumerate(data.batches(0, 3)):
        x, y = data.augmented(batch, cpu)
        assert torch.allclose(y.sum(1), torch.ones(24))
        parts = [data.augmented(b, cpu) for r in range(world) for b in data.batches(step, step + 1, r, world)]
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
        partners = cutmix_partners(24, 3, step)
        assert sorted(partners) == list(range(24))
        for row in range(24):
            mixed = set(y[row].nonzero().flatten().tolist())
            assert mixed <= {int(batch.labels[row]), int(batch.labels[partners[row]])}
