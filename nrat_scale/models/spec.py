"""The recipe's `model`: which architecture to train, and the arguments that rebuild it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean, first_line, quoted, warn
from nrat_scale.core.imports import location
from nrat_scale.models import architectures, published
from nrat_scale.models.own import REGISTERED, as_import, build_own, find_factory, is_own
from nrat_scale.models.wrapped import around_timm

default_cfgs = {**architectures.default_cfgs, **published.default_cfgs}  # name -> timm's configurations
BN_STATISTICS = ("local", "groups", "sync")


@dataclass(frozen=True)
class ModelSpec:
    """Which model to train, and how its BatchNorm layers work.

    Raises:
        UserError: a value is unknown or out of range.
    """

    # A name of timm; ours are `resnet18_cifar`, `preact_resnet18`, `wrn28_10`, `wrn28_10_silu`, `wrn34_10` (TRADES' and AWP's),
    # `wrn34_10_silu`, `wrn70_16_silu`, `wrn82_8_silu`, `wrn94_16_silu`, `cnn4`. Or `package.module:factory`, your own code.
    name: str = "resnet18_cifar"
    mean: list[float] | None = None  # per channel, of [0, 1] pixels; by default that of the data set
    std: list[float] | None = None  # as `mean`
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments, for instance {width: 64} for `cnn4`
    # Weights to start from: a release (folder or `user/repo`), a weight file, `timm` (the model's own pretrained weights) or
    # `timm:resnet18.a1_in1k`. Tensors are taken by name and shape; a resumed run does not read them again.
    init: str | None = None
    init_key: str | None = None  # of a weight file with several sets of weights: which, such as `ema`
    bn_momentum: float | None = None  # weight of the new batch in the running statistics; None keeps the model's own
    bn_first_step: bool = False  # after the first step the running statistics are those of its batch, as in DM_AT
    # Training statistics on several processes. `local`: of the images that each process holds at a time, as in the
    # published code; `groups`: of `bn_group_size` consecutive images of the global batch, the same for any number of
    # processes; `sync`: of the global batch (GPUs only).
    bn: str = "local"
    bn_group_size: int | None = None  # for `groups`; each process must hold whole groups

    def __post_init__(self) -> None:
        check_choice("model.bn", self.bn, BN_STATISTICS)
        for key in self.kwargs:
            if not key.isidentifier():
                name, _, value = key.partition(":")
                way_out = f" Write a space after each colon, or model.kwargs.{name}={value}." if value else ""
                raise UserError(
                    f"model.kwargs has the key {quoted(key)}, which is not the name of an argument.{way_out}"
                )
        if self.init_key is not None and self.init is None:
            raise UserError("model.init_key needs model.init, the file whose set of weights it chooses.")
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


def create(name: str, arguments: Mapping[str, Any], *, trust_code: bool = False) -> nn.Module:
    """The model `name` for [0, 1] images; one that does not normalise by itself gets a wrapper that does.

    Args:
        name: a name of timm, one of `register`, or `package.module:factory`.
        arguments: of the architecture; `mean` and `std`, if the model does not take them, are the wrapper's.
        trust_code: import the module of `package.module:factory`.

    Raises:
        UserError: there is no such model, it does not take the arguments, or its code may not be imported.
    """
    if is_own(name):
        return build_own(name, find_factory(name, trust_code=trust_code), arguments)
    if not timm.is_model(name):
        if meant := as_import(name):
            raise UserError(f"Unknown model '{name}' (model.name). A class of your own is written {meant}.")
        nearest = near_model(name)
        own = "module:class, such as my_model:MyNet, names one of your own"
        raise UserError(f"Unknown model '{name}' (model.name). {nearest} Any timm model can be used; {own}.")
    given = dict(arguments)
    ours = is_ours(name)
    constants = {} if ours else {key: given.pop(key, None) for key in ("mean", "std")}
    try:
        model = timm.create_model(name, **given)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        # Constructors raise any of these for unexpected arguments.
        reason = first_line(error).rstrip(".")
        raise UserError(f"The model '{name}' does not take these arguments (model.kwargs): {reason}.") from error
    return model if ours else around_timm(model, name, given, **constants)


def near_model(name: str) -> str:
    """A sentence for a mistyped name: the closest of ours, of `register` and of timm, or all but timm's if none is close."""
    ours = [*default_cfgs, *REGISTERED]
    near = get_close_matches(name, [*ours, *timm.list_models()], n=1, cutoff=0.8)
    return f"Did you mean '{near[0]}'?" if near else did_you_mean(name, ours)


def is_ours(name: str) -> bool:
    """Whether `name` is an architecture of this package, which normalises its input itself."""
    return name.split(".")[0] in default_cfgs


def try_out(model: nn.Module, name: str, image_shape: Sequence[int], num_classes: int) -> bool:
    """Run `model` on two images [H, W, C] in both modes; whether it draws random numbers in training mode (dropout, ...).

    Buffers, modes and the state of torch's generator are as before. Our own architectures are not run: they take all images.

    Raises:
        UserError: it does not take such images, or does not give logits [2, num_classes].
    """
    if is_ours(name):
        return bool(getattr(model, "drop_rate", 0.0))
    height, width, channels = image_shape
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UserError(f"The model '{name}' has no parameters to train.")
    x = torch.full((2, channels, height, width), 0.5, device=parameter.device, dtype=parameter.dtype)
    x[1] = 0.25
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for training in (False, True):
            before = torch.get_rng_state()
            try:
                logits = model.train(training)(x)
            except Exception as error:  # models raise anything on images of another size
                hint = (
                    "" if is_own(name) else f" Some models need model.kwargs.img_size={height}, others larger images."
                )
                reason = f"{first_line(error).rstrip('.')}{location(error) if is_own(name) else ''}"
                raise UserError(
                    f"The model '{name}' cannot take images of {channels} x {height} x {width}: {reason}.{hint}"
                ) from error
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if shape != [2, num_classes]:
                mode = "training" if training else "evaluation"
                raise UserError(f"The model '{name}' gives {shape} in {mode} mode; expected logits [2, {num_classes}].")
            random = training and not torch.equal(before, torch.get_rng_state())
        if _are_probabilities(logits):
            warn(
                f"The model '{name}' seems to end in a softmax: its outputs are probabilities. Every loss and attack here takes "
                "logits, and is weak on probabilities. Remove the softmax."
            )
        for buffer, value in buffers:
            buffer.copy_(value)
    for module, was in modes:
        module.training = was
    return random


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether all of [B, K] are in [0, 1] and each row sums to 1."""
    sums = outputs.sum(1)
    return bool(((outputs >= 0) & (outputs <= 1)).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4))
