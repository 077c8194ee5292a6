"""Averaged and perturbed weights: EMA with the warm-up of the generated-data recipe, and AWP."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import attack_mode

# ---- EMA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmaSpec:
    """Exponential moving average of the parameters.

    Attributes:
        decay: final decay; 0 switches the EMA off.
        warmup_fraction: part of all steps during which the decay is 0; then it is min(decay, (1 + t) / (10 + t)).
    """

    decay: float = 0.0
    warmup_fraction: float = 0.025

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0 or not 0.0 <= self.warmup_fraction < 1.0:
            raise UserError("ema.decay and ema.warmup_fraction must be in [0, 1).")


class Ema(ModelEmaV3):
    """timm's ModelEmaV3, whose update can be undone on the device."""

    @torch.no_grad()
    def update_where(self, good: Tensor, model: nn.Module, step: int) -> None:
        """`update` where `good` (bool scalar on the device) is true, else nothing; the host need not know which.

        Args:
            step: number of updates so far.
        """
        for averages, values in _by_dtype(self.module.parameters(), model.parameters()):
            weight = good.to(averages[0].dtype) * (1.0 - self.get_decay(step))
            torch._foreach_lerp_(averages, values, [weight] * len(values))
        for buffer, value in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(torch.where(good, value, buffer))


def _by_dtype(*models: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The tensors of models of one structure, in groups of one type: `foreach` is fast only then."""
    groups: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
    for tensors in zip(*models, strict=True):
        groups.setdefault(tensors[0].dtype, []).append(tensors)
    for group in groups.values():
        yield tuple(list(column) for column in zip(*group, strict=True))


def build_ema(model: nn.Module, spec: EmaSpec, total_steps: int) -> Ema:
    """timm's ModelEmaV3 set to the rule of DM_AT; call `ema.update(model, step=number of updates so far)`.

    BatchNorm buffers are copied, not averaged. timm's warm-up is 1 - (1 + s / gamma)^-power for s = step -
    update_after_step - 1; gamma 9 and power 1 make that (1 + t) / (10 + t) with t = s - 1, so t counts from the end of
    the warm-up.
    """
    warmup_steps = math.ceil(spec.warmup_fraction * total_steps)
    return Ema(
        model,
        decay=spec.decay,
        update_after_step=warmup_steps - 2,
        use_warmup=True,
        warmup_gamma=9.0,
        warmup_power=1.0,
        exclude_buffers=True,
    )


# ---- AWP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AwpSpec:
    """Adversarial weight perturbation (Wu et al. 2020; NRAT eq. 18).

    Attributes:
        gamma: size of the perturbation relative to each weight's norm; 0 switches it off. 0.005 for TRADES and NRAT,
            0.01 for PGD-AT.
        warmup_epochs: epochs without it (10 for TRADES and NRAT, 0 for PGD-AT).
    """

    gamma: float = 0.0
    warmup_epochs: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1 or self.warmup_epochs < 0:
            raise UserError("awp.gamma must be in [0, 1) and awp.warmup_epochs 0 or more.")


def perturbable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that AWP moves: more than one dimension and a name that ends in `weight`."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name.endswith("weight")
    ]


@contextmanager
def awp(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    gamma: float,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Iterator[None]:
    """Inside, every perturbable weight w is w + v, v = gamma * ||w|| * g / (||g|| + 1e-20), g the gradient of the loss.

    Do forward, backward and the optimizer's step inside; on exit v is subtracted (not a copy restored), so weight decay
    acts on w + v as in the reference code and the weights stay equal on all ranks.

    Args:
        model: the bare module (not its DDP wrapper). Gradients of its parameters (`.grad`) are not touched.
        loss_fn: the full outer loss, a scalar, called as `loss_fn(model)`, or `loss_fn()` if it needs no argument. A
            sequence means accumulated micro-batches: their mean is the loss.
        gamma: relative size.
        reduce: averages a gradient over ranks, before its norm is taken.
    """
    names_and_weights = perturbable(model)
    weights = [weight for _, weight in names_and_weights]
    functions = list(loss_fn) if isinstance(loss_fn, Sequence) else [loss_fn]
    gradients = [torch.zeros_like(weight) for weight in weights]
    with attack_mode(model, "batch"):
        for function in functions:
            loss = _call(function, model)
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient, alpha=1 / len(functions))
    shifts = []
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient = reduce(gradient)
            size = gradient.norm()
            shift = gamma * weight.norm() * gradient / (size + 1e-20)
            # Without a finite gradient nothing is moved: NaN could not be taken back. The step's own gradient tells.
            shifts.append(torch.where(size.isfinite(), shift, 0.0))
            weight.add_(shifts[-1])
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, shift in zip(weights, shifts, strict=True):
                weight.sub_(shift)


def _call(function: Callable[..., Any], model: nn.Module) -> Tensor:
    # A default, as in `lambda x=x: ...`, binds a loop's variable and is not a place for the model.
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    result = function(model) if needed else function()
    assert isinstance(result, Tensor) and result.ndim == 0, "the loss function must return a scalar"
    return result
