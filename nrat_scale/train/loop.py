"""Training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`.

A run from its recipe to its last checkpoint: check everything that a user can get wrong, build, resume, loop over
epochs, validate, select, save. What happens within a step stands in `step`.
"""

import contextlib
import math
from pathlib import Path

import torch
from accelerate.utils import gather

from nrat_scale.collapse import ADVICE
from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.seeds import derive
from nrat_scale.optim import learning_rates, set_rates
from nrat_scale.recipe import RecipeSpec
from nrat_scale.train.bad_step import report_bad_step
from nrat_scale.train.compile import compile_where_faster
from nrat_scale.train.display import Progress
from nrat_scale.train.liveness import heartbeat
from nrat_scale.train.metrics import close_epoch, log
from nrat_scale.train.recovery import rewind, save
from nrat_scale.train.setup import start
from nrat_scale.train.signals import Stopped
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import train_step
from nrat_scale.train.trace import Profile
from nrat_scale.train.validate import validate


def fit(state: TrainState, profile: int = 0) -> None:
    """Train from `state.step` to `state.last_step`.

    Args:
        profile: steps to look at with torch's profiler.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        FloatingPointError: a step was not finite; it changed nothing, and no checkpoint is from after it.
    """
    progress, profiling = Progress(state), Profile(state, profile)
    table = learning_rates(state.recipe.optim, state.recipe.train.epochs, state.data.steps_per_epoch)
    while not _train_until(state, state.last_step, table, progress, profiling):
        pass  # training was rewound
    progress.close()
    if state.step % state.data.steps_per_epoch:  # stopped by max_steps within an epoch
        # Before the first validation nothing is selected: best.json then names the only checkpoint there is, and says so.
        save(state, is_best=state.best is None, final=True)


def _train_until(
    state: TrainState, stop: int, table: list[tuple[float, float]], progress: Progress, profiling: Profile
) -> bool:
    """The loop over steps; False where the collapse guard has rewound training and it is to be entered again."""
    per_epoch = state.data.steps_per_epoch
    momenta = {layer: layer.momentum for layer in batchnorms(state.base)}
    if state.validation_due:
        _validate_and_save(state, progress)
    batches = state.data.batches(state.step, stop, state.accelerator.process_index, state.accelerator.num_processes)
    while state.step < stop:
        profiling.update(state)
        with state.clock.section("data"):
            batch = next(batches)
        epoch = state.step // per_epoch
        lr, momentum = table[state.step]
        set_rates(state.optimizer, lr * state.guard.lr_scale, momentum)
        for layer, usual in momenta.items():
            layer.momentum = 1.0 if state.recipe.model.bn_first_step and state.step == 0 else usual
        torch.manual_seed(derive(state.recipe.seed, "step", state.step, state.accelerator.process_index) % 2**32)
        train_step(state, batch)
        state.step += 1
        boundary = state.step % per_epoch == 0 or state.step == stop or state.step % state.recipe.guard.window == 0
        signum = _heed(state, everything=boundary)
        progress.update(state, lr * state.guard.lr_scale)
        if watch_for_collapse(state):
            return False
        if state.step % per_epoch == 0:
            row = close_epoch(state, epoch + 1, lr * state.guard.lr_scale)
            log(state, row)
            progress.epoch(row)
            _validate_and_save(state, progress)
        if signum or (state.accelerator.num_processes == 1 and state.signals):
            _stop(state, signum or state.signals.received)
    profiling.update(state)
    return True


