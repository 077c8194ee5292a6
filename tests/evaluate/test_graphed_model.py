"""Passes as graphs on padded batches: the same logits, gradients and outcomes."""

from typing import Any

import pytest
import torch
from torch import nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.graphed_model import GraphedModel
from nrat_scale.evaluate.measures import Images, correct_under
from tests.support.captured import capture_operations


@pytest.mark.parametrize("size", [1, 3, 8, 70, 300])
def test_logits_and_gradients_are_those_of_the_model(model: nn.Module, images: Images, size: int) -> None:
    """Batches of every size, also larger than the largest bucket, after the capture and before."""
    graphed = GraphedModel(model, capture_operations)
    shape = images.pixels.shape[1:]
    for number in range(4):
        x = torch.rand(size, *shape, generator=torch.Generator().manual_seed(number)).requires_grad_()
        found = []
        for forward in (model, graphed):
            logits = forward(x)
            (gradient,) = torch.autograd.grad(logits.logsumexp(1).square().sum(), x)
            with torch.no_grad():
                torch.testing.assert_close(forward(x), logits)
            found.append((logits.detach(), gradient))
        torch.testing.assert_close(*found)
    assert (graphed.gradient.num_captures == 1) is (size <= 256)


@pytest.mark.medium
@pytest.mark.parametrize("attack", ["pgd3", "cw3", "aa:apgd-ce+square"])
def test_outcomes_are_those_of_the_model(model: nn.Module, images: Images, threat: ThreatSpec, attack: str) -> None:
    """Image by image, though AutoAttack's batches shrink and are padded."""
    some = images.take(torch.arange(24).numpy())
    plain, graphed = (correct_under(attack, m, some, threat) for m in (model, GraphedModel(model, capture_operations)))
    assert (plain == graphed).all()


def test_graphs_need_a_gpu(measured: Any) -> None:
    """The option is refused on a CPU."""
    with pytest.raises(UserError, match="--graphs needs a GPU, and this evaluation is on cpu"):
        measured("--attacks", "natural", "--graphs")
