"""A few images around which the checks for masked gradients evaluate a model."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nrat_scale.attacks import Map, ThreatSpec, apply_noise, search, start_noise
from nrat_scale.core.seeds import torch_generator
from nrat_scale.evaluate.attacks import margin

PROBED_IMAGES = 32  # of which the checks make about 150 forward passes, counting a backward pass as two
_STEPS = 10  # of the attacks that are compared with each other
_LEAST_RADIUS = 1 / 255  # of checks around an image, if the threat's is smaller


@dataclass(frozen=True)
class Probe:
    """The images of the checks, with their labels and the model's answers."""

    model: nn.Module  # in evaluation mode, its parameters frozen
    x: Tensor  # float32 [B, C, H, W] in [0, 1]
    y: Tensor  # int64 [B]
    logits: Tensor  # float32 [B, K] of `x`
    threat: ThreatSpec

    @property
    def right(self) -> Tensor:
        """Which images are classified correctly: bool [B]."""
        return self.logits.argmax(1) == self.y

    @property
    def scale(self) -> float:
        """The median margin of the correctly classified images, the unit in which margins are compared."""
        margins = margin(self.logits, self.y).abs()[self.right]
        return max(float(margins.median()), torch.finfo(torch.float32).tiny) if len(margins) else 1.0

    @property
    def radius(self) -> float:
        """The threat's radius per pixel; in l_2 that of a perturbation which is spread evenly."""
        eps = self.threat.eps if self.threat.norm == "linf" else self.threat.eps / math.sqrt(self.x[0].numel())
        return min(max(eps, _LEAST_RADIUS), 0.5)

    def uniform(self, name: str, number: int = 0) -> Tensor:
        """Noise from U(-1, 1), shaped like `x`, the same in every run."""
        generator = torch_generator("cpu", 0, "probe", name, number)
        return start_noise(self.x.shape, "uniform", torch.zeros(()), generator).to(self.x)

    def signs(self, name: str, number: int = 0) -> Tensor:
        """Random signs, shaped like `x`, the same in every run."""
        return torch.where(self.uniform(name, number) < 0, -1.0, 1.0)

    def margins(self, x: Tensor) -> Tensor:
        """The CW loss [B] at `x`, above 0 for misclassified images."""
        with torch.no_grad():
            return margin(self.model(x), self.y)

    def attacked(self, loss: Callable[[Tensor], Tensor], model: Map | None = None) -> Tensor:
        """The largest margins [B] at the ends of a short PGD on `loss` and half of it, from one random start.

        Args:
            loss: maps logits [B, K] to the loss [B] to maximise.
            model: differentiates in another way than the model itself.
        """
        threat = replace(self.threat, space="pixel", num_steps=_STEPS // 2, step=self.threat.eps / 4, init="uniform")
        x_adv = apply_noise(self.x, self.uniform("start"), threat)
        largest = torch.full_like(self.logits[:, 0], -math.inf)
        for _ in range(2):
            x_adv = search(model or self.model, self.x, loss, threat, x_adv).x_adv
            largest = torch.maximum(largest, self.margins(x_adv))
        return largest


def gradient(function: Map, x: Tensor) -> Tensor:
    """The gradient of the sum of `function` at `x`, shaped like `x`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(function(x).sum(), x)
    return found


def paired_gain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The mean of after - before over images, and its standard error; (0, inf) for fewer than eight images."""
    if len(before) < 8:
        return 0.0, math.inf
    gains = (after - before).double()
    return float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
