"""One training step, to be read beside Algorithm 1 of the paper.

    1. take this rank's part of global batch t, augmented, in [0, 1]
    2. attack it: x' = PGD(inner loss) on the twin, which shares the weights and needs no gradient for them
    3. with AWP, move the weights against the model; else leave them
    4. forward x, then x', in training mode; outer loss; backward (averaged over ranks and micro-batches)
    5. optimizer step, EMA: unless something was not finite on any rank. Then nothing changes, on all of them

All random numbers come from (seed, step), so a resumed run repeats the undisturbed one. Nothing here waits for a GPU: what
the host must know it reads from `Training.flags` later.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nrat_scale.attacks import apply_noise, in_space, search, start_noise
from nrat_scale.batchnorm import RunningState
from nrat_scale.checkpoint import Saver
from nrat_scale.clock import Clock
from nrat_scale.data import LabelledImages, TrainingData
from nrat_scale.flags import Flags
from nrat_scale.guard import Guard
from nrat_scale.loader import Batch
from nrat_scale.objectives import LOSSES, Objective
from nrat_scale.optim import align_gradients
from nrat_scale.recipe import RecipeSpec
from nrat_scale.seeds import torch_generator
from nrat_scale.stops import StopSignals
from nrat_scale.twin import Twin
from nrat_scale.weights import Ema, awp

# Summed over the images of an epoch; `clean*` and `noisy*` only where clean labels are known: images whose label is right,
# those of them that are predicted so, images whose label is wrong, those predicted as labelled (memorised), and as they
# really are.
SUMS = (
    "loss", "natural", "robust", "images", "grad_norm", "steps",
    "clean", "clean_fitted", "noisy", "noisy_fitted", "noisy_corrected",
)  # fmt: skip


@dataclass
class Training:
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
    twin: Twin
    optimizer: Any
    objective: Objective
    ema: Ema | None
    validation: LabelledImages
    guard: Guard
    flags: Flags
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


def train_step(t: Training, batch: Batch) -> None:
    """Algorithm 1 for one global batch, of which `batch` is this rank's part."""
    t.recent.append(batch)
    t.flags.begin(t.signals.received)
    t.running.begin()
    with t.clock.section("data"):
        parts = list(micro_batches(t, batch))
    # DM_AT attacks with batch statistics: its natural training forward gives the logits that the attack needs as well.
    reuse = t.recipe.threat.bn == "batch" and t.objective.inner_needs_natural and not _awp_acts(t)
    reuse = reuse and not _starts_precisely(t)
    if t.objective.attacks and not reuse:
        parts = [attacked(t, part) for part in parts]

    with _perturbed_weights(t, parts):
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            with contextlib.nullcontext() if last else t.accelerator.no_sync(t.model):
                # Natural first, then adversarial, in two forwards: BatchNorm's statistics depend on it.
                with t.clock.section("outer"):
                    logits = t.model(part.x) if t.objective.family != "at" else None
                part = attacked(t, part, logits) if reuse else part
                with t.clock.section("outer"):
                    logits_adv = t.model(part.x_adv) if part.x_adv is not None else None
                    loss = t.objective.loss(logits, logits_adv, part.y)
                    t.accelerator.backward(loss / len(parts))
            _record(t, loss, logits, logits_adv, part)
            t.objective.update(logits, part.y, lambda value: t.accelerator.reduce(value, "sum"))
        with t.clock.section("optimizer"):
            good = _finish_gradient(t)
            t.optimizer.step()
    with t.clock.section("optimizer"):
        t.optimizer.zero_grad()
        t.running.end(good, len(parts))
        if t.ema is not None:
            t.ema.update_where(good, t.base, step=t.step + 1)
        t.flags.post(t.step + 1)


def micro_batches(t: Training, batch: Batch) -> Iterator[MicroBatch]:
    """The parts of this rank's batch; all randomness is that of the global batch, sliced."""
    device, size = t.accelerator.device, t.recipe.data.batch_size
    x, y = t.data.augmented(batch, device)
    if t.recipe.precision == "fp64":
        x = x.double()
    generator = torch_generator(device, t.recipe.seed, "attack", batch.step)
    noise = start_noise(torch.Size((size, *x.shape[1:])), t.recipe.threat.init, x, generator)
    noise = noise[batch.first : batch.first + len(x)]
    layout = torch.channels_last if t.recipe.train.channels_last else torch.contiguous_format
    x, noise = (tensor.contiguous(memory_format=layout) for tensor in (x, noise))
    clean = batch.clean_labels.to(device, non_blocking=True)
    pieces = (tensor.chunk(t.recipe.train.accumulate) for tensor in (x, y, clean, noise))
    yield from (MicroBatch(*piece) for piece in zip(*pieces, strict=True))


def attacked(t: Training, part: MicroBatch, logits: Tensor | None = None) -> MicroBatch:
    """`part` with x_adv: the training attack.

    Args:
        logits: of the natural images as the attack runs the model, where they are known already.
    """
    with t.clock.section("attack"):
        t.twin.refresh()
        threat = t.recipe.threat
        mixed, precise = _in_autocast(t), t.twin.forward
        first = precise if _starts_precisely(t) else mixed
        model, encode, decode = in_space(t.twin.module, threat.space, mixed)
        first_model, _, _ = in_space(t.twin.module, threat.space, first)
        if logits is None and t.objective.inner_needs_natural:
            with torch.no_grad():
                logits = first(part.x)
        found = search(
            model,
            encode(part.x),
            _inner(t, logits, part.y),
            threat,
            apply_noise(encode(part.x), part.noise, threat),
            first_model,
        )
        t.flags.note("attack", ~found.finite)
        t.flags.note("ball", found.finite & ~found.inside)
        return replace(part, x_adv=decode(found.x_adv))


