"""The metrics of training: one table, their sums on the device, and the rows of metrics.jsonl."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_atomically
from nrat_scale.presets import FAMILIES
from nrat_scale.train.state import MicroBatch, TrainState

# What a metric is averaged over -> its members in a `MicroBatch`, bool [b]. `clean` and `noisy`: images whose label is known
# to be right or wrong; if noise was injected into labels of unknown quality, unchanged or changed by it. `steps` are
# optimizer steps; their metrics are functions of the norm of the averaged gradient.
POPULATIONS: dict[str, Callable[[Any], Tensor]] = {
    "images": lambda part: torch.ones_like(part.clean, dtype=torch.bool),
    "clean": lambda part: (part.clean >= 0) & part.clean.eq(part.label),
    "noisy": lambda part: (part.clean >= 0) & part.clean.ne(part.label),
    "steps": lambda grad_norm: torch.ones_like(grad_norm, dtype=torch.bool),
}


PARTIAL = "partial"  # the kind of the row of an unfinished epoch


def percent(value: float) -> str:
    """0.125 as `12.5 %`."""
    return f"{100 * value:.1f} %"


@dataclass(frozen=True)
class Metric:
    """A mean over one population."""

    over: str  # key of POPULATIONS
    # Maps a `MicroBatch` after its forwards (for `steps` a gradient norm) to one value per image [b], or to their mean, a scalar.
    value: Callable[[Any], Tensor]
    families: tuple[str, ...] = FAMILIES  # objectives that have it; null in metrics.jsonl for the others
    progress: str = ""  # its name in the progress line; not shown there if empty
    summary: str = ""  # its name in the line that ends an epoch; not shown there if empty
    injected: str = ""  # the same if noise was injected into labels that are not known to be clean
    show: Callable[[float], str] = percent


_NATURAL, _ADVERSARIAL = ("natural", "trades", "mart"), ("at", "trades", "mart")


def _right(logits: str, part: MicroBatch) -> Tensor:
    return getattr(part, logits).argmax(1).eq(part.label)


_FITTED = partial(_right, "reference_logits")
METRICS: dict[str, Metric] = {
    "loss": Metric("images", lambda part: part.loss, progress="loss", show="{:.3f}".format),
    "natural_accuracy": Metric("images", partial(_right, "logits"), _NATURAL, "natural", "natural"),
    "robust_accuracy": Metric("images", partial(_right, "logits_adv"), _ADVERSARIAL, "robust", "robust"),
    "clean_accuracy": Metric(
        "clean", _FITTED, summary="clean labels fitted", injected="labels fitted that noise left unchanged"
    ),
    "noisy_memorised": Metric("noisy", _FITTED, summary="noisy labels memorised", injected="injected labels memorised"),
    "noisy_corrected": Metric("noisy", lambda part: part.reference_logits.argmax(1).eq(part.clean)),
    "grad_norm": Metric("steps", lambda grad_norm: grad_norm, progress="gradient", show="{:.3g}".format),
}


def sum_names() -> tuple[str, ...]:
    """The entries of `TrainState.sums`: the sum of each metric, the size of each population."""
    return (*METRICS, *POPULATIONS)


def record_micro_batch(state: TrainState, part: MicroBatch) -> None:
    """Add a micro-batch, after its forwards, to the checks and sums."""
    assert part.loss is not None
    state.checks.note("loss", ~part.loss.isfinite())
    state.guard.record(part.reference_logits, part.label)
    _add(state, part, [name for name in POPULATIONS if name != "steps"])


def record_step(state: TrainState, grad_norm: Tensor) -> None:
    """Add a step's gradient norm; on the main process only, because the averaged gradient is the same on all ranks."""
    state.guard.record_step(grad_norm)
    _add(state, grad_norm, ["steps"])


