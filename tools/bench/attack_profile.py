"""Where the time of AutoAttack goes: forward and backward passes of the model, and the attack's own work, by component."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.evaluate.attacks import ATTACKS, Block, parse_attack


@dataclass
class Spent:
    """Seconds of one component, and its calls of the model."""

    total: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    calls: int = 0
    images: int = 0  # over all calls

    @property
    def own(self) -> float:
        """Everything that is not the model: projections, sorting, random numbers, the loss and its gradient."""
        return self.total - self.forward - self.backward


class Profile(nn.Module):
    """A model that measures its passes.

    Args:
        clock: returns seconds.
        wait: until the device has done everything; each measurement waits, so the whole runs slower than without.

    Attributes:
        components: in the order in which they ran.
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float], wait: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.model, self._clock, self._wait = model, clock, wait
        self.components: dict[str, Spent] = {}
        self._name, self._begun, self._backward_begun = "", 0.0, 0.0

    def robust_images(self, block: Block) -> int:
        """Measure the evaluation's AutoAttack on `block`; the number of images that it does not break."""
        attack = parse_attack("aa")
        perturb = ATTACKS[attack.kind].perturb
        assert perturb is not None and block.log is not None
        block.log.running = self.begin
        x_adv = perturb(attack, replace(block, model=self))
        self.begin("")
        with torch.no_grad():
            return int(self.model(x_adv).argmax(1).eq(block.y).sum())

    def begin(self, name: str) -> None:
        """End the component that ran so far, and begin `name`; nothing is measured between the components."""
        now = self._now()
        if self._name:
            self.components[self._name].total += now - self._begun
        self._name, self._begun = name, now
        if name:
            self.components.setdefault(name, Spent())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if differentiated:
            x = _Passed.apply(x, self._end_backward)
        begun = self._now()
        logits: Tensor = self.model(x)
        if self._name:
            spent = self.components[self._name]
            spent.forward += self._now() - begun
            spent.calls += 1
            spent.images += len(x)
        return _Passed.apply(logits, self._begin_backward) if differentiated else logits

    def _begin_backward(self) -> None:
        self._backward_begun = self._now()

    def _end_backward(self) -> None:
        if self._name:
            self.components[self._name].backward += self._now() - self._backward_begun

    def _now(self) -> float:
        self._wait()
        return self._clock()


class _Passed(torch.autograd.Function):
    """The identity; `then` is called when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.then()
        return gradient, None


def print_profile(components: dict[str, Spent]) -> None:
    """One row for each component, and one for all."""
    print("\n| component | s | of all | forward | backward | attack's own work | calls of the model | images a call |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    sums = Counter[str]()
    for spent in components.values():
        sums.update({name: getattr(spent, name) for name in ("total", "forward", "backward", "calls", "images")})
    whole = Spent(**sums)
    for name, spent in {**components, "all": whole}.items():
        parts = " | ".join(_percent(part, spent.total) for part in (spent.forward, spent.backward, spent.own))
        size = f"{spent.images / spent.calls:.1f}" if spent.calls else ""
        share = _percent(spent.total, whole.total)
        print(f"| {name} | {spent.total:.1f} | {share} | {parts} | {spent.calls:,} | {size} |", flush=True)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""
