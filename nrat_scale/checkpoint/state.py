"""What a checkpoint's state.json must hold, and optimizer state as named tensors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError

# ---- what a state.json must hold ------------------------------------------------------------------------------------


Tensors = dict[str, Tensor]


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_rows(value: object) -> bool:
    """Numbers of each process."""

    def numbers(row: object) -> bool:
        return isinstance(row, list) and all(type(number) in (int, float) for number in row)

    return isinstance(value, list) and len(value) > 0 and all(numbers(row) for row in value)


def _is_selection(value: object) -> bool:
    """None before the first validation, else its row."""
    if value is None:
        return True
    robust = value.get("robust") if isinstance(value, dict) else None
    return isinstance(robust, dict) and is_count(robust.get("correct"))


Required = dict[str, Callable[[object], bool]]
NAMED: Required = {"step": is_count, "epoch": is_count}  # for evaluation and release
RESUMED: Required = NAMED | {  # what training goes on from
    "best": _is_selection,
    "validation_due": lambda value: isinstance(value, bool),
    "metrics_lines": is_count,
    "sums": _are_rows,
    "guard": lambda value: isinstance(value, dict),
    "guard_sums": _are_rows,
    "scaler": lambda value: value is None or isinstance(value, dict),
}


# ---- optimizer state as named tensors -------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """The optimizer's state tensors, called `parameter name/state key` (for SGD: `.../momentum_buffer`)."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Undo `optimizer_tensors`.

    Raises:
        UserError: a tensor belongs to no parameter of `model`, or has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():  # all of them before the first is used
        parameter = parameters.get(name.rpartition("/")[0])
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise UserError(f"The checkpoint's optimizer state '{name}' does not fit the model.")
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # Adam counts its steps in a scalar of its own type; everything else is like its parameter, in its memory format
        # too: fused optimizers go through both side by side.
        scalar = value.ndim == 0 and parameter.ndim > 0
        like = torch.empty_like(parameter.detach())
        optimizer.state[parameter][key] = value.to(parameter.device) if scalar else like.copy_(value)
