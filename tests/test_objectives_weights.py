"""Weights of images in the outer loss: what they multiply, their gradients, and that parts of a batch add up."""

import pytest
import torch
from torch import Tensor

from nrat_scale.objectives import OBJECTIVES, build

NAMES = sorted(OBJECTIVES)


def batch(seed: int = 0, size: int = 6, num_classes: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(natural logits, adversarial logits, labels, weights); float64, the first two with gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits, logits_adv = (torch.randn(size, num_classes, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, num_classes, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    weights[1] = 0
    return logits.requires_grad_(), logits_adv.requires_grad_(), labels, weights


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_multiplies_the_whole_loss_of_its_image(name: str) -> None:
    """Value and gradient of each image scale with its weight, those of weight 0 are 0; weights of 1 change no bit."""
    objective = build(name, num_classes=4)
    z, z_adv, y, weights = batch()
    losses = objective.per_sample(z, z_adv, y)
    loss = objective.loss(z, z_adv, y, weights=weights)
    assert torch.allclose(loss, (weights.double() * losses).sum() / 6, rtol=1e-12)
    plain = [
        torch.autograd.grad(losses.sum() / 6, leaf, retain_graph=True, allow_unused=True)[0] for leaf in (z, z_adv)
    ]
    weighted = [torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)[0] for leaf in (z, z_adv)]
    for one, other in zip(plain, weighted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(other, weights.double()[:, None] * one, rtol=1e-9, atol=1e-15)
            assert (other[1] == 0).all() and one[1].abs().sum() > 0
    assert torch.equal(objective.loss(z, z_adv, y), objective.loss(z, z_adv, y, weights=torch.ones(6)))


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_add_up(name: str) -> None:
    """The mean over equal micro-batches or ranks is the loss of the batch, because no part divides by its own weights."""
    objective = build(name, num_classes=4)
    z, z_adv, y, weights = batch()
    whole = objective.loss(z, z_adv, y, weights=weights)
    halves = [objective.loss(z[i : i + 3], z_adv[i : i + 3], y[i : i + 3], weights=weights[i : i + 3]) for i in (0, 3)]
    assert torch.allclose(whole, (halves[0] + halves[1]) / 2, rtol=1e-12)


@pytest.mark.parametrize("name", ["trades_ikl", "nrat_ikl"])
def test_class_means_are_weighted(name: str) -> None:
    """An image of weight 0 does not count in the mean prediction of its class."""
    z, _, y, weights = batch()
    y = torch.tensor([0, 0, 1, 1, 2, 3])
    one, two = build(name, num_classes=4), build(name, num_classes=4)
    one.update(z, y, weights=weights)
    left = weights > 0
    two.update(z[left], y[left], weights=weights[left])
    for objective in (one, two):
        objective.begin_step([y], new_epoch=True)
    assert one.class_means is not None and two.class_means is not None
    assert torch.allclose(one.class_means, two.class_means)
    three = build(name, num_classes=4)
    three.update(z, y)
    three.begin_step([y], new_epoch=True)
    assert three.class_means is not None and not torch.allclose(one.class_means, three.class_means)
