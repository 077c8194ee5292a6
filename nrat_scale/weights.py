"""Averaged and perturbed weights: EMA with the warm-up of DM_AT, and AWP."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nrat_scale.core.errors import check_value
from nrat_scale.core.modes import attack_mode


@dataclass(frozen=True)
class EmaSpec:
    """Exponential moving average of the parameters."""

    decay: float = 0.0  # final decay; 0 switches the EMA off
    warmup_fraction: float = 0.025  # of all steps, with decay 0; then the decay is min(decay, (1 + t) / (10 + t))

    def __post_init__(self) -> None:
        for name in ("decay", "warmup_fraction"):
            check_value(f"ema.{name}", getattr(self, name), 0.0 <= getattr(self, name) < 1.0, "in [0, 1)")


def build_ema(model: nn.Module, spec: EmaSpec, total_steps: int) -> ModelEmaV3:
    """timm's ModelEmaV3 with the decay of DM_AT; call `ema.update(model, step=number of updates so far)`.

    BatchNorm buffers are copied, not averaged. timm's warm-up is 1 - (1 + s / gamma)^-power with s = step -
    update_after_step - 1; gamma 9 and power 1 make that (1 + t) / (10 + t) with t = s - 1, counted from the end of the
    warm-up.
    """
    start = math.ceil(spec.warmup_fraction * total_steps) - 2
    warmup: dict[str, Any] = {"use_warmup": True, "warmup_gamma": 9.0, "warmup_power": 1.0, "update_after_step": start}
    return ModelEmaV3(model, decay=spec.decay, exclude_buffers=True, **warmup)


@dataclass(frozen=True)
class AwpSpec:
    """Adversarial weight perturbation (Wu et al. 2020; NRAT eq. 18)."""

    # Norm of the perturbation relative to each weight's norm: 0.005 for TRADES and NRAT, 0.01 for PGD-AT, 0 for no AWP.
    gamma: float = 0.0
    # Epochs before the first perturbation: 9 for TRADES, whose code counts epochs from 1 and begins in epoch 10; our choice
    # for NRAT, where its paper is silent; 0 for PGD-AT.
    warmup_epochs: int = 9

    def __post_init__(self) -> None:
        check_value("awp.gamma", self.gamma, 0.0 <= self.gamma < 1.0, "in [0, 1)")
        check_value("awp.warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "0 or more")


def perturbable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that AWP perturbs: more than one dimension and a name that ends in `weight`."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.ndim > 1 and name.endswith("weight")]


@contextmanager
def awp(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    gamma: float,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Iterator[None]:
    """Perturb weights inside the block: w + v with v = gamma * ||w|| * g / (||g|| + 1e-20), g the gradient of the loss.

    Do forward, backward and the optimizer's step inside. On exit v is subtracted, so weight decay acts on w + v as in the
    reference code, and the weights stay equal on all ranks.

    Args:
        model: the bare module (not its DDP wrapper). The `.grad` of its parameters is not touched.
        loss_fn: the full outer loss, a scalar, called as `loss_fn(model)`, or `loss_fn()` if it needs no argument. A
            sequence, for accumulated micro-batches, is averaged.
        gamma: see `AwpSpec`.
        reduce: averages a gradient over ranks before its norm is taken.
    """
    weights = [weight for _, weight in perturbable(model)]
    functions = list(loss_fn) if isinstance(loss_fn, Sequence) else [loss_fn]
    gradients = [torch.zeros_like(weight) for weight in weights]
    with attack_mode(model, "batch"):
        for function in functions:
            for total, gradient in zip(gradients, torch.autograd.grad(_call(function, model), weights), strict=True):
                total.add_(gradient, alpha=1 / len(functions))
    shifts = []
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient = reduce(gradient)
            size = gradient.norm()
            shift = gamma * weight.norm() * gradient / (size + 1e-20)
            # Skip a gradient that is not finite: adding NaN cannot be undone. The step's gradient check reports it.
            shifts.append(torch.where(size.isfinite(), shift, 0.0))
            weight.add_(shifts[-1])
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, shift in zip(weights, shifts, strict=True):
                weight.sub_(shift)


def _call(function: Callable[..., Any], model: nn.Module) -> Tensor:
    # A parameter with a default, as in `lambda x=x: ...`, binds a loop variable and does not take the model.
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    result = function(model) if needed else function()
    assert isinstance(result, Tensor) and result.ndim == 0, "the loss function must return a scalar"
    return result