@torch.no_grad()
def _add(state: TrainState, seen: Any, populations: list[str]) -> None:
    members = {name: POPULATIONS[name](seen) for name in populations}
    added = {name: mask.sum() for name, mask in members.items()}
    for name, metric in METRICS.items():
        if metric.over in members and state.objective.family in metric.families:
            value = metric.value(seen)
            whole = value.ndim == 0 and members[metric.over].ndim > 0
            added[name] = value.double() * added[metric.over] if whole else (value * members[metric.over]).sum()
    zero = torch.zeros((), dtype=torch.float64, device=state.sums.device)
    state.sums += torch.stack([added.get(name, zero).double() for name in sum_names()])


def total_sums(state: TrainState) -> dict[str, float]:
    """The sums of all ranks."""
    return dict(zip(sum_names(), state.accelerator.reduce(state.sums, "sum").tolist(), strict=True))


def averages(state: TrainState, sums: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics; None for those that the objective does not have, and of an empty population."""
    known = [
        name for name, metric in METRICS.items() if sums[metric.over] and state.objective.family in metric.families
    ]
    return dict.fromkeys(METRICS) | {name: sums[name] / sums[METRICS[name].over] for name in known}


def close_epoch(state: TrainState, epoch: int, lr: float) -> dict[str, Any]:
    """The row of the epoch that ends; clears the sums for the next."""
    row = {"kind": "train", "epoch": epoch, "step": state.step, **averages(state, total_sums(state)), "lr": lr}
    row |= _phase(state)
    state.sums.zero_()
    return row


def partial_row(state: TrainState, lr: float) -> dict[str, Any] | None:
    """The row of an epoch in which training stops, over its steps so far; None between two epochs. On all ranks.

    It ends metrics.jsonl until the run is resumed, which removes it: the epoch's own row then covers all of its steps.
    """
    done = state.step % state.data.steps_per_epoch
    if not done:
        return None
    known = {
        "kind": PARTIAL,
        "epoch": state.step // state.data.steps_per_epoch + 1,
        "step": state.step,
        "steps_of_epoch": done,
    }
    return {**known, **averages(state, total_sums(state)), "lr": lr, **_phase(state)}


def _phase(state: TrainState) -> dict[str, int]:
    """The number of the phase of `threat.schedule`, from 1, of the last step; empty without a schedule."""
    threat = state.recipe.threat
    return {"phase": threat.phase((state.step - 1) / state.total_steps) + 1} if threat.schedule else {}


def is_partial(line: str) -> bool:
    """Whether a line of metrics.jsonl is a `partial_row`."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("kind") == PARTIAL


def log_partial(state: TrainState, row: dict[str, Any] | None) -> None:
    """Write the `partial_row` as the last line of metrics.jsonl, but not into the lines that checkpoints count."""
    if row is None or not state.accelerator.is_main_process:
        return
    if state.owner is not None and state.owner.replaced_by is not None:
        return
    try:
        write_metrics(state, json.dumps(row, allow_nan=False))
    except UserError as error:
        state.accelerator.print(f"warning: {error}")


def log(state: TrainState, row: dict[str, Any]) -> None:
    """Append a row to metrics.jsonl and send its numbers to the trackers; after a full disk the next row writes both."""
    if not state.accelerator.is_main_process or (state.owner is not None and state.owner.replaced_by is not None):
        return  # the process that has taken over the run directory writes it
    state.metrics.append(json.dumps(row, allow_nan=False))
    try:
        write_metrics(state)
    except UserError as error:
        state.accelerator.print(f"warning: {error} Training continues.")
    values = {key: value["accuracy"] if isinstance(value, dict) else value for key, value in row.items()}
    numbers = {f"{row['kind']}/{key}": value for key, value in values.items() if isinstance(value, float)}
    state.trackers.log(numbers, row["step"])


def write_metrics(state: TrainState, *more: str) -> None:
    """Replace metrics.jsonl by the rows of `state`, and then `more` lines."""
    write_atomically(state.run.metrics, "".join(line + "\n" for line in (*state.metrics, *more)))
