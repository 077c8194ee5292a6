"""One training step, to be read beside Algorithm 1 of the paper.

    1. take this rank's part of global batch t, augmented, in [0, 1]
    2. attack it: x' = PGD(inner loss) on the bare module, parameters frozen
    3. with AWP, move the weights against the model; else leave them
    4. forward x, then x', in training mode; outer loss; backward (averaged over ranks and micro-batches)
    5. optimizer step, EMA

All random numbers come from (seed, step), so a resumed run repeats the undisturbed one.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nrat_scale.attacks import apply_noise, in_space, pgd, start_noise
from nrat_scale.data import LabelledImages, TrainingData
from nrat_scale.guard import Guard
from nrat_scale.loader import Batch
from nrat_scale.modes import attack_mode
from nrat_scale.objectives import LOSSES, Objective
from nrat_scale.recipe import RecipeSpec
from nrat_scale.seeds import torch_generator
from nrat_scale.stops import StopSignals
from nrat_scale.weights import awp

# Summed over the images of an epoch; `clean*` and `noisy*` only where clean labels are known: images whose label is right,
# those of them that are predicted so, images whose label is wrong, those predicted as labelled (memorised), and as they
# really are.
SUMS = (
    "loss", "natural", "robust", "images", "grad_norm", "steps",
    "clean", "clean_fitted", "noisy", "noisy_fitted", "noisy_corrected",
)  # fmt: skip


@dataclass
class Training:
    """Everything one run holds. `base` is the bare module, `model` what Accelerate made of it (DDP, autocast).

    `validation_due`: the epoch that `step` ends was trained and logged, but not validated, because the run was stopped.
    """

    recipe: RecipeSpec
    run: Path
    data: TrainingData
    accelerator: Accelerator
    base: nn.Module
    model: nn.Module
    optimizer: Any
    objective: Objective
    ema: ModelEmaV3 | None
    validation: LabelledImages
    guard: Guard
    step: int = 0
    best: dict[str, Any] | None = None
    validation_due: bool = False
    metrics: list[str] = field(default_factory=list)
    signals: StopSignals = field(default_factory=StopSignals)
    sums: Tensor = field(default_factory=lambda: torch.zeros(len(SUMS), dtype=torch.float64))

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
    """A part of this rank's batch on the device: x, x_adv [b, C, H, W], y int64 [b] or [b, K], clean labels int64 [b]."""

    x: Tensor
    x_adv: Tensor | None
    y: Tensor
    clean: Tensor


def train_step(t: Training, batch: Batch) -> None:
    """Algorithm 1 for one global batch, of which `batch` is this rank's part."""
    micro_batches = [attacked(t, *part) for part in _micro_batches(t, batch)]

    with _perturbed_weights(t, micro_batches):
        for number, part in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with contextlib.nullcontext() if last else t.accelerator.no_sync(t.model):
                # Natural first, then adversarial, in two forwards: BatchNorm's statistics depend on it.
                logits = t.model(part.x) if t.objective.family != "at" else None
                logits_adv = t.model(part.x_adv) if part.x_adv is not None else None
                loss = t.objective.loss(logits, logits_adv, part.y)
                t.accelerator.backward(loss / len(micro_batches))
            _record(t, loss, logits, logits_adv, part)
            t.objective.update(logits, part.y, lambda value: t.accelerator.reduce(value, "sum"))
        _record_gradient(t)
        t.optimizer.step()
    t.optimizer.zero_grad()
    if t.ema is not None:
        t.ema.update(t.base, step=t.step + 1)


def _micro_batches(t: Training, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(x, y, clean labels, unit start noise) of each micro-batch; all randomness is that of the global batch, sliced."""
    device, size = t.accelerator.device, t.recipe.data.batch_size
    x, y = t.data.augmented(batch, device)
    if t.recipe.precision == "fp64":
        x = x.double()
    generator = torch_generator(device, t.recipe.seed, "attack", batch.step)
    noise = start_noise(torch.Size((size, *x.shape[1:])), t.recipe.threat.init, x, generator)
    noise = noise[batch.first : batch.first + len(x)]
    pieces = t.recipe.train.accumulate
    clean = batch.clean_labels.to(device, non_blocking=True)
    yield from zip(x.chunk(pieces), y.chunk(pieces), clean.chunk(pieces), noise.chunk(pieces), strict=True)


def attacked(t: Training, x: Tensor, y: Tensor, clean: Tensor, noise: Tensor) -> MicroBatch:
    """The training attack, with the natural logits taken as the attack runs the model."""
    if not t.objective.attacks:
        return MicroBatch(x, None, y, clean)
    _, encode, _ = in_space(t.base, t.recipe.threat.space)
    start = apply_noise(encode(x), noise, t.recipe.threat)
    return MicroBatch(x, pgd(t.base, x, _inner(t, x, y), t.recipe.threat, start=start), y, clean)


def _inner(t: Training, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """What the attack maximises, a function of the adversarial logits."""
    if y.ndim == 2 and t.objective.spec.inner == "kl":
        # CutMix: DM_AT attacks KL(y || p') instead of KL(p || p'); its gradient is that of cross-entropy.
        return lambda logits_adv: LOSSES["ce"](logits_adv, y)
    logits = None
    if t.objective.inner_needs_natural:
        with torch.no_grad(), attack_mode(t.base, t.recipe.threat.bn):
            logits = t.base(x)
    return t.objective.inner(logits, y)


def _perturbed_weights(t: Training, micro_batches: list[MicroBatch]) -> contextlib.AbstractContextManager[None]:
    spec, epoch = t.recipe.awp, t.step // t.data.steps_per_epoch
    if not spec.gamma or epoch < spec.warmup_epochs:
        return contextlib.nullcontext()

    def loss_of(part: MicroBatch) -> Any:
        def loss(model: nn.Module) -> Tensor:
            logits = model(part.x) if t.objective.family != "at" else None
            return t.objective.loss(logits, model(part.x_adv) if part.x_adv is not None else None, part.y)

        return loss

    losses = [loss_of(part) for part in micro_batches]
    return awp(t.base, losses, spec.gamma, reduce=lambda gradient: t.accelerator.reduce(gradient, "mean"))


@torch.no_grad()
def _record(t: Training, loss: Tensor, logits: Tensor | None, logits_adv: Tensor | None, part: MicroBatch) -> None:
    """Add this micro-batch to the epoch's sums, on the device; stop on a loss that is not finite."""
    if not bool(loss.isfinite()):
        raise FloatingPointError(
            f"The loss is not finite in step {t.step + 1}. Lower optim.lr (the paper uses 0.1, 0.05 or 0.01), "
            "set train.max_grad_norm, or use precision bf16 or fp32."
        )
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
def _record_gradient(t: Training) -> None:
    """Note the norm of the averaged gradient of all parameters, and clip it where the recipe says so."""
    if t.accelerator.scaler is not None:
        t.accelerator.unscale_gradients()
    gradients = [p.grad for p in t.base.parameters() if p.grad is not None]
    limit = t.recipe.train.max_grad_norm
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(t.base.parameters(), limit, norm)
    t.guard.record_step(norm)
    t.sums[SUMS.index("grad_norm")] += norm
    t.sums[SUMS.index("steps")] += 1
