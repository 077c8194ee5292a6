"""The state in a checkpoint: the schema of state.json, and optimizer state as named tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, quoted

Tensors = dict[str, Tensor]

SCHEMA = 1  # Increase it with any change that older versions would misread; a missing key means 1.


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 0, and not a bool."""
    return type(value) is int and value >= 0


def _is_row_per_rank(value: object) -> bool:
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(row, list) and set(map(type, row)) <= {int, float} for row in rows)


def _is_best(value: object) -> bool:
    robust = value.get("robust") if isinstance(value, dict) else None
    return value is None or (isinstance(robust, dict) and is_count(robust.get("correct")))


Required = dict[str, Callable[[object], bool]]  # key of state.json -> whether a value is of the right kind

NAMED: Required = {"step": is_count, "epoch": is_count}  # to evaluate and release a checkpoint
# To resume training from a checkpoint:
RESUMED: Required = NAMED | {
    "best": _is_best,  # row of the best validation so far, None before the first
    "validation_due": lambda value: isinstance(value, bool),  # the run stopped between an epoch and its validation
    "metrics_lines": is_count,  # of metrics.jsonl
    "sums": _is_row_per_rank,  # over the epoch so far
    "guard": lambda value: isinstance(value, dict),
    "guard_sums": _is_row_per_rank,
    "scaler": lambda value: value is None or isinstance(value, dict),  # of fp16
}


def schema_mismatch(state: dict[str, Any], required: Required) -> str | None:
    """How `state` differs from this version's schema, as the end of a sentence; None if it can be used."""
    schema = state.get("schema", 1)
    if not is_count(schema) or schema > SCHEMA:
        return f"its schema is {quoted(schema)}, and this version reads up to {SCHEMA}"
    for key, fits in required.items():
        if key not in state:
            return f"its state has no '{key}'"
        if not fits(state[key]):
            return f"'{key}' in its state is {quoted(state[key])}"
    return None


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
        UserError: a tensor belongs to no parameter of `model`, or has another shape.
    """
    parameters = dict(model.named_parameters())
    restored: list[tuple[nn.Parameter, str, Tensor]] = []
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
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