def _in_autocast(t: Training) -> Callable[[Tensor], Tensor]:
    if t.recipe.precision in ("fp32", "fp64"):
        return t.twin.forward

    def mixed(x: Tensor) -> Tensor:
        with t.accelerator.autocast():
            return t.twin.forward(x)

    return mixed


def _starts_precisely(t: Training) -> bool:
    """Whether the natural logits and the first attack step are computed in float32, all the rest being in bf16 or fp16.

    The first step compares with the natural prediction an almost equal one, and its gradient would be rounding noise
    (docs/benchmarks.md has the measurement).
    """
    return t.objective.inner_needs_natural and t.recipe.precision in ("bf16", "fp16")


def _inner(t: Training, logits: Tensor | None, y: Tensor) -> Callable[[Tensor], Tensor]:
    """What the attack maximises, a function of the adversarial logits."""
    if y.ndim == 2 and t.objective.spec.inner == "kl":
        # CutMix: DM_AT attacks KL(y || p') instead of KL(p || p'); its gradient is that of cross-entropy.
        return lambda logits_adv: LOSSES["ce"](logits_adv, y)
    return t.objective.inner(logits, y)


def _awp_acts(t: Training) -> bool:
    return t.recipe.awp.gamma > 0 and t.step // t.data.steps_per_epoch >= t.recipe.awp.warmup_epochs


def _perturbed_weights(t: Training, parts: list[MicroBatch]) -> contextlib.AbstractContextManager[None]:
    if not _awp_acts(t):
        return contextlib.nullcontext()

    def loss_of(part: MicroBatch) -> Any:
        def loss(model: nn.Module) -> Tensor:
            logits = model(part.x) if t.objective.family != "at" else None
            return t.objective.loss(logits, model(part.x_adv) if part.x_adv is not None else None, part.y)

        return loss

    losses = [loss_of(part) for part in parts]
    return awp(t.base, losses, t.recipe.awp.gamma, reduce=lambda gradient: t.accelerator.reduce(gradient, "mean"))


@torch.no_grad()
def _record(t: Training, loss: Tensor, logits: Tensor | None, logits_adv: Tensor | None, part: MicroBatch) -> None:
    """Add this micro-batch to the epoch's sums, on the device."""
    t.flags.note("loss", ~loss.isfinite())
    label = part.y if part.y.ndim == 1 else part.y.argmax(1)
    right = [torch.zeros_like(label) if z is None else z.argmax(1).eq(label) for z in (logits, logits_adv)]
    seen = logits if logits is not None else logits_adv
    assert seen is not None
    t.guard.record(seen, label)
    known = part.clean >= 0
    if part.y.ndim == 2:  # CutMix: what an image shows is no longer one clean label
        known = torch.zeros_like(known)
    clean, noisy = known & part.clean.eq(label), known & part.clean.ne(label)
    predicted = seen.argmax(1)
    fitted = predicted.eq(label)
    counts = [*right, torch.ones_like(label)]
    subsets = [clean, clean & fitted, noisy, noisy & fitted, noisy & predicted.eq(part.clean)]
    values = {"loss": loss.double() * len(label)}
    values |= {name: count.sum() for name, count in zip(SUMS[1:4], counts, strict=True)}
    values |= {name: count.sum() for name, count in zip(SUMS[6:], subsets, strict=True)}
    t.sums += torch.stack([values.get(name, torch.zeros((), device=label.device)).double() for name in SUMS])


@torch.no_grad()
def _finish_gradient(t: Training) -> Tensor:
    """Note the norm of the averaged gradient and clip it; let the optimizer skip a bad step.

    Returns:
        Whether the step counts, bool scalar, the same on all ranks.
    """
    good = t.flags.agree()
    align_gradients(t.base.parameters())
    gradients = [p.grad for p in t.base.parameters() if p.grad is not None]
    scaler = t.accelerator.scaler
    if scaler is not None:
        # The scaler looks for itself; an overflow is its daily business, and a reason to skip, not to stop.
        gradients[0].mul_(torch.where(good, 1.0, math.nan))
        t.accelerator.unscale_gradients()
    norm = torch.nn.utils.get_total_norm(gradients)
    limit = t.recipe.train.max_grad_norm
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(t.base.parameters(), limit, norm)
    if t.accelerator.is_main_process:  # the averaged gradient is that of all ranks: one step counts once
        t.guard.record_step(norm)
        t.sums[SUMS.index("grad_norm")] += norm
        t.sums[SUMS.index("steps")] += 1
    if scaler is not None:
        return good & norm.isfinite()
    good = t.flags.note_everywhere("gradient", ~norm.isfinite())
    t.optimizer.optimizer.found_inf = (~good).float()  # torch's fused optimizers then leave everything as it is
    return good
