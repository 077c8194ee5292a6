"""The state of one training run, and the tensors of one step."""

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.checkpoint.saver import Saver
from nrat_scale.collapse import Guard
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.batches import Batch
from nrat_scale.data.training_data import LabelledImages, TrainingData
from nrat_scale.objectives import Objective
from nrat_scale.recipe import RecipeSpec
from nrat_scale.tracking import Trackers
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import RunningStatistics
from nrat_scale.train.class_starts import ClassStarts
from nrat_scale.train.nonfinite import StepChecks
from nrat_scale.train.ownership import Ownership
from nrat_scale.train.profiling import Clock
from nrat_scale.train.signals import StopSignals

if TYPE_CHECKING:
    from nrat_scale.train.graphs import StepGraphs


@dataclass(frozen=True)
class MicroBatch:
    """A part of this rank's batch on the device: b images of K classes."""

    x: Tensor  # [b, C, H, W] in [0, 1]
    y: Tensor  # given labels: int64 [b], or with CutMix probabilities [b, K]
    clean: Tensor  # clean labels: int64 [b], negative if unknown, as with CutMix
    noise: Tensor  # unit noise for the start of the attack, shaped like x
    x_adv: Tensor | None = None  # shaped like x; None for objectives without an attack
    loss: Tensor | None = None  # scalar, the mean over the images
    logits: Tensor | None = None  # [b, K] without gradient; None if the objective has no such forward
    logits_adv: Tensor | None = None
    target: Tensor | None = None  # labels that `objective.refine` trains on instead of `y`: int64 [b] or [b, K]
    history: Tensor | None = None  # [b, K]: TE's mean predictions with those of this step; SGLR's rows without them
    remembered: Tensor | None = None  # [b, K]: what replaces the images' rows of `LabelRefinement.history`
    weights: Tensor | None = None  # float32 [b], of each image's loss; None: 1 for all

    @property
    def label(self) -> Tensor:
        """int64 [b]: `y`, or its most probable class."""
        return self.y if self.y.ndim == 1 else self.y.argmax(1)

    @property
    def trained(self) -> Tensor:
        """The labels of the losses: `target`, or else `y`."""
        return self.y if self.target is None else self.target

    @property
    def reference_logits(self) -> Tensor:
        """Natural logits, adversarial ones if the objective has no others."""
        logits = self.logits if self.logits is not None else self.logits_adv
        assert logits is not None, "the forwards come first"
        return logits


RESULTS = ("loss", "logits", "logits_adv")  # fields of a `MicroBatch` that its training adds


@dataclass
class TrainState:
    """Everything that one process of a run holds."""

    recipe: RecipeSpec
    run: RunFolder
    data: TrainingData
    accelerator: Accelerator
    base: nn.Module  # the bare module; checkpoints hold its parameters and buffers
    model: nn.Module  # `base` wrapped by Accelerate (DDP, autocast), for the training forwards
    attack_model: AttackModel  # shares the weights of `base`; the training attack runs on it
    optimizer: Any  # Accelerate's wrapper of the optimizer of `base`
    objective: Objective
    ema: ModelEmaV3 | None  # None if `ema.decay` is 0
    validation: LabelledImages  # the held-out images
    guard: Guard  # detects a collapse
    checks: StepChecks  # read by the host without waiting for the device
    clock: Clock
    statistics: RunningStatistics
    draws: bool  # the model draws random numbers in training mode (dropout, stochastic depth)
    sums: Tensor  # float64, named by `metrics.sum_names()`: over this rank's epoch so far, always changed in place
    class_starts: ClassStarts | None = None  # None unless `threat.init` is class
    restored: list[Tensor] = field(default_factory=list)  # under fp16, what a skipped step must not change
    before: list[Tensor] = field(default_factory=list)  # `restored` as it was when the step began
    step: int = 0  # optimizer steps done
    best: dict[str, Any] | None = None  # step, epoch and accuracies of the best validation so far
    validation_due: bool = False  # a signal interrupted the validation of the epoch that ends at `step`
    metrics: list[str] = field(default_factory=list)  # the lines of metrics.jsonl
    signals: StopSignals = field(default_factory=StopSignals)
    # The last steps, whose checks the host may not have read yet.
    recent: deque[tuple[Batch, list[MicroBatch]]] = field(default_factory=partial(deque, maxlen=2))
    graphs: "StepGraphs | None" = None  # None: every operation is launched by itself
    saver: Saver | None = None  # on the main process only
    owner: Ownership | None = None  # of the run directory, on the main process only
    trackers: Trackers = field(default_factory=partial(Trackers, None))  # empty on the other processes

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.recipe.train.epochs * self.data.steps_per_epoch

    @property
    def progress(self) -> float:
        """The fraction of the whole schedule that is done; `train.max_steps` does not change it."""
        return self.step / self.total_steps

    @property
    def epoch_end(self) -> float:
        """The fraction of the whole schedule that is done when the epoch of the next step ends."""
        return (self.step // self.data.steps_per_epoch + 1) / self.recipe.train.epochs

    @property
    def threat(self) -> ThreatSpec:
        """The attack of the next step: that of the phase of `threat.schedule`."""
        return self.recipe.threat.at(self.progress)

    @property
    def last_step(self) -> int:
        """The step at which this call stops."""
        return min(self.total_steps, self.recipe.train.max_steps or self.total_steps)
