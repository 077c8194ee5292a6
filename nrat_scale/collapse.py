"""The collapse guard: noise-robust losses can collapse to one class if the learning rate is too large.

The NRAT paper (section 4) reports vanishing gradients and single-class predictions, and lowers the learning rate from 0.1
to 0.05 or 0.01. Over windows of training steps the guard measures the share of the most frequent prediction, accuracy on
the training labels, gradient norm and spread of the logits. The sums stay on the device and are read once per window.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nrat_scale.core.errors import UserError, check_choice, check_value, quoted

ADVICE = "Lower optim.lr: the paper uses 0.1, and 0.05 or 0.01 if training collapses; or start warm (docs/training.md)"
# Of a network that has never had a good window: untrained ones name one class, too, but with nearly equal logits (a spread
# of 0.05 to 0.4 was measured; collapsed networks have 10 and more).
_FIRST_PATIENCE, _FIRST_SPREAD = 3, 1.0
_SAVED = ("bad_windows", "healthy_step", "rewinds", "lr_scale", "warned")  # of a `Guard`, in checkpoints


@dataclass(frozen=True)
class GuardSpec:
    """When training counts as collapsed (`patience` windows of steps in a row cross a limit), and what to do then."""

    # `warn`; `stop` with advice; `rewind` to the last checkpoint before the collapse, at a lower learning rate; `none`.
    action: str = "warn"
    window: int = 100  # steps
    patience: int = 3  # an untrained network names one class, too: before the first good window it is at least 3
    top_share: float = 0.9  # limit: share of the most frequent prediction, if accuracy is near chance (`near_chance`)
    min_grad_norm: float = 1e-8  # limit: gradient norm, mean over the steps
    max_logit_scale: float = 1e4  # limit: standard deviation of an image's logits, mean over the images
    lr_factor: float = 0.5  # `rewind` multiplies the learning rate by it
    max_rewinds: int = 3  # before the run stops

    def __post_init__(self) -> None:
        check_choice("guard.action", self.action, ("warn", "stop", "rewind", "none"))
        for name in ("window", "patience", "max_rewinds"):
            check_value(f"guard.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("top_share", "lr_factor"):
            check_value(f"guard.{name}", getattr(self, name), 0.0 < getattr(self, name) < 1.0, "in (0, 1)")


@dataclass(frozen=True)
class WindowStats:
    """Means over one window of steps."""

    top_share: float
    accuracy: float
    grad_norm: float
    logit_scale: float


# Catastrophic overfitting (Wong et al. 2020): accuracy under the attack of training, mean over an epoch, and of validation.
_OVERFITTED, _BROKEN = 0.3, 0.05


def catastrophic_epochs(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """The epochs that end with catastrophic overfitting: robust to the attack of training, and hardly to that of validation.

    Args:
        rows: of metrics.jsonl; training accuracy counts from 30 %, validation accuracy up to 5 %.
    """
    trained, validated = dict[Any, Any](), dict[Any, Any]()
    for row in rows:
        robust = row.get("robust")
        if row.get("kind") == "train":
            trained[row.get("epoch")] = row.get("robust_accuracy")
        elif row.get("kind") == "validation" and isinstance(robust, dict):
            validated[row.get("epoch")] = robust.get("accuracy")
    pairs = [(epoch, trained.get(epoch), accuracy) for epoch, accuracy in validated.items()]
    known = [(epoch, fit, held) for epoch, fit, held in pairs if fit is not None and held is not None]
    return [epoch for epoch, fit, held in known if fit >= _OVERFITTED and held <= _BROKEN]


def near_chance(num_classes: int) -> float:
    """The largest accuracy that counts as chance: twice 1 / K, but for few classes a quarter of the way from 1 / K to 1.

    Twice chance is 100 % for two classes, so a good model of unbalanced data would count as collapsed.
    """
    chance = 1.0 / num_classes
    return min(2.0 * chance, chance + 0.25 * (1.0 - chance))


class Guard:
    """The sums of the current window, and the count of consecutive bad windows.

    Attributes:
        sums: float64 [K + 4], on the device: predictions by class, hits, spread of the logits, gradient norms, steps.
        bad_windows: consecutive bad windows.
        healthy_step: the last step of the last good window; checkpoints up to it are good.
        lr_scale: factor of the learning rate, from the rewinds so far.
        warned: this collapse was already reported.
    """

    def __init__(self, spec: GuardSpec, num_classes: int, device: torch.device) -> None:
        self.spec, self.num_classes = spec, num_classes
        self.sums = torch.zeros(num_classes + 4, dtype=torch.float64, device=device)
        self.bad_windows, self.healthy_step, self.rewinds = 0, 0, 0
        self.lr_scale, self.warned = 1.0, False

    @torch.no_grad()
    def record(self, logits: Tensor, y: Tensor) -> None:
        """Add the predictions of a micro-batch: logits [b, K], y int64 [b]."""
        predicted = logits.argmax(1)
        # Not bincount, which makes the host wait for a GPU. Integer counts add up exactly in any order.
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=predicted.device)
        self.sums[: self.num_classes] += counts.scatter_add_(0, predicted, torch.ones_like(predicted))
        self.sums[self.num_classes] += predicted.eq(y).sum()
        self.sums[self.num_classes + 1] += logits.double().std(1).sum()

    @torch.no_grad()
    def record_step(self, grad_norm: Tensor) -> None:
        """Add a step's gradient norm."""
        self.sums[self.num_classes + 2] += grad_norm
        self.sums[self.num_classes + 3] += 1

    def close(self, sums: Tensor, step: int) -> WindowStats:
        """End the window at `step`, given its sums over all ranks, and start the next."""
        counts, (right, spread, norms, steps) = sums[: self.num_classes], sums[self.num_classes :].tolist()
        n = max(float(counts.sum()), 1.0)
        window = WindowStats(float(counts.max()) / n, right / n, norms / max(steps, 1.0), spread / n)
        self.sums.zero_()
        one_class = window.top_share >= self.spec.top_share and window.accuracy <= near_chance(self.num_classes)
        degenerate = window.grad_norm < self.spec.min_grad_norm or window.logit_scale > self.spec.max_logit_scale
        if one_class or degenerate:
            self.bad_windows += 1
        else:
            self.bad_windows, self.healthy_step, self.warned = 0, step, False
        return window

    @property
    def collapsed(self) -> bool:
        """Whether `patience` windows in a row were bad; at least three before the first good one."""
        untrained = self.healthy_step == 0
        return self.bad_windows >= max(self.spec.patience, _FIRST_PATIENCE if untrained else 1)

    def has_learnt(self, window: WindowStats) -> bool:
        """Whether training has moved the network at all; if not, a smaller learning rate is no remedy."""
        return self.healthy_step > 0 or window.logit_scale >= _FIRST_SPREAD

    def state(self) -> dict[str, Any]:
        """The entry of a checkpoint, without the sums."""
        return {name: getattr(self, name) for name in _SAVED}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore `state`.

        Raises:
            UserError: an entry is missing, unknown, of another type or out of range.
        """
        if saved.keys() != set(_SAVED) or any(type(saved[name]) is not type(getattr(self, name)) for name in _SAVED):
            raise UserError(f"the state of the collapse guard is {quoted(saved)}, expected {', '.join(_SAVED)}")
        counts_fit = all(saved[name] >= 0 for name in ("bad_windows", "healthy_step", "rewinds"))
        if not counts_fit or not 0.0 < saved["lr_scale"] <= 1.0:
            impossible = (
                f"the collapse guard has counts below 0 or a factor of the rate outside (0, 1]: {quoted(saved)}"
            )
            raise UserError(impossible)
        for name in _SAVED:
            setattr(self, name, saved[name])
