"""The state of one training run, and the tensors of one step."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nrat_scale.checkpoint.saver import Saver
from nrat_scale.collapse import Guard
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.batches import Batch
from nrat_scale.data.training_data import LabelledImages, TrainingData
from nrat_scale.objectives import Objective
from nrat_scale.recipe import RecipeSpec
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import RunningStatistics
from nrat_scale.train.nonfinite import Rollback, StepChecks
from nrat_scale.train.profiling import Clock
from nrat_scale.train.signals import StopSignals


@dataclass(frozen=True)
class MicroBatch:
    """A part of this rank's batch on the device; the attack and the training forwards add what they compute.

    Attributes:
        x: [b, C, H, W] in [0, 1].
        y: labels trained on, int64 [b], or with CutMix probabilities [b, K].
        clean: clean labels int64 [b], negative if unknown, as with CutMix.
        noise: unit noise for the start of the attack, shaped like x.
        x_adv: shaped like x; None for objectives without an attack.
        loss: scalar, the mean over the images.
        logits, logits_adv: [b, K] without gradient, None if the objective has no such forward.
    """

    x: Tensor
    y: Tensor
    clean: Tensor
    noise: Tensor
    x_adv: Tensor | None = None
    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_adv: Tensor | None = None

    @property
    def label(self) -> Tensor:
        """int64 [b]: `y`, or its most probable class."""
        return self.y if self.y.ndim == 1 else self.y.argmax(1)

    @property
    def reference_logits(self) -> Tensor:
        """Natural logits, adversarial ones if the objective has no others."""
        logits = self.logits if self.logits is not None else self.logits_adv
        assert logits is not None, "the forwards come first"
        return logits


@dataclass
class TrainState:
    """Everything that one process of a run holds.

    Attributes:
        recipe: what the run computes.
        run: the run folder.
        data: training images, sample plan, augmentation.
        accelerator: processes, device, autocast, loss scaling.
        base: the bare module; checkpoints hold its parameters and buffers.
        model: `base` wrapped by Accelerate (DDP, autocast), for the training forwards.
        attack_model: shares the weights of `base`; the training attack runs on it.
        optimizer: Accelerate's wrapper of the optimizer of `base`.
        objective: outer and inner loss.
        ema: averaged weights, None if `ema.decay` is 0.
        validation: the held-out images.
        guard: detects a collapse; its `sums` are on the device and always changed in place.
        checks: whether recent steps were finite, and signals to stop; read by the host without waiting for the device.
        clock: seconds per section of a step.
        statistics: averages BatchNorm's running statistics over ranks.
        sums: float64 on the device, one entry per name of `metrics.sum_names()`: sums over this epoch so far, always
            changed in place.
        rollback: undoes what an fp16 step that overflowed did besides the weights; None in the other precisions.
        step: optimizer steps done.
        best: step, epoch and accuracies of the best validation so far, None before the first.
        validation_due: the epoch that ends at `step` is trained and logged, but a signal interrupted its validation.
        metrics: the lines of metrics.jsonl.
        signals: the signal that this process has received.
        recent: the batches and tensors of the last steps, whose checks the host may not have read yet.
        saver: writes checkpoints; on the main process only.
    """

    recipe: RecipeSpec
    run: RunFolder
    data: TrainingData
    accelerator: Accelerator
    base: nn.Module
    model: nn.Module
    attack_model: AttackModel
    optimizer: Any
    objective: Objective
    ema: ModelEmaV3 | None
    validation: LabelledImages
    guard: Guard
    checks: StepChecks
    clock: Clock
    statistics: RunningStatistics
    sums: Tensor
    rollback: Rollback | None = None
    step: int = 0
    best: dict[str, Any] | None = None
    validation_due: bool = False
    metrics: list[str] = field(default_factory=list)
    signals: StopSignals = field(default_factory=StopSignals)
    recent: deque[tuple[Batch, list[MicroBatch]]] = field(default_factory=lambda: deque(maxlen=2))
    saver: Saver | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.recipe.train.epochs * self.data.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The step at which this call stops."""
        return min(self.total_steps, self.recipe.train.max_steps or self.total_steps)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and evaluated: the EMA if there is one, else `base`."""
        return self.base if self.ema is None else self.ema.module
