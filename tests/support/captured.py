"""A stand-in for CUDA graphs on a CPU, as strict as they are."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


def capture_fx(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record the operations of one call; a replay repeats them on the same tensors.

    As in a CUDA graph, numbers and decisions of the host are frozen, parameters are read at their addresses, and reading a
    value on the host fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that need gradients
        graph = make_fx(function)(*inputs)
    with torch.no_grad():
        outputs = tuple(tensor.clone() for tensor in graph(*inputs))

    @torch.no_grad()
    def replay() -> None:
        for buffer, value in zip(outputs, graph(*inputs), strict=True):
            buffer.copy_(value)

    return replay, outputs
