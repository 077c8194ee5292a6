"""CUDA graphs for the three parts of a step: attack; forward, forward, backward, metrics; optimizer and EMA.

What a capture freezes is its key. Learning rate, momentum and decay of the EMA are numbers in the kernels of torch and timm, so
the last part is captured again when they change. A step whose numbers differ from those of the two steps before it, as with
`optim.per: step` or in the warm-up of the EMA, launches that part: the same kernels, and therefore the same bits.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from nrat_scale.core.errors import UserError
from nrat_scale.core.graphs import Capture, GraphedCall, Tensors, capture_cuda, relative_difference
from nrat_scale.core.modes import batchnorms
from nrat_scale.label_refinement import REMEMBERING
from nrat_scale.train.batchnorm import GroupedBatchNorm
from nrat_scale.train.state import RESULTS, MicroBatch, TrainState
from nrat_scale.train.step import attack, forward_backward, update

_INPUTS = ("x", "y", "clean", "noise", "x_adv", "target", "weights")  # fields of a `MicroBatch`; not those of `RESULTS`
_ATTACK_SLACK = 0.25  # of eps: mean difference of two x_adv
_STEP_SLACK = 0.05  # relative difference of a loss, of logits, or of a gradient
_UPDATE_SLACK = 1e-5  # of weights, momentum and averages: both calls have the same gradients


class StepGraphs:
    """The graphs of a run's step: `attack`, `training` (forward, forward, backward, metrics), `update` (optimizer, EMA)."""

    def __init__(self, state: TrainState, *, required: bool = False, capture: Capture = capture_cuda) -> None:
        self._state, self._num_parts, attack_model = state, 1, state.attack_model
        self._inputs: tuple[str, ...] = ()  # the fields of a `MicroBatch` that the training part gets
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
        grouped = any(isinstance(layer, GroupedBatchNorm) for layer in batchnorms(state.base))
        self.training = GraphedCall(
            "training step",
            self._train,
            reads=lambda: [*state.base.parameters(), *self._changed_by_training()],
            state=self._changed_by_training,
            close=partial(_differs, _STEP_SLACK),
            # Both keep tensors of one step on the host.
            enabled=not grouped and not state.recipe.objective.ikl_gamma > 0,
            **options,
        )
        # GradScaler reads on the host whether a step overflowed, and AdamW's kernels need to be told of the capture.
        plain = grouped or state.accelerator.scaler is not None or state.recipe.optim.name != "sgd"
        self.update = GraphedCall(
            "update of the weights",
            lambda: (update(state, self._num_parts),),
            reads=self._changed_by_update,
            state=self._changed_by_update,
            close=partial(_differs, _UPDATE_SLACK),
            enabled=not plain,
            **options,
        )

    @property
    def keeps_gradients(self) -> bool:
        """Whether a graph reads the gradients where they are."""
        return self.training.enabled or self.update.enabled

    def _sums(self) -> list[Tensor]:
        state = self._state
        return [state.sums, state.guard.sums, *state.checks.tensors]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._state.base.parameters() if p.grad is not None]

    def _changed_by_training(self) -> list[Tensor]:
        return [*self._state.base.buffers(), *self._gradients(), *self._sums()]

    def _changed_by_update(self) -> list[Tensor]:
        state = self._state
        kept = [value for held in state.optimizer.state.values() for value in held.values() if value is not None]
        averaged = () if state.ema is None else (*state.ema.module.parameters(), *state.ema.module.buffers())
        return [*state.base.parameters(), *self._changed_by_training(), *kept, *averaged]

    def train(self, part: MicroBatch, num_parts: int) -> MicroBatch:
        """`forward_backward`."""
        state, self._num_parts = self._state, num_parts
        if state.recipe.objective.loss_weight(state.progress) < 1:
            return forward_backward(state, part, num_parts)  # during a warm start the loss is another one in every step
        self._inputs = tuple(name for name in _INPUTS if getattr(part, name) is not None)
        momenta = tuple(layer.momentum for layer in batchnorms(state.base))
        given = [getattr(part, name) for name in self._inputs]
        found = iter(self.training(*given, key=(num_parts, momenta, self._inputs)))
        return replace(part, **{name: next(found) for name in RESULTS if self._has(name, part)})

    def _train(self, *given: Tensor) -> Tensors:
        done = forward_backward(self._state, MicroBatch(**dict(zip(self._inputs, given, strict=True))), self._num_parts)
        return tuple(tensor for tensor in (getattr(done, name) for name in RESULTS) if tensor is not None)

    def _has(self, name: str, part: MicroBatch) -> bool:
        """Whether training adds this field of RESULTS."""
        absent = {"logits": self._state.objective.family == "at", "logits_adv": part.x_adv is None}
        return not absent.get(name, False)

    def end_step(self, num_parts: int) -> None:
        """`update`."""
        state, self._num_parts = self._state, num_parts
        rates = tuple((group["lr"], group.get("momentum")) for group in state.optimizer.param_groups)
        decay = None if state.ema is None else state.ema.get_decay(state.step + 1)
        self.update(key=(num_parts, rates, decay))


def _differs(slack: float, plain: Iterable[Tensor], graphed: Iterable[Tensor]) -> str:
    near = (relative_difference(*pair) <= slack for pair in zip(plain, graphed, strict=True))
    return "" if all(near) else "it differs"


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
