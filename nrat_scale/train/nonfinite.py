"""Steps that are not finite: detected on the device, agreed on by all ranks, reported by the host without waiting.

If a loss, gradient or attack is NaN or Inf on any rank, `found_inf` makes all ranks skip this update and every later one
on the device. The host reads the checks at the end of the step on a CPU, one step later on a GPU, and ends the run before it
saves. BatchNorm's running statistics and the sums of metrics are not restored, because nothing reads them afterwards.

Under fp16 an overflow is not an error: GradScaler skips the step, `train_step` restores both, and training continues.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import Tensor

from nrat_scale.core.files import write_atomically
from nrat_scale.data.batches import Batch
from nrat_scale.train.signals import SIGNALS

if TYPE_CHECKING:
    from nrat_scale.train.state import MicroBatch, TrainState

WRONG = {
    "attack": "the loss or gradient of the attack is not finite",
    "ball": "the adversarial images are outside the ball around the natural ones, which is a bug",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
}
_NAMED_IDS = 10


@dataclass(frozen=True)
class Verdict:
    """A step after which the run must end: because of a failure, a signal, or both."""

    step: int  # counted from 1
    wrong: tuple[str, ...]  # keys of WRONG that happened on any rank
    here: tuple[str, ...]  # those of them that happened on this rank
    signum: int  # the signal to stop by, 0 for none


class StepChecks:
    """Failures and stop signals of each step, summed over ranks on the device.

    A kind of WRONG that was noted once stays noted: all later steps are bad too.

    Args:
        total: returns the sum of an int32 tensor over ranks, as a new tensor.
        lag: steps by which the host reads behind the device; by default 0 on a CPU and 1 elsewhere.
    """

    def __init__(
        self, device: torch.device, total: Callable[[Tensor], Tensor] = torch.clone, lag: int | None = None
    ) -> None:
        self._total = total
        self._lag = lag if lag is not None else int(device.type != "cpu")
        # Counts of WRONG and SIGNALS, on this rank and summed over all.
        self.here = torch.zeros(len(WRONG) + len(SIGNALS), dtype=torch.int32, device=device)
        self._everywhere = torch.zeros_like(self.here)
        self.tensors = (self.here, self._everywhere)  # all that change on the device
        # Steps that the host has not read: number, counts, event that marks the end of the copy.
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def begin(self, signum: int) -> None:
        """Start a step; `signum` is the signal that this process has received, 0 for none."""
        self.here[len(WRONG) :].zero_()
        if signum:
            self.here[len(WRONG) + SIGNALS.index(signum)].fill_(1)

    def note(self, kind: str, bad: Tensor) -> None:
        """Note `kind` of WRONG on this rank if `bad` (bool scalar)."""
        self.here[tuple(WRONG).index(kind)] += bad

    def agree(self) -> Tensor:
        """Sum over ranks; whether nothing is wrong on any of them so far (bool scalar on the device)."""
        self._everywhere.copy_(self._total(self.here))  # in place: a graph writes where it was captured
        return ~self._everywhere[: len(WRONG)].any()

    def note_everywhere(self, kind: str, bad: Tensor) -> Tensor:
        """After `agree`, add a failure that is equal on all ranks; returns whether all checks pass (bool scalar)."""
        self._everywhere[tuple(WRONG).index(kind)] += bad
        self.note(kind, bad)
        return ~self._everywhere[: len(WRONG)].any()

    def post(self, step: int) -> None:
        """End `step`: start the copy of its counts to the host."""
        values = torch.stack([self._everywhere, self.here])
        if not values.is_cuda:
            self.pending.append((step, values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((step, host, event))

    def read(self, *, everything: bool = False) -> Verdict | None:
        """The first step with a failure or a signal, of those copied to the host; `everything` waits for all."""
        while len(self.pending) > (0 if everything else self._lag):
            step, values, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            everywhere, here = values.tolist()
            wrong, signum = tuple(compress(WRONG, everywhere)), next(compress(SIGNALS, everywhere[len(WRONG) :]), 0)
            if wrong or signum:
                return Verdict(step, wrong, tuple(compress(WRONG, here)), int(signum))
        return None


def report_bad_step(verdict: Verdict, state: "TrainState") -> str:
    """Save the images and weights of a bad step; the error message, the same on all ranks. All ranks must call it.

    Each rank on which it happened writes RUN/bad-step-XXXXXXXX-rankN.safetensors: x, x_adv, y, target (of label refinement), ids, generated (whether the
    source is the generated one), and `model.NAME`: the parameters from before the step, BatchNorm's statistics after it.
    """
    # The averaged gradient is equal on all ranks, so it does not name the rank that failed.
    causes = [kind for kind in verdict.wrong if kind != "gradient"] or ["gradient"]
    ((batch, parts),) = [recent for recent in state.recent if recent[0].step + 1 == verdict.step]
    places = [_save_step(state, batch, parts)] if set(causes) & set(verdict.here) else []
    where = "; ".join(gather_object(places))
    return (
        f"Step {verdict.step} was not applied: {' and '.join(WRONG[kind] for kind in causes)} ({where}). No checkpoint "
        "contains it. Lower optim.lr (the paper uses 0.1, 0.05 or 0.01), set train.max_grad_norm, or use precision bf16 or fp32."
    )


def images_not_finite(parts: "list[MicroBatch]") -> Tensor:
    """bool [b]: images with NaN or Inf in the adversarial pixels; if there are none, in the natural or adversarial logits.

    In the training forwards BatchNorm spreads one NaN over the batch. The attack runs earlier and, with `threat.bn: eval`,
    separates the images.
    """
    bad = torch.zeros(sum(len(part.x) for part in parts), dtype=torch.bool)
    for name in ("x_adv", "logits", "logits_adv"):
        tensors = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        if tensors and not bad.any():
            bad = ~torch.cat(tensors).flatten(1).isfinite().all(1).cpu()
    return bad


def _save_step(state: "TrainState", batch: Batch, parts: "list[MicroBatch]") -> str:
    """Write the file of this rank; its clause of the error message."""
    columns = {name: [getattr(part, name) for part in parts] for name in ("x", "y", "target", "x_adv")}
    tensors = {name: torch.cat(column) for name, column in columns.items() if column[0] is not None}
    tensors |= {"ids": batch.ids, "generated": batch.generated}
    tensors |= {f"model.{name}": value for name, value in state.base.state_dict().items()}
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    rank = state.accelerator.process_index
    path = state.run.bad_step(batch.step + 1, rank)
    write_atomically(path, save(plain, metadata={"format": "pt"}))
    sources = ["generated" if generated else "real" for generated in batch.generated.tolist()]
    ids = [f"{source} {number}" for source, number in zip(sources, batch.ids.tolist(), strict=True)]
    named = list(compress(ids, images_not_finite(parts).tolist())) or ids
    more = f" and {len(named) - _NAMED_IDS} more" if len(named) > _NAMED_IDS else ""
    whole = " (the whole batch)" if len(named) == len(ids) else ""
    return f"rank {rank}, images {', '.join(named[:_NAMED_IDS])}{more}{whole}, saved with the weights in {path}"
