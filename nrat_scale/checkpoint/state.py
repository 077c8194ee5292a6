"""The state in a checkpoint: the schema of state.json, and optimizer state as named tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, quoted

Tensors = dict[str, Tensor]

OPTIMIZER_STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")  # of torch's SGD and AdamW

SCHEMA = 1  # Increase it with any change that older versions would misread; a missing key means 1.


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 0, and not a bool."""
    return type(value) is int and value >= 0


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_row_per_rank(value: object) -> bool:
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(row, list) and all(map(_is_number, row)) for row in rows)


def _is_accuracy(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return is_count(value.get("correct")) and is_count(value.get("n")) and _is_number(value.get("accuracy"))


def _is_best(value: object) -> bool:
    if not isinstance(value, dict):
        return value is None
    counts = is_count(value.get("step")) and is_count(value.get("epoch"))
    return (
        counts
        and isinstance(value.get("attack"), str)
        and all(_is_accuracy(value.get(k)) for k in ("natural", "robust"))
    )


def _is_scaler(value: object) -> bool:
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of torch's GradScaler
    return value is None or (isinstance(value, dict) and value.keys() == names and all(map(_is_number, value.values())))


Required = dict[str, Callable[[object], bool]]  # key of state.json -> whether a value is of the right kind

NAMED: Required = {"step": is_count, "epoch": is_count}  # to evaluate and release a checkpoint
# To resume training from a checkpoint:
RESUMED: Required = NAMED | {
    "whole_epoch": _is_flag,  # no epoch is in progress
    "identity": lambda value: isinstance(
        value, str
    ),  # of the recipe, for people: versions with other keys have another
    "seed": lambda value: type(value) is int,
    "best": _is_best,  # row of the best validation so far, None before the first
    "validation_due": _is_flag,  # the run stopped between an epoch and its validation
    "metrics_lines": is_count,  # of metrics.jsonl
    "sums": _is_row_per_rank,  # over the epoch so far; training checks `sum_names`
    "guard": lambda value: isinstance(value, dict),  # `Guard.load` checks its entries
    "guard_sums": _is_row_per_rank,
    "scaler": _is_scaler,  # of fp16
    "pointer": lambda value: isinstance(value, dict) and all(map(_is_flag, value.values())),  # for `recover`
}
# Keys that a checkpoint may lack: nothing is restored from them, or an older version did not write them.
OPTIONAL = ("whole_epoch", "identity", "seed", "pointer")


def schema_mismatch(state: dict[str, Any], required: Required) -> str | None:
    """How `state` differs from this version's schema, as the end of a sentence; None if it can be used."""
    schema = state.get("schema", 1)
    if not is_count(schema) or schema > SCHEMA:
        return f"its schema is {quoted(schema)}, and this version reads up to {SCHEMA}"
    for key, fits in required.items():
        if key not in state and key in OPTIONAL:
            continue
        if key not in state:
            return f"its state has no '{key}'"
        if not fits(state[key]):
            return f"'{key}' in its state is {quoted(state[key])}"
    return None


def tensor_mismatch(found: Tensors, expected: Tensors) -> str | None:
    """How the tensors of a checkpoint differ from a model's in name, shape or kind, as the end of a sentence; None if not."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        return f"it has no {quoted(missing[0])}" + _and_more(missing)
    if unknown:
        return f"it has {quoted(unknown[0])}{_and_more(unknown)}, which the model does not have"
    for name, value in found.items():
        ours = expected[name]
        if value.shape != ours.shape:
            return f"{quoted(name)} has the shape {list(value.shape)}, expected {list(ours.shape)}"
        if value.is_floating_point() != ours.is_floating_point():
            return f"{quoted(name)} is {value.dtype}, expected {ours.dtype}"
    return None


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """The optimizer's state tensors, named `parameter name/state key` (for SGD: `.../momentum_buffer`)."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Restore what `optimizer_tensors` returned; nothing changes if a tensor does not fit.

    Raises:
        UserError: a tensor belongs to no parameter of `model`, has another shape, or is not of `OPTIMIZER_STATE`.
    """
    parameters = dict(model.named_parameters())
    restored: list[tuple[nn.Parameter, str, Tensor]] = []
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        known = key in OPTIMIZER_STATE and value.is_floating_point()
        if parameter is None or not known or value.shape not in (parameter.shape, torch.Size([])):
            why = f"The checkpoint's optimizer state {quoted(name)} does not fit the model."
            raise UserError(f"{why} Resume with the recipe that the run began with.")
        # Adam's step counter is a scalar of its own type. Every other tensor takes dtype, device and memory format of its
        # parameter, because fused optimizers read both with the same strides.
        scalar = value.ndim == 0 and parameter.ndim > 0
        like = torch.empty_like(parameter.detach())
        restored.append((parameter, key, value.to(parameter.device) if scalar else like.copy_(value)))
    optimizer.state.clear()  # a checkpoint from before the first step has no state
    for parameter, key, value in restored:
        optimizer.state[parameter][key] = value
