"""The collapse guard: noise-robust losses can collapse to one class under too large a learning rate.

The NRAT paper (section 4) sees it as vanishing gradients and single-class predictions, and cures it with learning rates of 0.05 or
0.01 instead of 0.1. The guard looks at windows of training steps: the share of the most frequent prediction, accuracy on
the labels trained on, the gradient's norm and the spread of the logits. All sums are kept on the device and read once a window.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nrat_scale.core.errors import UserError, did_you_mean

ACTIONS = ("warn", "stop", "rewind", "none")
ADVICE = "Lower optim.lr: the paper uses 0.1, and 0.05 or 0.01 where training collapses"


@dataclass(frozen=True)
class GuardSpec:
    """What to do when training collapses.

    Attributes:
        action: `warn`; `stop` with advice; `rewind` to the last checkpoint from before and go on with a smaller learning
            rate; `none`.
        window: steps that are looked at together.
        patience: consecutive bad windows before anything is done; a network starts with one class, too.
        top_share: a window is bad where so much of the predictions name one class, and accuracy is at most twice chance.
        min_grad_norm: or where the mean norm of the gradient is smaller.
        max_logit_scale: or where the logits of an image spread wider (standard deviation, mean over images).
        lr_factor: by which `rewind` multiplies the learning rate.
        max_rewinds: after so many it stops.
    """

    action: str = "warn"
    window: int = 100
    patience: int = 3
    top_share: float = 0.9
    min_grad_norm: float = 1e-8
    max_logit_scale: float = 1e4
    lr_factor: float = 0.5
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UserError(f"guard.action is '{self.action}'. {did_you_mean(self.action, ACTIONS)}")
        for name in ("window", "patience", "max_rewinds"):
            if getattr(self, name) < 1:
                raise UserError(f"guard.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("top_share", "lr_factor"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(f"guard.{name} is {getattr(self, name)}; it must be between 0 and 1.")


@dataclass(frozen=True)
class WindowStats:
    """What one window of steps showed."""

    top_share: float
    accuracy: float
    grad_norm: float
    logit_scale: float

    def bad(self, spec: GuardSpec, num_classes: int) -> bool:
        """Whether training looks collapsed."""
        one_class = self.top_share >= spec.top_share and self.accuracy <= 2.0 / num_classes
        return one_class or self.grad_norm < spec.min_grad_norm or self.logit_scale > spec.max_logit_scale


@dataclass
class Guard:
    """The sums of the running window, and how many windows in a row were bad.

    Attributes:
        sums: float64 [K + 4]: predictions by class, right ones, spread of logits, gradient norms, steps; on the device.
        bad_windows: in a row.
        healthy_step: the last step that ended a good window; checkpoints up to it are good.
        rewinds: how often training was rewound.
        lr_scale: factor of the learning rate by now.
    """

    spec: GuardSpec
    num_classes: int
    sums: Tensor
    bad_windows: int = 0
    healthy_step: int = 0
    rewinds: int = 0
    lr_scale: float = 1.0
    warned: bool = field(default=False)

    @classmethod
    def build(cls, spec: GuardSpec, num_classes: int, device: torch.device) -> "Guard":
        """An empty guard on `device`."""
        return cls(spec, num_classes, torch.zeros(num_classes + 4, dtype=torch.float64, device=device))

    @torch.no_grad()
    def record(self, logits: Tensor, y: Tensor) -> None:
        """Add the predictions of a micro-batch: logits [b, K], y int64 [b]."""
        predicted = logits.argmax(1)
        self.sums[: self.num_classes] += torch.bincount(predicted, minlength=self.num_classes)
        self.sums[self.num_classes] += predicted.eq(y).sum()
        self.sums[self.num_classes + 1] += logits.double().std(1).sum()

    @torch.no_grad()
    def record_step(self, grad_norm: Tensor) -> None:
        """Add a step's gradient norm."""
        self.sums[self.num_classes + 2] += grad_norm
        self.sums[self.num_classes + 3] += 1

    def close(self, sums: Tensor, step: int) -> WindowStats:
        """End the window at `step`, given its sums over all ranks, and begin another."""
        counts, (right, spread, norms, steps) = sums[: self.num_classes], sums[self.num_classes :].tolist()
        n = max(float(counts.sum()), 1.0)
        window = WindowStats(float(counts.max()) / n, right / n, norms / max(steps, 1.0), spread / n)
        self.sums.zero_()
        if window.bad(self.spec, self.num_classes):
            self.bad_windows += 1
        else:
            self.bad_windows, self.healthy_step, self.warned = 0, step, False
        return window

    @property
    def collapsed(self) -> bool:
        """Whether it is time to act."""
        return self.bad_windows >= self.spec.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (without the sums)."""
        names = ("bad_windows", "healthy_step", "rewinds", "lr_scale", "warned")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        for name, value in state.items():
            setattr(self, name, value)
