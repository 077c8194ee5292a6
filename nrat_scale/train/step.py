"""One training step, to be read beside Algorithm 1 of the paper.

    1. take this rank's part of global batch t, augmented, in [0, 1]
    2. attack it: x' = PGD(inner loss), as the phase of `threat.schedule` says, on the attack model, which shares the weights
       and needs no gradient for them
    3. with AWP, perturb the weights
    4. forward x, then x', in training mode; outer loss; backward (averaged over ranks and micro-batches)
    5. optimizer step, skipped on all ranks if a loss or gradient is not finite on any; EMA

All random numbers are functions of (seed, step), so a resumed run repeats the uninterrupted one. Nothing here makes the host wait
for a GPU: the host reads `TrainState.checks` later.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from nrat_scale.attacks import apply_noise, in_space, search, start_noise
from nrat_scale.core.seeds import torch_generator
from nrat_scale.data.batches import Batch
from nrat_scale.data.source import UNKNOWN_LABEL
from nrat_scale.optim import align_gradients
from nrat_scale.train.metrics import record_micro_batch, record_step
from nrat_scale.train.refinement import inner_loss, new_rows, outer_loss, refined, remember
from nrat_scale.train.state import MicroBatch, TrainState
from nrat_scale.weights import awp


def train_step(state: TrainState, batch: Batch) -> None:
    """Algorithm 1 for one global batch; `batch` is this rank's part of it."""
    done: list[MicroBatch] = []
    state.recent.append((batch, done))
    state.checks.begin(state.signals.received)
    with state.clock.section("data"):
        parts = list(micro_batches(state, batch))
    epoch, place = divmod(state.step, state.data.steps_per_epoch)
    total = partial(state.accelerator.reduce, reduction="sum")
    state.objective.begin_step([part.y for part in parts], total, new_epoch=place == 0 and epoch > 0)
    with state.clock.section("outer"):
        parts = refined(state, batch, parts)
    state.before = [tensor.clone() for tensor in state.restored]
    perturbed = state.recipe.awp.gamma > 0 and epoch >= state.recipe.awp.warmup_epochs
    reuse = reuses_natural(state) and not perturbed
    if state.objective.attacks and not reuse:
        parts = [attacked(state, part) for part in parts]

    with _perturbed_weights(state, parts) if perturbed else contextlib.nullcontext():
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else state.accelerator.no_sync(state.model):
                done.append(_trained(state, part, len(parts), reuse=reuse))
            state.objective.update(done[-1].logits, part.y, total, part.weights)
        remember(state, batch, done)
        if state.class_starts is not None:
            state.class_starts.update(total)
        if perturbed:  # weight decay acts on the perturbed weights
            with state.clock.section("optimizer"):
                good = update_weights(state)
    with state.clock.section("optimizer"):
        if perturbed:
            finish_step(state, len(parts), good)
        elif state.graphs is None:
            update(state, len(parts))
        else:
            state.graphs.end_step(len(parts))
        state.checks.post(state.step + 1)


def micro_batches(state: TrainState, batch: Batch) -> Iterator[MicroBatch]:
    """The `train.accumulate` parts of this rank's batch; random numbers are drawn for the global batch and sliced."""
    device, size = state.accelerator.device, state.recipe.data.batch_size
    x, y = state.data.augmented(batch, device)
    if state.recipe.precision == "fp64":
        x = x.double()
    if state.class_starts is not None:
        noise = state.class_starts.noise(y)
    else:
        generator = torch_generator(device, state.recipe.seed, "attack", batch.step)
        noise = start_noise(torch.Size((size, *x.shape[1:])), state.recipe.threat.start, x, generator)
        noise = noise[batch.first : batch.first + len(x)]
    layout = torch.channels_last if state.recipe.train.channels_last else torch.contiguous_format
    x, noise = (tensor.contiguous(memory_format=layout) for tensor in (x, noise))
    clean = batch.clean_labels.to(device, non_blocking=True)
    if y.ndim == 2:  # CutMix: an image no longer has one clean label
        clean = torch.full_like(clean, UNKNOWN_LABEL)
    weights, parts = state.data.loss_weights(batch, device), state.recipe.train.accumulate
    pieces = [tensor.chunk(parts) for tensor in (x, y, clean, noise)]
    weighted: Sequence[Tensor | None] = [None] * parts if weights is None else weights.chunk(parts)
    for images, labels, right, unit_noise, weight in zip(*pieces, weighted, strict=True):
        yield MicroBatch(images, labels, right, unit_noise, weights=weight)


