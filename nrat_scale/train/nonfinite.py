"""What may go wrong within a step, and signals to stop: noted on the device, summed over ranks, read without waiting.

A step that went wrong must not change anything, so the device decides by itself (`agree`), and all ranks alike. The host
learns of it when the copy has arrived: on a CPU at once, on a GPU one step later. Wrong stays wrong: steps that were
started in between change nothing either, and what the host finds is the state before the first bad step.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nrat_scale.train.signals import SIGNALS

WRONG = ("attack", "ball", "loss", "gradient")


@dataclass(frozen=True)
class Verdict:
    """What became of `step` (counted from 1): what was `wrong` on any rank, what on this one, and the signal to stop by."""

    step: int
    wrong: tuple[str, ...]
    here: tuple[str, ...]
    signum: int


class StepChecks:
    """The flags of a run's steps.

    Args:
        device: of the training.
        total: sums an int32 tensor over ranks; None where there is one.
    """

    def __init__(self, device: torch.device, total: Callable[[Tensor], Tensor] | None = None) -> None:
        self._total = total
        self._lag = 0 if device.type == "cpu" else 1  # steps
        self._here = torch.zeros(len(WRONG) + len(SIGNALS), dtype=torch.int32, device=device)
        self._all = torch.zeros_like(self._here)
        self._posted: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def begin(self, signum: int) -> None:
        """Start a step; `signum` is the signal that this process has received, 0 for none."""
        self._here[len(WRONG) :].zero_()
        if signum:
            self._here[len(WRONG) + SIGNALS.index(signum)].fill_(1)

    @torch.no_grad()
    def note(self, kind: str, bad: Tensor) -> None:
        """`bad` (bool scalar): this rank's `kind` of WRONG happened."""
        self._here[WRONG.index(kind)] += bad

    @torch.no_grad()
    def agree(self) -> Tensor:
        """Sum over ranks; whether nothing was wrong on any of them up to now (bool scalar, on the device)."""
        self._all = self._here.clone() if self._total is None else self._total(self._here)
        return ~self._all[: len(WRONG)].any()

    @torch.no_grad()
    def note_everywhere(self, kind: str, bad: Tensor) -> Tensor:
        """After `agree`: what all ranks see alike; whether nothing was wrong up to now."""
        self._all[WRONG.index(kind)] += bad
        self.note(kind, bad)
        return ~self._all[: len(WRONG)].any()

    @torch.no_grad()
    def post(self, step: int) -> None:
        """End `step`: send its flags on their way to the host."""
        values = torch.stack([self._all, self._here])
        if not values.is_cuda:
            self._posted.append((step, values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._posted.append((step, host, event))

    def read(self, *, everything: bool = False) -> Verdict | None:
        """The first verdict that asks for something, of those that have arrived (or, waiting for them, of all)."""
        while len(self._posted) > (0 if everything else self._lag):
            step, values, event = self._posted.popleft()
            if event is not None:
                event.synchronize()
            everywhere, here = values.tolist()
            wrong, local = (tuple(k for k, n in zip(WRONG, row, strict=False) if n) for row in (everywhere, here))
            asked = [s for s, n in zip(SIGNALS, everywhere[len(WRONG) :], strict=True) if n]
            if wrong or asked:
                return Verdict(step, wrong, local, int(asked[0]) if asked else 0)
        return None
