"""The recipe's `model`: which architecture to train, and the arguments that rebuild it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean, first_line
from nrat_scale.models.architectures import default_cfgs

BN_STATISTICS = ("local", "groups", "sync")


@dataclass(frozen=True)
class ModelSpec:
    """Which model to train, and how its BatchNorm layers work.

    Raises:
        UserError: a value is unknown or out of range.
    """

    name: str = "resnet18_cifar"  # a timm name; ours are `wrn28_10_silu`, `wrn28_10`, `resnet18_cifar`, `cnn4`
    mean: list[float] | None = None  # per channel, of [0, 1] pixels; by default that of the data set
    std: list[float] | None = None  # as `mean`
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments, for instance {width: 64} for `cnn4`
    bn_momentum: float | None = None  # weight of the new batch in the running statistics; None keeps the model's own
    bn_first_step: bool = False  # after the first step the running statistics are those of its batch, as in DM_AT
    # Training statistics on several processes. `local`: of the images that each process holds at a time, as in the
    # published code; `groups`: of `bn_group_size` consecutive images of the global batch, the same for any number of
    # processes; `sync`: of the global batch (GPUs only).
    bn: str = "local"
    bn_group_size: int | None = None  # for `groups`; each process must hold whole groups

    def __post_init__(self) -> None:
        check_choice("model.bn", self.bn, BN_STATISTICS)
        if (self.bn == "groups") != (self.bn_group_size is not None):
            raise UserError("model.bn groups and model.bn_group_size go together: set both or neither.")
        size, momentum = self.bn_group_size, self.bn_momentum
        check_value("model.bn_group_size", size, size is None or size >= 2, "at least 2")
        check_value("model.bn_momentum", momentum, momentum is None or 0.0 <= momentum <= 1.0, "in [0, 1]")


def model_arguments(
    spec: ModelSpec, num_classes: int, in_chans: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """The keyword arguments that rebuild this model; a release stores them as timm's `model_args`.

    `mean` and `std` are those of the data set, for a spec without its own.
    """
    constants = {"mean": [*map(float, spec.mean or mean)], "std": [*map(float, spec.std or std)]}
    return {**spec.kwargs, "num_classes": num_classes, "in_chans": in_chans, **constants}


def create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model(name, **arguments)`.

    Raises:
        UserError: timm does not know the name, or the model does not take the arguments.
    """
    if not timm.is_model(name):
        nearest = did_you_mean(name, default_cfgs)
        raise UserError(f"Unknown model '{name}' (model.name). {nearest} Any timm model can be used.")
    try:
        return timm.create_model(name, **arguments)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        # Constructors raise any of these for unexpected arguments.
        reason = first_line(error).rstrip(".")
        raise UserError(f"The model '{name}' does not take these arguments (model.kwargs): {reason}.") from error