def _trained(state: TrainState, part: MicroBatch, num_parts: int, *, reuse: bool) -> MicroBatch:
    """`part` after its forwards and its backward pass, with loss and logits; `reuse`: attack with the natural logits."""
    if reuse:
        with state.clock.section("outer"):
            logits = state.model(part.x)
        part = attacked(state, part, logits)
        with state.clock.section("outer"):
            return _backward(state, logits, part, num_parts)
    with state.clock.section("outer"):
        if state.graphs is None:
            return forward_backward(state, part, num_parts)
        return state.graphs.train(part, num_parts)


def forward_backward(state: TrainState, part: MicroBatch, num_parts: int) -> MicroBatch:
    """Forward of x, then of x_adv, outer loss, backward, metrics; `part` with loss, logits and what is remembered of them."""
    # Two forwards, natural first: BatchNorm's statistics depend on the split and the order.
    logits = state.model(part.x) if state.objective.family != "at" else None
    return _backward(state, logits, part, num_parts)


def _backward(state: TrainState, logits: Tensor | None, part: MicroBatch, num_parts: int) -> MicroBatch:
    logits_adv = state.model(part.x_adv) if part.x_adv is not None else None
    y, rows = part.trained, new_rows(state, part.x, logits, logits_adv, part.history)
    if rows is not None:
        part = replace(part, remembered=rows)
        y = rows if state.objective.spec.refine.kind == "sglr" else y
    loss = outer_loss(state, logits, logits_adv, y, part.history, part.weights)
    state.accelerator.backward(loss / num_parts)
    found = [None if tensor is None else tensor.detach() for tensor in (loss, logits, logits_adv)]
    part = replace(part, loss=found[0], logits=found[1], logits_adv=found[2])
    record_micro_batch(state, part)
    return part


def attacked(state: TrainState, part: MicroBatch, logits: Tensor | None = None) -> MicroBatch:
    """`part` with the x_adv of the training attack.

    `logits` are natural logits in the attack's BatchNorm mode; if None, they are computed for an inner loss that needs them.
    """
    with state.clock.section("attack"):
        state.attack_model.refresh()
        # A soft label would take the place of p in a divergence, as that of CutMix does.
        y = part.y if state.objective.inner_needs_natural else part.trained
        given = (part.x, y, part.noise) if logits is None else (part.x, y, part.noise, logits.detach())
        if state.graphs is None:
            found = attack(state, *given, history=part.history)
        else:
            found = state.graphs.attack(*given, key=state.threat.key)
        x_adv, finite, inside = found[:3]
        if state.class_starts is not None:
            state.class_starts.add(found[3], part.label)
        state.checks.note("attack", ~finite)
        state.checks.note("ball", finite & ~inside)
        return replace(part, x_adv=x_adv)


