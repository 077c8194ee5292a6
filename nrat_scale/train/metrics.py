"""Metrics of a step and an epoch, and the rows of metrics.jsonl."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_atomically
from nrat_scale.train.state import SUMS, MicroBatch, TrainState


@torch.no_grad()
def record_metrics(
    state: TrainState, loss: Tensor, logits: Tensor | None, logits_adv: Tensor | None, part: MicroBatch
) -> None:
    """Add this micro-batch to the epoch's sums, on the device."""
    state.flags.note("loss", ~loss.isfinite())
    label = part.y if part.y.ndim == 1 else part.y.argmax(1)
    right = [torch.zeros_like(label) if z is None else z.argmax(1).eq(label) for z in (logits, logits_adv)]
    seen = logits if logits is not None else logits_adv
    assert seen is not None
    state.guard.record(seen, label)
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
    state.sums += torch.stack([values.get(name, torch.zeros((), device=label.device)).double() for name in SUMS])


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def log(state: TrainState, row: dict[str, Any]) -> None:
    """Append one row to metrics.jsonl and show it to the trackers. Where the disk is full it is written with the next."""
    if not state.accelerator.is_main_process:
        return
    state.metrics.append(json.dumps(row, allow_nan=False))
    try:
        write_atomically(state.run / "metrics.jsonl", "".join(line + "\n" for line in state.metrics))
    except UserError as error:
        state.accelerator.print(f"warning: {error} The run goes on.")
    values = {key: value["accuracy"] if isinstance(value, dict) else value for key, value in row.items()}
    numbers = {f"{row['kind']}/{k}": v for k, v in values.items() if isinstance(v, float)}
    state.accelerator.log(numbers, step=row["step"])


def close_epoch(state: TrainState, epoch: int, lr: float) -> dict[str, Any]:
    """The row of the epoch that ends, and new sums for the next."""
    sums = total_sums(state)
    state.sums.zero_()
    return {"kind": "train", "epoch": epoch, "step": state.step, **averages(state, sums), "lr": lr}


def total_sums(state: TrainState) -> dict[str, float]:
    return dict(zip(SUMS, state.accelerator.reduce(state.sums.clone(), "sum").tolist(), strict=True))


def averages(state: TrainState, sums: Mapping[str, float]) -> dict[str, float | None]:
    """Means over the images (gradient norm: the steps) that `sums` counts; None for what this run has none of."""

    def share(part: str, whole: str) -> float | None:
        return sums[part] / sums[whole] if sums[whole] else None

    family = state.objective.family
    return {
        "loss": share("loss", "images"),
        "natural_accuracy": share("natural", "images") if family != "at" else None,
        "robust_accuracy": share("robust", "images") if family != "natural" else None,
        "clean_accuracy": share("clean_fitted", "clean"),
        "noisy_memorised": share("noisy_fitted", "noisy"),
        "noisy_corrected": share("noisy_corrected", "noisy"),
        "grad_norm": share("grad_norm", "steps"),
    }
