"""The optimizer, its parameter groups, and the table of learning rate and momentum by epoch or step."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from nrat_scale.core.errors import UserError, check_choice, check_value

OPTIMIZERS = ("sgd", "adamw")
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
BIASES = ("bias", "in_proj_bias", "bias_k", "bias_v")  # the last three of MultiheadAttention


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer and its schedule."""

    name: str = "sgd"  # as in all published recipes; `adamw` starts better with small models without BatchNorm
    lr: float = 0.1  # of a schedule with a peak, the peak
    momentum: float = 0.9  # of SGD, or AdamW's first beta; `onecycle` cycles it 0.95 -> 0.85 -> 0.95, torch's default
    weight_decay: float = 5e-4  # L2 penalty; decoupled for AdamW
    decay_norms: bool = True  # decay norm layers too (BatchNorm, LayerNorm, ...); DM_AT: no, the paper's ResNet-18: yes
    decay_biases: bool = True  # decay the biases of all other layers too; DM_AT: yes
    nesterov: bool = False  # Nesterov momentum of SGD
    # `constant`; `multistep`: times `gamma` at each of `milestones`, in epochs; `onecycle`: cosine with its peak after
    # `pct_start` of the run; `cosine`: from `lr` to 0 at the end of the last epoch.
    schedule: str = "multistep"
    per: str = "epoch"  # or `step`, how often `onecycle` and `cosine` change; the others always change between epochs
    milestones: list[int] = field(default_factory=list)  # of `multistep`, in epochs
    gamma: float = 0.1  # of `multistep`
    pct_start: float = 0.025  # of `onecycle`: the fraction of the run at which the rate peaks

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        check_choice("optim.schedule", self.schedule, ("constant", "multistep", "onecycle", "cosine"))
        check_choice("optim.per", self.per, ("epoch", "step"))
        check_value("optim.lr", self.lr, self.lr > 0, "greater than 0")
        check_value("optim.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        check_value("optim.weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        check_value("optim.pct_start", self.pct_start, 0 < self.pct_start < 1, "a fraction of the run, in (0, 1)")
        if self.nesterov and not self.momentum > 0:
            raise UserError("optim.nesterov needs optim.momentum greater than 0.")


def build_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `model`, in groups with and without weight decay if the spec has both.

    It is fused if torch supports that (floating point on a CPU or CUDA). A fused step changes neither parameters nor state
    while `optimizer.found_inf` is a tensor of shape [] that holds 1. Call this after the model is on its device.
    """
    parameters, undecayed = list(model.parameters()), _undecayed(model, spec)
    decayed = {"params": [p for p in parameters if p not in undecayed]}
    others = {"params": [p for p in parameters if p in undecayed], "weight_decay": 0.0}
    groups = [group for group in (decayed, others) if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    shared: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay, "fused": fused}
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, betas=(spec.momentum, 0.999), **shared)
    return torch.optim.SGD(groups, momentum=spec.momentum, nesterov=spec.nesterov, **shared)


def _undecayed(model: nn.Module, spec: OptimSpec) -> set[nn.Parameter]:
    """The parameters without weight decay. A parameter that several layers share has none if one of them has none."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, NORMS):
            found |= set() if spec.decay_norms else set(own.values())
        elif not spec.decay_biases:
            found |= {own[name] for name in BIASES if name in own}
    return found


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialise SGD's momentum buffers to 0, so that its first step may be skipped; other optimizers stay unchanged.

    Fused SGD allocates the buffers in its first step and leaves them uninitialised if `found_inf` skips that step. A first
    step from 0 equals one without a buffer.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def learning_rates(spec: OptimSpec, epochs: int, steps_per_epoch: int) -> list[tuple[float, float]]:
    """(learning rate, momentum) of each of the `epochs * steps_per_epoch` steps; resuming needs no scheduler state."""
    if spec.per == "step" and spec.schedule in ("onecycle", "cosine"):
        return schedule_table(spec, epochs * steps_per_epoch)
    return [row for row in schedule_table(spec, epochs) for _ in range(steps_per_epoch)]


def schedule_table(spec: OptimSpec, count: int) -> list[tuple[float, float]]:
    """(learning rate, momentum) of `count` epochs, or of as many steps, from torch's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=spec.lr, momentum=spec.momentum)
    scheduler: MultiStepLR | OneCycleLR | CosineAnnealingLR
    if spec.schedule == "onecycle" and count > 1:
        # torch divides by 0 if the warm-up is exactly one entry long; a slightly shorter one starts at the peak.
        pct_start = spec.pct_start * (1 - 1e-9) if spec.pct_start * count == 1 else spec.pct_start
        scheduler = OneCycleLR(optimizer, max_lr=spec.lr, total_steps=count, pct_start=pct_start)
    elif spec.schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, T_max=count)
    else:
        scheduler = MultiStepLR(optimizer, spec.milestones if spec.schedule == "multistep" else [], spec.gamma)
    table, (group,) = [], optimizer.param_groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimizer.step() before": this optimizer never steps
        for number in range(count):
            table.append((float(group["lr"]), float(group["momentum"])))
            if number + 1 < count:
                scheduler.step()
    return table


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set learning rate and momentum of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


@torch.no_grad()
def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every gradient the memory format of its parameter.

    torch's fused optimizers iterate over both in memory order. If only one of them is channels-last, as after
    DistributedDataParallel, they silently compute a wrong update (torch 2.14).
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter.detach()).copy_(gradient)