def attack(
    state: TrainState,
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    logits: Tensor | None = None,
    *,
    history: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(x_adv, whether all was finite, whether it is inside the ball): the training attack, without a decision of the host.

    With starts per class the gradient of the first step is a fourth result.
    """
    threat, module = state.threat, state.attack_model.module

    def mixed(images: Tensor) -> Tensor:
        with state.accelerator.autocast():
            return state.attack_model.low_forward(images)

    first = state.attack_model.forward if _starts_precisely(state) else mixed
    if logits is None and state.objective.inner_needs_natural:
        with torch.no_grad():
            logits = first(x)
    inner = inner_loss(state, logits, y, history)
    model, encode, decode = in_space(module, threat.space, mixed)
    first_model, _, _ = in_space(module, threat.space, first)
    found = search(model, encode(x), inner, threat, apply_noise(encode(x), noise, threat), first_model)
    results = decode(found.x_adv), found.finite, found.inside
    if state.class_starts is None:
        return results
    return (*results, torch.zeros_like(x) if found.gradient is None else found.gradient)


def reuses_natural(state: TrainState) -> bool:
    """Whether the natural training forward also gives the natural logits for the attack, one forward less.

    DM_AT attacks with batch statistics, so both are equal. With graphs the attack computes its own: it then is one graph.
    """
    reuse = state.recipe.threat.bn == "batch" and state.objective.inner_needs_natural
    reuse = reuse and not state.draws  # dropout would change the logits
    return reuse and not _starts_precisely(state) and state.graphs is None


def _starts_precisely(state: TrainState) -> bool:
    """Whether natural logits and first attack step are computed in float32 although the rest is in bf16 or fp16.

    The start is almost the natural image, so in low precision the first gradient of a divergence would be rounding noise
    (measured in docs/benchmarks.md).
    """
    return state.objective.inner_needs_natural and state.recipe.precision in ("bf16", "fp16")


def _perturbed_weights(state: TrainState, parts: list[MicroBatch]) -> contextlib.AbstractContextManager[None]:
    def loss(part: MicroBatch, model: nn.Module) -> Tensor:
        logits = model(part.x) if state.objective.family != "at" else None
        logits_adv = model(part.x_adv) if part.x_adv is not None else None
        return outer_loss(state, logits, logits_adv, part.trained, part.history, part.weights)

    mean = partial(state.accelerator.reduce, reduction="mean")
    return awp(state.base, [partial(loss, part) for part in parts], state.recipe.awp.gamma, reduce=mean)


def update(state: TrainState, num_parts: int) -> Tensor:
    """The end of a step after its gradients; whether the step is good (bool scalar)."""
    good = update_weights(state)
    finish_step(state, num_parts, good)
    return good


def update_weights(state: TrainState) -> Tensor:
    """Check and clip the gradient, then the optimizer's step, which a bad step skips; whether it is good (bool scalar)."""
    good = _finish_gradient(state)
    state.optimizer.step()
    return good


@torch.no_grad()
def finish_step(state: TrainState, num_parts: int, good: Tensor) -> None:
    """Gradients, BatchNorm's statistics and the EMA after the optimizer's step."""
    graphed = state.graphs is not None and state.graphs.keeps_gradients
    state.optimizer.zero_grad(set_to_none=not graphed)  # a graph adds to the gradients where they are
    state.statistics.end_step(num_parts)
    for tensor, value in zip(state.restored, state.before, strict=True):
        tensor.copy_(torch.where(good, tensor, value))
    if state.ema is not None:
        state.ema.update(state.base, step=state.step + 1)


@torch.no_grad()
def _finish_gradient(state: TrainState) -> Tensor:
    """Record the gradient's norm, clip it, and make the optimizer skip a bad step; whether this one is good (bool scalar)."""
    good = state.checks.agree()
    align_gradients(state.base.parameters())
    gradients = [p.grad for p in state.base.parameters() if p.grad is not None]
    scaler = state.accelerator.scaler
    if scaler is not None:
        # GradScaler does its own inf check: an fp16 overflow skips the step but is not an error.
        gradients[0].mul_(torch.where(good, 1.0, math.nan))
        state.accelerator.unscale_gradients()
    norm = torch.nn.utils.get_total_norm(gradients)
    if state.recipe.train.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(state.base.parameters(), state.recipe.train.max_grad_norm, norm)
    if state.accelerator.is_main_process:
        record_step(state, norm)
    if scaler is not None:
        return good & norm.isfinite()
    good = state.checks.note_everywhere("gradient", ~norm.isfinite())
    state.optimizer.optimizer.found_inf = (~good).float()  # torch's fused optimizers skip the update if it is 1
    return good
