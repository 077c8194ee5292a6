"""Weights that are a function of their names' order, so that a golden file needs only the logits."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """`model` in float64 and evaluation mode with deterministic weights and running statistics."""
    model.double().eval()
    for number, (name, value) in enumerate(model.state_dict().items()):
        if value.is_floating_point():
            wave = torch.cos(torch.arange(value.numel(), dtype=torch.float64) * 0.37 + number).view_as(value)
            positive = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
            value.copy_(1 + 0.5 * wave if positive else wave * (2.0 / max(value[0].numel(), 1)) ** 0.5)
    return model


def images() -> Tensor:
    """Two images [2, 3, 32, 32] in [0, 1], in float64."""
    count = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(count * 0.11)).view(2, 3, 32, 32)
