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
from nrat_scale.loader import Batch
from nrat_scale.modes import attack_mode
from nrat_scale.objectives import LOSSES, Objective
from nrat_scale.recipe import RecipeSpec
from nrat_scale.seeds import torch_generator
from nrat_scale.stops import StopSignals
from nrat_scale.weights import awp

SUMS = ("loss", "natural", "robust", "images")


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


def train_step(t: Training, batch: Batch) -> None:
    """Algorithm 1 for one global batch, of which `batch` is this rank's part."""
    micro_batches = [attacked(t, x, y, noise) for x, y, noise in _micro_batches(t, batch)]

    def outer_loss(x: Tensor, x_adv: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Natural first, then adversarial, in two forwards: BatchNorm's statistics depend on it.
        logits = t.model(x) if t.objective.family != "at" else None
        logits_adv = t.model(x_adv) if x_adv is not None else None
        return t.objective.loss(logits, logits_adv, y), logits, logits_adv

    with _perturbed_weights(t, micro_batches):
        for number, (x, x_adv, y) in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with contextlib.nullcontext() if last else t.accelerator.no_sync(t.model):
                loss, logits, logits_adv = outer_loss(x, x_adv, y)
                t.accelerator.backward(loss / len(micro_batches))
            _record(t, loss, logits, logits_adv, y)
            t.objective.update(logits, y, lambda value: t.accelerator.reduce(value, "sum"))
        if t.recipe.train.max_grad_norm is not None:
            t.accelerator.clip_grad_norm_(t.model.parameters(), t.recipe.train.max_grad_norm)
        t.optimizer.step()
    t.optimizer.zero_grad()
    if t.ema is not None:
        t.ema.update(t.base, step=t.step + 1)


def _micro_batches(t: Training, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x, y, unit start noise) of each micro-batch; all randomness is that of the global batch, sliced."""
    device, size = t.accelerator.device, t.recipe.data.batch_size
    x, y = t.data.augmented(batch, device)
    if t.recipe.precision == "fp64":
        x = x.double()
    generator = torch_generator(device, t.recipe.seed, "attack", batch.step)
    noise = start_noise(torch.Size((size, *x.shape[1:])), t.recipe.threat.init, x, generator)
    noise = noise[batch.first : batch.first + len(x)]
    pieces = t.recipe.train.accumulate
    yield from zip(x.chunk(pieces), y.chunk(pieces), noise.chunk(pieces), strict=True)


def attacked(t: Training, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x, x_adv, y): the training attack, with the natural logits taken as the attack runs the model."""
    if not t.objective.attacks:
        return x, None, y
    _, encode, _ = in_space(t.base, t.recipe.threat.space)
    start = apply_noise(encode(x), noise, t.recipe.threat)
    return x, pgd(t.base, x, _inner(t, x, y), t.recipe.threat, start=start), y


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


def _perturbed_weights(
    t: Training, micro_batches: list[tuple[Tensor, Tensor | None, Tensor]]
) -> contextlib.AbstractContextManager[None]:
    spec, epoch = t.recipe.awp, t.step // t.data.steps_per_epoch
    if not spec.gamma or epoch < spec.warmup_epochs:
        return contextlib.nullcontext()

    def loss_of(x: Tensor, x_adv: Tensor | None, y: Tensor) -> Any:
        def loss(model: nn.Module) -> Tensor:
            logits = model(x) if t.objective.family != "at" else None
            return t.objective.loss(logits, model(x_adv) if x_adv is not None else None, y)

        return loss

    losses = [loss_of(*micro_batch) for micro_batch in micro_batches]
    return awp(t.base, losses, spec.gamma, reduce=lambda gradient: t.accelerator.reduce(gradient, "mean"))


@torch.no_grad()
def _record(t: Training, loss: Tensor, logits: Tensor | None, logits_adv: Tensor | None, y: Tensor) -> None:
    """Add this micro-batch to the epoch's sums, on the device; stop on a loss that is not finite."""
    if not bool(loss.isfinite()):
        raise FloatingPointError(
            f"The loss is not finite in step {t.step + 1}. Lower optim.lr (the paper uses 0.1, 0.05 or 0.01), "
            "set train.max_grad_norm, or use precision bf16 or fp32."
        )
    label = y if y.ndim == 1 else y.argmax(1)
    right = [0 if z is None else z.argmax(1).eq(label).sum() for z in (logits, logits_adv)]
    t.sums += torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=y.device) for v in (loss * len(y), *right, len(y))]
    )
