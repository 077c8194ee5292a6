"""Everything one training run holds."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from nrat_scale.checkpoint.saver import Saver
from nrat_scale.collapse import Guard
from nrat_scale.data.batches import Batch
from nrat_scale.data.training_data import LabelledImages, TrainingData
from nrat_scale.objectives import Objective
from nrat_scale.recipe import RecipeSpec
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import RunningState
from nrat_scale.train.nonfinite import StepChecks
from nrat_scale.train.profiling import Clock
from nrat_scale.train.signals import StopSignals
from nrat_scale.weights import Ema

# Summed over the images of an epoch; `clean*` and `noisy*` only where clean labels are known: images whose label is right,
# those of them that are predicted so, images whose label is wrong, those predicted as labelled (memorised), and as they
# really are.
SUMS = (
    "loss", "natural", "robust", "images", "grad_norm", "steps",
    "clean", "clean_fitted", "noisy", "noisy_fitted", "noisy_corrected",
)  # fmt: skip


@dataclass
class TrainState:
    """Everything one run holds. `base` is the bare module, `model` what Accelerate made of it (DDP, autocast), `twin` what
    is attacked, `running` what a bad step must put back.

    `validation_due`: the epoch that `step` ends was trained and logged, but not validated, because the run was stopped.
    `sums`: of SUMS over the epoch so far, float64, on the device, always changed in place; so are those of `guard`.
    `recent`: the batches whose flags the host has not read yet.
    """

    recipe: RecipeSpec
    run: Path
    data: TrainingData
    accelerator: Accelerator
    base: nn.Module
    model: nn.Module
    twin: AttackModel
    optimizer: Any
    objective: Objective
    ema: Ema | None
    validation: LabelledImages
    guard: Guard
    flags: StepChecks
    clock: Clock
    running: RunningState
    sums: Tensor
    step: int = 0
    best: dict[str, Any] | None = None
    validation_due: bool = False
    metrics: list[str] = field(default_factory=list)
    signals: StopSignals = field(default_factory=StopSignals)
    recent: deque[Batch] = field(default_factory=lambda: deque(maxlen=2))
    saver: Saver | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.recipe.train.epochs * self.data.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Where this call stops."""
        return min(self.total_steps, self.recipe.train.max_steps or self.total_steps)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that validation and evaluation look at: the EMA where there is one."""
        return self.base if self.ema is None else self.ema.module


@dataclass(frozen=True)
class MicroBatch:
    """A part of this rank's batch on the device: x, unit start noise, x_adv [b, C, H, W] (None before the attack), y int64
    [b] or [b, K], clean labels int64 [b]."""

    x: Tensor
    y: Tensor
    clean: Tensor
    noise: Tensor
    x_adv: Tensor | None = None
