"""torch.compile of the attack and of training (`train.compile`).

The attack has a graph of its own, without gradients of weights. Compiled through the graph of training, which computes them,
it was 1.7 times slower than eager on a CPU.
"""

import torch

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import micro_batches

AUTO_DEVICES = ("cuda",)  # on which `train.compile: auto` compiles


def compile_models(state: TrainState) -> None:
    """Compile forward and backward pass of the attack model and of the trained model, as `train.compile` says.

    If that fails on any rank, `auto` runs eager with a warning, and `true` raises `UserError`. Compiled arithmetic differs
    from eager by rounding.
    """
    wanted, device = state.recipe.train.compile, state.accelerator.device
    if wanted is False or (wanted == "auto" and device.type not in AUTO_DEVICES):
        return
    torch.compiler.reset()  # graphs of an earlier run in this process count towards the limit of recompilations
    reason = ""
    try:
        _compile(state)
    except Exception as error:  # the compiler may be missing, or fail in arbitrary ways on user models
        reason = first_line(error)
    failed = torch.tensor([float(bool(reason))], device=device)
    if not state.accelerator.reduce(failed, "sum").item():
        return
    state.attack_model.use_eager()
    state.base._compiled_call_impl = None
    problem = f"torch.compile cannot compile the model ({reason or 'it failed on another rank'})"
    if wanted is True:
        raise UserError(f"{problem}. Use train.compile=auto or false.")
    state.accelerator.print(f"warning: {problem}; training runs eager.")


def _compile(state: TrainState) -> None:
    """Compile, and run each graph once on images of the run: compilation happens in the first call."""
    ranks = state.accelerator.process_index, state.accelerator.num_processes
    x = next(micro_batches(state, next(state.data.batches(state.step, state.step + 1, *ranks)))).x
    state.attack_model.refresh()
    if state.objective.attacks:
        attack, mixed = state.attack_model, state.attack_model.low is not state.attack_model.module
        attack.forward = attack.low_forward = torch.compile(attack.module, dynamic=False)
        if mixed:
            attack.low_forward = torch.compile(attack.low, dynamic=False)
        leaf = x.detach().clone().requires_grad_()
        with state.accelerator.autocast():
            logits = attack.low_forward(leaf)
        torch.autograd.grad(logits.float().square().sum(), leaf)
        if mixed and state.objective.inner_needs_natural:  # the first step of such an attack is in float32
            torch.autograd.grad(attack.forward(leaf).square().sum(), leaf)
    # What Module.compile sets. The wrappers (DDP, autocast) call `base` and need not be compiled.
    state.base._compiled_call_impl = torch.compile(state.base._call_impl, dynamic=False)
    before = [(buffer, buffer.clone()) for buffer in state.base.buffers()]
    try:
        # no_sync: a rank that cannot compile would leave the others waiting in the exchange of gradients.
        with state.accelerator.no_sync(state.model):
            loss = state.model(x).float().square().mean()
            torch.autograd.grad(loss, list(state.base.parameters()), allow_unused=True)
    finally:
        state.statistics.end_step(1, reduce=False)
        for buffer, value in before:
            buffer.copy_(value)
