"""torch.compile of the attack and of training (`train.compile`).

The attack has a graph of its own, without gradients of weights. Compiled through the graph of training, which computes them,
it was 1.7 times slower than eager on a CPU.

torch keeps compiled code in a temporary folder, which a restart of the machine or the end of a job removes. Here it is kept in
the user's cache, so that a second start of the same run compiles nothing.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from nrat_scale.core.errors import UserError, first_line, warn
from nrat_scale.core.user_cache import user_cache
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import micro_batches

AUTO_DEVICES = ("cuda",)  # on which `train.compile: auto` compiles
_FOLDER_KEY = "TORCHINDUCTOR_CACHE_DIR"  # torch's own setting
_TRITON_KEY = "TRITON_CACHE_DIR"


def compile_models(state: TrainState) -> None:
    """Compile forward and backward pass of the attack model and of the trained model, as `train.compile` says.

    If that fails on any rank, `auto` runs eager with a warning, and `true` raises `UserError`. Compiled arithmetic differs
    from eager by rounding.
    """
    wanted, device = state.recipe.train.compile, state.accelerator.device
    if wanted is False or (wanted == "auto" and device.type not in AUTO_DEVICES):
        return
    torch.compiler.reset()  # graphs of an earlier run in this process count towards the limit of recompilations
    (folder, ours), began, before = _keep_compiled_code(), time.perf_counter(), _cache_counts()
    reason = ""
    try:
        _compile_despite_damage(state, folder if ours else None)
    except Exception as error:  # the compiler may be missing, or fail in arbitrary ways on user models
        reason = first_line(error)
    failed = torch.tensor([float(bool(reason))], device=device)
    if not state.accelerator.reduce(failed, "sum").item():
        compiled, read = (now - then for now, then in zip(_cache_counts(), before, strict=True))
        state.accelerator.print(
            f"torch.compile: {compiled} graphs compiled, {read} read from {folder}, {time.perf_counter() - began:.1f} s"
        )
        return
    state.attack_model.use_eager()
    state.base._compiled_call_impl = None
    problem = f"torch.compile cannot compile the model ({reason or 'it failed on another rank'})"
    if wanted is True:
        raise UserError(f"{problem}. Use train.compile=auto or false.")
    state.accelerator.print(f"warning: {problem}; training runs eager.")


def _keep_compiled_code() -> tuple[Path, bool]:
    """Let torch keep compiled code in the user's cache, unless a folder is set or that cannot be written.

    Returns the folder, and whether it is the one in the user's cache.
    """
    chosen, usual = os.environ.get(_FOLDER_KEY), Path(default_cache_dir())
    if chosen is not None and Path(chosen) != usual:  # importing torch's compiler sets the usual one
        return Path(chosen), False
    try:
        folder = user_cache() / "torchinductor"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # there is no home folder, or it cannot be written
        return usual, False
    if not os.access(folder, os.W_OK | os.X_OK):
        return usual, False
    os.environ[_FOLDER_KEY] = str(folder)
    return folder, True


def _compile_despite_damage(state: TrainState, folder: Path | None) -> None:
    """`_compile`; without the files of `folder` if these are damaged, which torch does not always notice."""
    stored = folder is not None and any(folder.iterdir())
    try:
        _compile(state)
    except Exception as error:
        if folder is None or not stored:
            raise
        os.environ[_FOLDER_KEY] = tempfile.mkdtemp(prefix="torchinductor")
        if Path(os.environ.get(_TRITON_KEY, "")).is_relative_to(folder):  # set by the first attempt
            del os.environ[_TRITON_KEY]
        torch.compiler.reset()
        try:
            _compile(state)
        except Exception:
            os.environ[_FOLDER_KEY] = str(folder)
            raise error from None
        shutil.rmtree(folder, ignore_errors=True)  # another start that is reading it compiles anew, as this one did
        warn(f"{folder} had damaged files ({first_line(error)}); it was removed, and the model compiled anew.")


def _cache_counts() -> tuple[int, int]:
    """Graphs of this process that torch has compiled, and that it has read from its cache."""
    return counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]


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
        if state.objective.inner_needs_natural:  # its natural logits have a graph without a backward pass
            with torch.no_grad(), contextlib.nullcontext() if mixed else state.accelerator.autocast():
                attack.forward(x)
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
