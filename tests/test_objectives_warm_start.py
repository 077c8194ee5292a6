"""`objective.warm_start`: the classification loss goes from cross-entropy to the objective's own."""

import dataclasses

import pytest
import torch

from nrat_scale.objectives import LOSSES, OBJECTIVES, Objective, build
from tests.support.formulas import random_logits, tensors

WARM = [name for name, spec in OBJECTIVES.items() if spec.loss != "ce"]


def test_nrat_and_the_other_bounded_presets_can_start_warm():
    """The presets whose classification loss is not cross-entropy."""
    assert {"nrat", "trades_apl", "pgd_at_apl", "mart_apl", "trades_gce", "trades_sce", "nrat_ikl"} <= set(WARM)


@pytest.mark.parametrize("name", WARM)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_warm_start_goes_from_cross_entropy_to_the_objective(name, smoothing):
    """Value and gradients: the classification loss is the mixture (1 - w) CE + w C with w = progress / warm_start."""
    z, z_adv, y = random_logits(3, 10, 2.0)
    labels = tensors(y)[0]
    usual = build(name, smoothing=smoothing)
    warm = Objective(dataclasses.replace(usual.spec, warm_start=0.4))

    def value_and_gradients(objective, *progress):
        logits, logits_adv = (tensor.requires_grad_() for tensor in tensors(z, z_adv))
        loss = objective.loss(logits, logits_adv, labels, *progress)
        gradients = torch.autograd.grad(loss, (logits, logits_adv), allow_unused=True)
        return [loss, *(gradient if gradient is not None else torch.zeros(()) for gradient in gradients)]

    def classification(loss):
        logits = tensors(z if usual.family == "trades" else z_adv)[0].requires_grad_()
        mean = LOSSES[loss](logits, labels, smoothing).mean()
        return mean, torch.autograd.grad(mean, logits)[0]

    own, cross_entropy = classification(usual.spec.loss), classification("ce")
    where = 1 if usual.family == "trades" else 2
    for progress, weight in ((0.0, 0.0), (0.1, 0.25), (0.3, 0.75)):
        found, end = value_and_gradients(warm, progress), value_and_gradients(usual)
        for index, part in ((0, 0), (where, 1)):
            difference = (1 - weight) * (cross_entropy[part] - own[part])
            torch.testing.assert_close(found[index], end[index] + difference, rtol=1e-9, atol=1e-12)
    for progress in (0.4, 0.7, 1.0):
        pairs = zip(value_and_gradients(warm, progress), value_and_gradients(usual, 0.0), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert all(
        torch.equal(one, other)
        for one, other in zip(value_and_gradients(warm), value_and_gradients(usual), strict=True)
    ), "without progress: the objective itself"


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in WARM])
def test_a_warm_start_has_no_effect_on_cross_entropy(name):
    """Bit for bit, and the title does not mention it."""
    z, z_adv, y = random_logits(4, 10, 2.0)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    usual = build(name)
    warm = Objective(dataclasses.replace(usual.spec, warm_start=0.5))
    for progress in (0.0, 0.2, 1.0):
        assert torch.equal(warm.loss(logits, logits_adv, labels, progress), usual.loss(logits, logits_adv, labels))
    assert warm.spec.title == name


def test_the_title_has_the_warm_start():
    """Results, cards and reports print it."""
    assert OBJECTIVES["nrat"].title == "nrat"
    warm = dataclasses.replace(OBJECTIVES["nrat"], warm_start=0.3)
    assert warm.title == "nrat, warm start over 30 % of training"
