"""Calls of functions of tensors as CUDA graphs: captured once, compared with a plain call, replayed.

A graph replays the kernels of one call on fixed addresses, so a call copies its arguments into buffers of the graph, replays, and
copies the results out. What is not a tensor is frozen by the capture: it belongs to the `key` of the call, and a new key captures
again. Parameters, buffers and gradients are used where they are; if one has moved, the call captures again.

The capture is compared with a plain call before it is used. If it fails or differs, the part runs eager and says why.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nrat_scale.core.errors import UserError, first_line

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
Capture = Callable[[Function, Tensors], tuple[Callable[[], None], Tensors]]

_PLAIN_CALLS = 2  # before a capture: lazy state (momentum, gradients, cuDNN's choices) is made in the first ones
_WARMUP_CALLS = 3  # on the stream of the capture, as torch asks for
_MAX_KEPT = 16  # graphs of one part
_MAX_CAPTURES, _LEAST_REPLAYS = (
    64,
    4,
)  # after so many captures of one part, each must have been replayed so often on average


def capture_cuda(function: Function, inputs: Tensors) -> tuple[Callable[[], None], Tensors]:
    """(replay, its results) of `function` on the buffers `inputs`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP_CALLS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return graph.replay, outputs


@dataclass
class _Captured:
    replay: Callable[[], None]
    inputs: Tensors
    outputs: Tensors
    addresses: tuple[int, ...]


class GraphedCall:
    """`function(*inputs)` as a graph; a plain call while `enabled` is false.

    Args:
        name: for messages.
        function: maps tensors to tensors, without a decision of the host that depends on a value. It may change `state`.
        reads: tensors that the function uses besides its inputs, where they are now.
        state: tensors that the function changes, restored after the calls of a capture.
        close: (plain results, results of the graph) -> what differs too much; empty if nothing does.
        required: a failed capture is an error.
        capture: makes a graph; tests on a CPU replace it.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        *,
        reads: Callable[[], Iterable[Tensor]],
        state: Callable[[], Sequence[Tensor]] = lambda: (),
        close: Callable[[Tensors, Tensors], str],
        enabled: bool,
        required: bool = False,
        say: Callable[[str], None] = print,
        capture: Capture = capture_cuda,
    ) -> None:
        self.enabled = enabled
        self.num_captures = self.num_replays = 0
        self._name, self._function, self._capture = name, function, capture
        self._reads, self._state, self._close = reads, state, close
        self._required, self._say = required, say
        self._calls: dict[Hashable, int] = {}
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(self, *inputs: Tensor, key: Hashable = None) -> Tensors:
        """The results, which later calls do not change."""
        if not self.enabled:
            return self._function(*inputs)
        whole = (key, *((tuple(t.shape), t.stride(), t.dtype) for t in inputs))
        _keep_last(self._calls, whole, self._calls.pop(whole, 0) + 1)
        if self._calls[whole] <= _PLAIN_CALLS:
            return self._function(*inputs)
        addresses = tuple(tensor.data_ptr() for tensor in self._reads())
        captured = self._captured.pop(whole, None)
        if captured is None or captured.addresses != addresses:
            captured = self._try_capture(inputs, addresses)
            if captured is None:
                return self._function(*inputs)
        _keep_last(self._captured, whole, captured)
        self.num_replays += 1
        for buffer, given in zip(captured.inputs, inputs, strict=True):
            buffer.copy_(given)
        captured.replay()
        return tuple(tensor.clone() for tensor in captured.outputs)

    def _try_capture(self, inputs: Tensors, addresses: tuple[int, ...]) -> _Captured | None:
        """A graph that agrees with a plain call, or None; `state` is as before."""
        self.num_captures += 1
        before, random = [tensor.detach().clone() for tensor in self._state()], _random_state(inputs)
        problem, captured = "", None
        try:
            buffers = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
            replay, outputs = self._capture(self._function, buffers)
            captured = _Captured(replay, buffers, outputs, addresses)
            self._restore(before, random)
            replay()
            graphed = self._results(outputs)
            self._restore(before, random)
            problem = self._close(self._results(self._function(*inputs)), graphed)
        except UserError:
            raise
        except Exception as error:  # a model may do anything that a capture forbids
            problem = first_line(error)
        self._restore(before, random)
        earlier = self.num_captures - 1
        if not problem and earlier >= _MAX_CAPTURES and self.num_replays < _LEAST_REPLAYS * earlier:
            problem = f"it was captured {earlier} times, because it changes too often"
        if not problem:
            return captured
        self.enabled = False
        self._captured.clear()
        sentence = f"The {self._name} cannot run as a CUDA graph ({problem})"
        if self._required:
            raise UserError(f"{sentence}. Use train.graphs=auto or false.")
        self._say(f"{sentence}; it runs eager.")
        return None

    def _results(self, outputs: Tensors) -> Tensors:
        """Copies of the results and of `state`."""
        return tuple(tensor.detach().clone() for tensor in (*outputs, *self._state()))

    def _restore(self, before: Sequence[Tensor], random: Tensor | None) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._state(), before, strict=True):
                tensor.copy_(value)
        if random is not None:
            torch.cuda.set_rng_state(random)


def _keep_last(held: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Add an entry behind the others, of which the last few stay."""
    held[key] = value
    while len(held) > _MAX_KEPT:
        del held[next(iter(held))]


def _random_state(inputs: Tensors) -> Tensor | None:
    """The state of the device's default generator, which dropout draws from."""
    return torch.cuda.get_rng_state() if any(tensor.is_cuda for tensor in inputs) else None


def relative_difference(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||one||, in float64; 0 if both are 0."""
    size = float(one.double().norm())
    difference = float((one.double() - other.double()).norm())
    return difference / size if size else difference
