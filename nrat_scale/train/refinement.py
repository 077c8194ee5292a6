"""Label refinement in a step (`objective.refine`): the labels of a batch, the losses that use them, what is remembered of it.

Predictions are remembered by image number. Every rank stores the rows of the whole global batch, so that its table is that of
the others whatever their number; a checkpoint holds it once, with the other buffers of the objective.
"""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor

from nrat_scale.core.files import write_atomically
from nrat_scale.core.modes import attack_mode
from nrat_scale.core.seeds import derive, hash64, uniform01
from nrat_scale.data.batches import Batch
from nrat_scale.label_refinement import changed_labels, cosine, ensemble_distance, rectified_labels
from nrat_scale.train.state import MicroBatch, TrainState


@torch.no_grad()
def refined(state: TrainState, batch: Batch, parts: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches `parts` of `batch` with the labels and the history that `objective.refine` gives them."""
    spec, device = state.recipe.objective.refine, state.accelerator.device
    if spec.kind == "adr":
        return [replace(part, target=_rectified(state, part)) for part in parts]
    if spec.kind == "noilin":
        targets = _injected(state, batch, torch.cat([part.y for part in parts]))
        return [replace(part, target=y) for part, y in zip(parts, targets.chunk(len(parts)), strict=True)]
    if not spec.starts_by(state.epoch_end):
        return parts
    pieces = batch.image_numbers.to(device, non_blocking=True).chunk(len(parts))
    rows = [state.objective.refinement.rows(images, part.y) for images, part in zip(pieces, parts, strict=True)]
    if spec.kind in ("sglr", "scores"):
        return [replace(part, history=row) for part, row in zip(parts, rows, strict=True)]
    with attack_mode(state.base, "eval"):
        new = [
            state.objective.refinement.updated(row, state.base(part.x)) for part, row in zip(parts, rows, strict=True)
        ]
    return [
        replace(part, history=row / row.sum(1, keepdim=True), remembered=row)
        for part, row in zip(parts, new, strict=True)
    ]


def _rectified(state: TrainState, part: MicroBatch) -> Tensor:
    """ADR's labels for one micro-batch."""
    spec, progress = state.recipe.objective.refine, state.progress
    assert state.ema is not None, "RecipeSpec has checked it"
    with state.accelerator.autocast():
        teacher = state.ema.module(part.x)
    temperature = cosine(spec.adr_temperature_first, spec.adr_temperature_last, progress)
    return rectified_labels(teacher, part.y, temperature, cosine(spec.adr_share_first, spec.adr_share_last, progress))


def _injected(state: TrainState, batch: Batch, y: Tensor) -> Tensor:
    """NoiLIn's labels for this rank's batch; the draws are a function of (seed, step, place in the global batch)."""
    places, num_classes = batch.places.numpy(), state.data.shards.num_classes
    draw, shift = (derive(state.recipe.seed, "noilin", name, batch.step) for name in ("draw", "shift"))
    below = torch.from_numpy(uniform01(draw, places))
    shifts = torch.from_numpy(1 + (hash64(shift, places) % np.uint64(num_classes - 1)).astype(np.int64))
    rate = state.objective.refinement.rate
    assert rate is not None
    return changed_labels(y, below.to(y.device), shifts.to(y.device), rate, num_classes)


def inner_loss(
    state: TrainState, logits: Tensor | None, y: Tensor, history: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What the attack maximises; TE adds its term to the whole outer loss's adversarial part, lam included."""
    inner, spec = state.objective.inner(logits, y), state.objective.spec
    if history is None or spec.refine.kind != "te":
        return inner
    scale, weight = spec.lam if spec.family == "trades" else 1.0, spec.refine.te_weight_at(state.epoch_end)
    return lambda logits_adv: scale * inner(logits_adv) + weight * ensemble_distance(logits_adv, history)


def outer_loss(
    state: TrainState,
    logits: Tensor | None,
    logits_adv: Tensor | None,
    y: Tensor,
    history: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """What training minimises, a scalar; TE adds its term at the logits of the classification loss.

    `weights` [b] multiply the whole loss of an image, TE's term included.
    """
    loss, spec = state.objective.loss(logits, logits_adv, y, state.progress, weights), state.objective.spec
    if history is None or spec.refine.kind != "te":
        return loss
    classified = logits if spec.family == "trades" else logits_adv
    assert classified is not None
    distances = ensemble_distance(classified, history)
    distances = distances if weights is None else distances * weights.to(distances.dtype)
    return loss + spec.refine.te_weight_at(state.epoch_end) * distances.mean()


@torch.no_grad()
def new_rows(
    state: TrainState, x: Tensor, logits: Tensor | None, logits_adv: Tensor | None, history: Tensor | None
) -> Tensor | None:
    """The rows [b, K] that the training forwards give: SGLR's, which are also its labels, or scores; None without them.

    SGLR's natural forward comes after the adversarial one, in training mode and without a gradient, as in the authors' code.
    """
    kind = state.objective.spec.refine.kind
    if history is None or kind not in ("sglr", "scores"):
        return None
    natural = state.model(x) if logits is None else logits
    return state.objective.refinement.updated(history, natural, logits_adv if kind == "sglr" else None)


def remember(state: TrainState, batch: Batch, done: list[MicroBatch]) -> None:
    """Store what the micro-batches `done` of `batch` have to remember, on all ranks."""
    rows = [part.remembered for part in done if part.remembered is not None]
    if rows:
        images = batch.image_numbers.to(rows[0].device, non_blocking=True)
        state.objective.refinement.remember(images, torch.cat(rows), gather)


def memory_note(state: TrainState) -> str:
    """What `LabelRefinement.history` takes, and how often an image is seen once it is used; empty without one."""
    history, spec = state.objective.refinement.history, state.recipe.objective.refine
    if history is None:
        return ""
    start = {"te": spec.te_start, "sglr": spec.sglr_start}.get(spec.kind, 0.0)
    steps = math.ceil(state.total_steps * (1 - start))
    sources = zip(state.data.plan.counts, state.data.sources, strict=True)
    passes = ", ".join(f"{source.kind} images {steps * count / len(source):.3g} times" for count, source in sources)
    return (
        f"objective.refine.kind={spec.kind} remembers predictions of {len(history):,} images, "
        f"{history.nbytes / 1e6:.3g} MB in every checkpoint. From {100 * start:.3g} % of training on it sees {passes}."
    )


def after_validation(state: TrainState, row: dict[str, Any]) -> None:
    """Let NoiLIn's rate follow the validation whose row of metrics.jsonl is `row`, which gets the rate of the next epoch."""
    refinement = state.objective.refinement
    if refinement.rate is not None:
        refinement.validated(row["robust"]["accuracy"], row["epoch"] / state.recipe.train.epochs)
        row["noilin_rate"] = float(refinement.rate)


def write_scores(state: TrainState) -> None:
    """Write RUN/label_scores.npy of a finished run with `objective.refine.kind: scores`: float32 [n, K] of the real images.

    Rows are in source order. Images that were not trained on keep their label's row, so that `badlabel` changes them last.
    """
    history, real = state.objective.refinement.history, state.data.real
    if state.recipe.objective.refine.kind != "scores" or history is None or real is None:
        return
    if state.step < state.total_steps or not state.accelerator.is_main_process:
        return
    order = real.shards.in_source_order()
    rows = torch.from_numpy(order).to(history.device)
    labels = torch.from_numpy(real.given_labels(order)).to(history.device)
    content = io.BytesIO()
    np.save(content, state.objective.refinement.rows(rows, labels).float().cpu().numpy())
    write_atomically(state.run.label_scores, content.getvalue())
    state.accelerator.print(
        f"scores of {len(order):,} labels: {state.run.label_scores}, for data.real.noise.scores with kind badlabel"
    )
