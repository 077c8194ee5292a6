"""Context managers that change a module and undo it on exit: frozen parameters, BatchNorm during an attack."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BN_MODES = ("eval", "batch")


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """All BatchNorm layers of `model`."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters: an attack needs only the gradient of the image."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def set_attack_mode(model: nn.Module, bn: str) -> None:
    """Put `model` into the mode in which it is attacked: evaluation mode, without dropout and stochastic depth.

    `bn="eval"`: BatchNorm too (TRADES, MART, NRAT). `bn="batch"`: BatchNorm with batch statistics, running statistics
    unchanged (DM_AT, and the weight perturbation of AWP).
    """
    assert bn in BN_MODES, bn
    model.eval()
    if bn == "batch":
        for layer in batchnorms(model):
            # In training mode, a layer that does not track uses batch statistics and does not update its buffers.
            layer.training, layer.track_running_stats = True, False


@contextmanager
def attack_mode(model: nn.Module, bn: str) -> Iterator[None]:
    """`set_attack_mode` inside the block; then every module is as before."""
    modes = {module: module.training for module in model.modules()}
    tracking = {layer: layer.track_running_stats for layer in batchnorms(model)}
    set_attack_mode(model, bn)
    try:
        yield
    finally:
        for layer, track in tracking.items():
            layer.track_running_stats = track
        for module, training in modes.items():
            module.training = training
