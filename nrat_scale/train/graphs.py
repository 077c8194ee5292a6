"""CUDA graphs for the two parts of a step that are mostly launches: the attack, and forward, forward, backward."""

from functools import partial
from typing import Any

from torch import Tensor

from nrat_scale.core.errors import UserError
from nrat_scale.core.graphs import Capture, GraphedCall, Tensors, capture_cuda, relative_difference
from nrat_scale.core.modes import batchnorms
from nrat_scale.label_refinement import REMEMBERING
from nrat_scale.train.batchnorm import GroupedBatchNorm
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import attack, forward_backward

_ATTACK_SLACK = 0.25  # of eps: mean difference of two x_adv
_STEP_SLACK = 0.05  # relative difference of a loss, of logits, or of a gradient


class StepGraphs:
    """The graphs of a run's step: `attack`, and `train` for forward, forward, backward."""

    def __init__(self, state: TrainState, *, required: bool = False, capture: Capture = capture_cuda) -> None:
        self._state, attack_model = state, state.attack_model
        options: dict[str, Any] = {"required": required, "capture": capture, "say": state.accelerator.print}
        modules = (attack_model.module, attack_model.low)
        self.attack = GraphedCall(
            "attack",
            partial(attack, state),
            reads=lambda: [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())],
            # Kernels that are not deterministic change the sign of tiny gradients; stale inputs change most pixels.
            close=lambda plain, graphed: (
                ""
                if float((plain[0] - graphed[0]).abs().mean()) <= _ATTACK_SLACK * state.threat.farthest
                else "its images differ"
            ),
            enabled=True,
            **options,
        )
        plain = any(isinstance(layer, GroupedBatchNorm) for layer in batchnorms(state.base))
        plain = plain or state.recipe.objective.ikl_gamma > 0  # both keep tensors of one step on the host
        self.training = GraphedCall(
            "training step",
            self._forward_backward,
            reads=lambda: [*state.base.parameters(), *state.base.buffers(), *self._gradients()],
            state=lambda: [*state.base.buffers(), *self._gradients()],
            close=lambda *results: (
                ""
                if all(relative_difference(*pair) <= _STEP_SLACK for pair in zip(*results, strict=True))
                else "it differs"
            ),
            enabled=not plain,
            **options,
        )
        self._num_parts = 1

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._state.base.parameters() if p.grad is not None]

    def _forward_backward(self, *given: Tensor) -> Tensors:
        return forward_backward(self._state, self._num_parts, *given)

    def train(self, num_parts: int, *given: Tensor) -> Tensors:
        """`forward_backward`; numbers that the capture freezes are its key."""
        state, self._num_parts = self._state, num_parts
        weight = state.recipe.objective.loss_weight(state.progress)
        if weight < 1:  # during a warm start the loss is another one in every step
            return self._forward_backward(*given)
        momenta = tuple(layer.momentum for layer in batchnorms(state.base))
        return self.training(*given, key=(num_parts, momenta))


def use_graphs(state: TrainState) -> None:
    """Let the step run as graphs, as `train.graphs` says: `auto` does on CUDA, with one process.

    Raises `UserError` if `train.graphs` is true and they are not available.
    """
    wanted, device = state.recipe.train.graphs, state.accelerator.device
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return
    problem = ""
    if device.type != "cuda":
        problem = f"they need a GPU, and this run is on {device.type}"
    elif state.accelerator.num_processes > 1:
        problem = (
            f"they have not been tested with several processes, and this run has {state.accelerator.num_processes}"
        )
    elif (kind := state.recipe.objective.refine.kind) in REMEMBERING:
        problem = f"they do not remember predictions, as objective.refine.kind={kind} does"
    if not problem:
        state.graphs = StepGraphs(state, required=wanted is True)
    elif wanted is True:
        raise UserError(f"train.graphs is true, but {problem}. Use train.graphs=auto or false.")
    else:
        state.accelerator.print(f"CUDA graphs are off: {problem}.")
