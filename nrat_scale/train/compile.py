"""torch.compile where it pays: measured at the start of a run, on its own images, and left out where it does not.

Attack and training are separate graphs: the twin needs no gradient for weights, and a compiler that does not know computes
it (a naive compilation of the attack took 1.7 times as long as none on a CPU).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nrat_scale.train.state import TrainState
from nrat_scale.train.step import micro_batches

_ROUNDS = 5


def compile_where_faster(state: TrainState) -> None:
    """Compile the attack's and the training's forward and backward pass, each only if it is faster here.

    All ranks come here, and decide alike. What was tried and kept is printed. A choice may differ from one start to the
    next, and compiled arithmetic from eager: `train.compile` is outside the promise of bit-equal resumption.
    """
    batches = state.data.batches(
        state.step, state.step + 1, state.accelerator.process_index, state.accelerator.num_processes
    )
    x = next(micro_batches(state, next(batches))).x
    state.twin.refresh()
    eager, compiled = state.twin.forward, torch.compile(state.twin.module, dynamic=False)
    if state.objective.attacks and _pays(
        state, "the attack", lambda: _attack_pass(state, eager, x), lambda: _attack_pass(state, compiled, x)
    ):
        state.twin.forward = compiled
    # What Module.compile sets; the base is called by its wrappers, so that they need not be compiled.
    implementation = torch.compile(state.base._call_impl, dynamic=False)

    def training_pass(call: Any) -> None:
        state.base._compiled_call_impl = call
        state.accelerator.backward(state.model(x).float().square().mean())

    state.running.begin()
    if not _pays(state, "training", lambda: training_pass(None), lambda: training_pass(implementation)):
        state.base._compiled_call_impl = None
    state.optimizer.zero_grad()
    state.running.end(torch.zeros((), dtype=torch.bool, device=x.device), 1)


def _pays(state: TrainState, what: str, eager: Callable[[], None], compiled: Callable[[], None]) -> bool:
    """Time both in turns; what is compiled must win on the slowest rank."""
    ratio = 0.0
    try:
        for _ in range(2):  # compiles, and warms up
            compiled()
        turns = [
            (_seconds(eager, state.accelerator.device), _seconds(compiled, state.accelerator.device))
            for _ in range(_ROUNDS)
        ]
        ratio = statistics.median(one / two for one, two in turns)
    except Exception as error:  # no compiler here, or a model that it cannot take
        state.accelerator.print(f"torch.compile cannot compile {what} ({str(error).strip().splitlines()[0]}).")
    slowest = float(state.accelerator.gather(torch.tensor([ratio], device=state.accelerator.device)).min())
    outcome = "it is used" if slowest > 1 else "eager it stays"
    state.accelerator.print(f"torch.compile: {what} runs {slowest:.2f} times as fast, {outcome}.")
    return slowest > 1


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    begun = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _attack_pass(state: TrainState, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf = x.detach().clone().requires_grad_()
    with state.accelerator.autocast():
        logits = forward(leaf)
    torch.autograd.grad(logits.float().square().sum(), leaf)