def watch_for_collapse(state: TrainState) -> bool:
    """At the end of a window of steps, act on a collapse as the recipe says; True where training was rewound.

    Raises:
        UserError: the recipe says stop, or there is nothing (more) to rewind to.
    """
    spec = state.recipe.guard
    if spec.action == "none" or state.step % spec.window:
        return False
    window = state.guard.close(state.accelerator.reduce(state.guard.sums.clone(), "sum"), state.step)
    if not state.guard.collapsed or (spec.action == "warn" and state.guard.warned):
        return False
    state.guard.warned = True
    what = (
        f"Training has collapsed by step {state.step}: in the last {spec.window} steps {100 * window.top_share:.0f} % of the "
        f"predictions name one class, accuracy is {100 * window.accuracy:.1f} %, the mean gradient norm {window.grad_norm:.2g}, "
        f"the mean spread of the logits {window.logit_scale:.2g}."
    )
    row = {"kind": "guard", "step": state.step, "action": spec.action, "top_share": window.top_share,
           "accuracy": window.accuracy, "grad_norm": window.grad_norm, "logit_scale": window.logit_scale,
           "lr_scale": state.guard.lr_scale}  # fmt: skip
    if spec.action == "warn":
        log(state, row)
        state.accelerator.print(f"warning: {what} {ADVICE}.")
        return False
    if spec.action == "stop" or state.guard.rewinds >= spec.max_rewinds:
        raise UserError(f"{what} {ADVICE}, or let guard.action rewind.")
    rewind(state, what, row)
    return True


def _heed(state: TrainState, *, everything: bool) -> int:
    """Look at what the device has told of the last steps; `everything`: wait for what it has still to tell.

    Returns:
        The signal that all ranks are to stop by, 0 for none.
    """
    verdict = state.flags.read(everything=everything)
    if verdict is not None and not verdict.wrong:
        verdict = state.flags.read(everything=True) or verdict  # what is saved must be good
    if verdict is not None and verdict.wrong:
        raise FloatingPointError(report_bad_step(state, verdict))
    return verdict.signum if verdict is not None else 0


def _stop(state: TrainState, signum: int) -> None:
    """Save, and leave the loop.

    Raises:
        Stopped: always.
    """
    verdict = state.flags.read(everything=True)
    if verdict is not None and verdict.wrong:
        raise FloatingPointError(report_bad_step(state, verdict))
    save(state, is_best=False, final=True)
    raise Stopped(signum)


def _validate_and_save(state: TrainState, progress: Progress) -> None:
    """What follows the last step of an epoch: validation where it is due, selection, a checkpoint."""
    spec, epoch = state.recipe.train, state.step // state.data.steps_per_epoch
    final = epoch == spec.epochs
    improved = False
    state.validation_due = final or epoch % spec.validate_every == 0
    if state.validation_due:
        validation = validate(state)
        if validation is None:  # one of the ranks has a signal: the one with the largest number counts
            signum = torch.tensor([state.signals.received], device=state.accelerator.device)
            _stop(state, int(gather(signum).max()))
            return
        state.validation_due = False
        log(state, validation)
        progress.epoch(validation)
        improved = state.best is None or validation["robust"]["correct"] > state.best["robust"]["correct"]
        if improved:
            state.best = {key: validation[key] for key in ("step", "epoch", "natural", "robust", "attack")}
    if improved or final or epoch % spec.save_every == 0 or state.step == state.last_step:
        save(state, is_best=improved, final=state.step == state.last_step)


def train(recipe: RecipeSpec, profile: int = 0) -> Path:
    """Run `recipe` (or go on with it) and return its run directory; `profile`: see `fit`."""
    state = start(recipe)
    if state.step >= state.last_step and not state.validation_due:
        state.accelerator.print(
            f"{state.run} is complete: {state.step} of {state.last_step} steps are done. Nothing to train."
        )
    else:
        state.accelerator.init_trackers("tensorboard")
        state.accelerator.print(
            f"{state.recipe.name}: {state.recipe.objective.name} on {state.accelerator.device.type}, "
            f"{state.accelerator.num_processes} process(es), {state.recipe.precision}, steps {state.step} to {state.last_step} of {state.total_steps}"
        )
        alive = heartbeat(state.run, state.accelerator.process_index, state.accelerator.num_processes)
        if recipe.train.compile:
            compile_where_faster(state)
        with alive, state.signals.watched(), state.saver or contextlib.nullcontext():
            fit(state, profile)
        best = state.best
        if best is not None and math.isfinite(best["robust"]["accuracy"]):
            state.accelerator.print(
                f"best: epoch {best['epoch']}, validation {best['attack']} {100 * best['robust']['accuracy']:.2f} % "
                f"(n = {best['robust']['n']}). Evaluate on the test split with:\n"
                f"  python -m nrat_scale.evaluate {state.run} --data TEST_SHARDS --attacks natural,pgd20,cw20,aa"
            )
    state.accelerator.end_training()
    return state.run
