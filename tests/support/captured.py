"""A stand-in for CUDA graphs on a CPU, as strict as they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)


class _Recorder(TorchDispatchMode):
    """Records every operation with its tensors, which keep their addresses as long as the recorder lives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket in _READING:
            raise RuntimeError(f"{function} makes the host wait for a value, which a capture forbids")
        given = kwargs or {}
        result = function(*args, **given)
        self.calls.append((function, args, given, _new_tensors(result, args, given)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the operations; each writes its result where it was."""
        for function, args, given, places in self.calls:
            values = _new_tensors(function(*args, **given), args, given)
            for place, value in zip(places, values, strict=True):
                place.copy_(value)


def _new_tensors(result: Any, *given: Any) -> list[Tensor]:
    """The tensors of a result with memory of their own: not views of arguments, nor arguments changed in place."""
    places = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(given) if isinstance(tensor, Tensor)}
    tensors = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
    return [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in places]


def capture_operations(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record the operations of one call; a replay repeats them on the same tensors.

    As in a CUDA graph, numbers and decisions of the host are frozen, every tensor is read and written at its address, and
    reading a value on the host fails.
    """
    recorder = _Recorder()
    with recorder:
        outputs = function(*inputs)
    return recorder.replay, outputs
