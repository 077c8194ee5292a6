"""The optimizer, its parameter groups, and learning rate and momentum as a table over epochs."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from nrat_scale.errors import UserError, did_you_mean
from nrat_scale.modes import batchnorms

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "multistep", "onecycle", "cosine")


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer and its schedule, which changes once per epoch.

    Attributes:
        name: `sgd`, as all published recipes have it, or `adamw`, which small models without BatchNorm start better with.
        lr: (peak) learning rate.
        momentum: of SGD, and AdamW's first beta; `onecycle` cycles it 0.95 -> 0.85 -> 0.95 as torch's default does.
        weight_decay: L2 penalty (decoupled for AdamW).
        decay_batchnorm: whether BatchNorm's parameters are decayed too (DM_AT: no; the paper's ResNet-18 tables: yes).
        nesterov: Nesterov's momentum.
        schedule: `constant`, `multistep` (times `gamma` at each of `milestones`, epochs) or `onecycle` (cosine, peak
            after `pct_start` of the epochs), or `cosine` (from `lr` to 0 at the end of the last epoch).
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_batchnorm: bool = True
    nesterov: bool = False
    schedule: str = "multistep"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    pct_start: float = 0.025

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optim.lr is {self.lr}; it must be greater than 0.")
        if self.name not in OPTIMIZERS:
            raise UserError(f"optim.name is '{self.name}'. {did_you_mean(self.name, OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule is '{self.schedule}'. {did_you_mean(self.schedule, SCHEDULES)}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.momentum is {self.momentum}; it must be in [0, 1).")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optim.weight_decay is {self.weight_decay}; it must be 0 or more.")
        if not 0 < self.pct_start < 1:
            raise UserError(f"optim.pct_start is {self.pct_start}; it is a fraction of the epochs, in (0, 1).")
        if self.nesterov and not self.momentum > 0:
            raise UserError("optim.nesterov needs optim.momentum greater than 0.")


def build_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `model`, BatchNorm's in a group without decay if the spec says so."""
    undecayed: set[nn.Parameter] = set()
    if not spec.decay_batchnorm:
        undecayed = {parameter for layer in batchnorms(model) for parameter in layer.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p not in undecayed]},
        {"params": [p for p in model.parameters() if p in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.momentum, 0.999), weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        groups, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov
    )


def schedule_table(spec: OptimSpec, epochs: int) -> list[tuple[float, float]]:
    """(learning rate, momentum) of each epoch, as torch's own schedulers give them: resuming needs no state."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=spec.lr, momentum=spec.momentum)
    scheduler: MultiStepLR | OneCycleLR | CosineAnnealingLR
    if spec.schedule == "onecycle" and epochs > 1:
        # Where the warm-up is exactly the first epoch torch divides by its length, 0: a trifle less starts at the peak.
        pct_start = spec.pct_start * (1 - 1e-9) if spec.pct_start * epochs == 1 else spec.pct_start
        scheduler = OneCycleLR(optimizer, max_lr=spec.lr, total_steps=epochs, pct_start=pct_start)
    elif spec.schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    else:
        milestones = spec.milestones if spec.schedule == "multistep" else []
        scheduler = MultiStepLR(optimizer, milestones=milestones, gamma=spec.gamma)
    table = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimizer.step() before": there is nothing to step
        for epoch in range(epochs):
            table.append((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["momentum"])))
            if epoch + 1 < epochs:
                scheduler.step()
    return table


def set_epoch(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Give all groups this epoch's learning rate and momentum."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
