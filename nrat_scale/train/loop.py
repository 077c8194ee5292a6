"""A training run: start or resume, loop over steps, validate, select the best checkpoint, save.

`setup` builds the state, `step` has the algorithm.
"""

import contextlib
import math
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather

from nrat_scale.collapse import ADVICE
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive
from nrat_scale.optim import learning_rates, set_rates
from nrat_scale.recipe import RecipeSpec
from nrat_scale.train.compile import compile_models
from nrat_scale.train.display import Progress
from nrat_scale.train.liveness import heartbeat, is_lost_rank, silent_ranks
from nrat_scale.train.metrics import close_epoch, log
from nrat_scale.train.nonfinite import report_bad_step
from nrat_scale.train.profiling import Profile
from nrat_scale.train.recovery import rewind, save
from nrat_scale.train.setup import start
from nrat_scale.train.signals import Stopped, resume_command
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import train_step
from nrat_scale.train.validate import validate


def train_and_exit(recipe: RecipeSpec, profile: int = 0) -> None:
    """`train`, as a process: after a signal it prints the command that resumes and exits with 143 (SIGINT: 130), and after
    the loss of another rank it prints a sentence that names it and exits with 1."""
    try:
        train(recipe, profile)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        silent = silent_ranks(RunFolder(Path(recipe.run_dir)))
        lost = " and ".join(f"rank {rank}" for rank in silent) or "another process"
        print(
            f"error: rank {os.environ.get('RANK', '0')} has lost {lost} of this run: it has ended, or did not answer within "
            f"train.timeout_minutes ({first_line(error)}). The same command resumes from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # a normal exit would wait for the process group once more
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{stop}; the run is saved. Resume with:\n{resume_command()}", flush=True)
        sys.exit(stop.status)


def train(recipe: RecipeSpec, profile: int = 0) -> Path:
    """Train `recipe`, or resume it, and return its run directory; `profile`: see `fit`.

    Raises:
        UserError, Stopped, FloatingPointError: see `start` and `fit`.
    """
    state = start(recipe)
    run, accelerator = state.run.path, state.accelerator
    if state.step >= state.last_step and not state.validation_due:
        accelerator.print(f"{run} is complete: {state.step} of {state.last_step} steps are done. Nothing to train.")
    else:
        accelerator.init_trackers("tensorboard")
        accelerator.print(
            f"{recipe.name}: {recipe.objective.name} on {accelerator.device.type}, {accelerator.num_processes} process(es), "
            f"{recipe.precision}, steps {state.step} to {state.last_step} of {state.total_steps}"
        )
        alive = heartbeat(state.run, accelerator.process_index, accelerator.num_processes)
        compile_models(state)
        with alive, state.signals.watched(), state.saver or contextlib.nullcontext():
            fit(state, profile)
        best = state.best
        if best is not None and math.isfinite(best["robust"]["accuracy"]):
            accelerator.print(
                f"best: epoch {best['epoch']}, validation {best['attack']} {100 * best['robust']['accuracy']:.2f} % "
                f"(n = {best['robust']['n']}). Evaluate on the test split with:\n"
                f"  python -m nrat_scale.evaluate {run} --data TEST_SHARDS --attacks natural,pgd20,cw20,aa"
            )
    accelerator.end_training()
    return run


def fit(state: TrainState, profile: int = 0) -> None:
    """Train from `state.step` to `state.last_step`.

    Args:
        profile: number of steps for torch's profiler.

    Raises:
        Stopped: after a signal; the state is saved.
        FloatingPointError: a step was not finite; its update was not applied, and no checkpoint contains it.
        UserError: training collapsed and `guard.action` is stop, or a checkpoint could not be saved.
    """
    progress, profiler = Progress(state), Profile(state, profile)
    table = learning_rates(state.recipe.optim, state.recipe.train.epochs, state.data.steps_per_epoch)
    while not _train_until(state, state.last_step, table, progress, profiler):
        pass  # rewound: continue from the earlier step
    progress.close()
    if state.step % state.data.steps_per_epoch:  # stopped by max_steps within an epoch
        # Before the first validation no checkpoint is selected: best.json then names this one, with "selected": false.
        save(state, is_best=state.best is None, final=True)


def _train_until(
    state: TrainState, stop: int, table: list[tuple[float, float]], progress: Progress, profiler: Profile
) -> bool:
    """The loop over steps; False if the collapse guard has rewound training to an earlier step."""
    per_epoch = state.data.steps_per_epoch
    momenta = {layer: layer.momentum for layer in batchnorms(state.base)}
    if state.validation_due:
        _validate_and_save(state, progress)
    batches = state.data.batches(state.step, stop, state.accelerator.process_index, state.accelerator.num_processes)
    while state.step < stop:
        profiler.update(state)
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
        signum = _check_recent_steps(state, everything=boundary)
        progress.update(state, lr * state.guard.lr_scale)
        if watch_for_collapse(state):
            return False
        if state.step % per_epoch == 0:
            row = close_epoch(state, epoch + 1, lr * state.guard.lr_scale)
            log(state, row)
            progress.epoch(row)
            _validate_and_save(state, progress)
        if signum or (state.accelerator.num_processes == 1 and state.signals):
            _save_and_stop(state, signum or state.signals.received)
    profiler.update(state)
    return True


def _check_recent_steps(state: TrainState, *, everything: bool) -> int:
    """Check the finite and stop flags of recent steps; `everything` also waits for flags still in flight.

    Returns:
        The signal by which all ranks stop, 0 for none.

    Raises:
        FloatingPointError: a step was not finite.
    """
    verdict = state.checks.read(everything=everything)
    if verdict is not None and not verdict.wrong:
        verdict = state.checks.read(everything=True) or verdict  # the state is about to be saved
    if verdict is not None and verdict.wrong:
        ((batch, parts),) = [recent for recent in state.recent if recent[0].step + 1 == verdict.step]
        rank = state.accelerator.process_index
        raise FloatingPointError(report_bad_step(verdict, batch, parts, state.base, state.run, rank))
    return verdict.signum if verdict is not None else 0


def _save_and_stop(state: TrainState, signum: int) -> None:
    """Save and end training.

    Raises:
        Stopped: always, unless a step was not finite (FloatingPointError).
    """
    _check_recent_steps(state, everything=True)
    save(state, is_best=False, final=True)
    raise Stopped(signum)


def watch_for_collapse(state: TrainState) -> bool:
    """At the end of a window of steps, act on a collapse as `guard.action` says; True if training was rewound.

    Raises:
        UserError: the action is stop, or there is no (further) checkpoint to rewind to.
    """
    spec, guard = state.recipe.guard, state.guard
    if spec.action == "none" or state.step % spec.window:
        return False
    window = guard.close(state.accelerator.reduce(guard.sums.clone(), "sum"), state.step)
    if not guard.collapsed or (spec.action == "warn" and guard.warned):
        return False
    guard.warned = True
    what = (
        f"Training has collapsed by step {state.step}: in the last {spec.window} steps {100 * window.top_share:.0f} % of the "
        f"predictions name one class, accuracy is {100 * window.accuracy:.1f} %, the mean gradient norm {window.grad_norm:.2g}, "
        f"the mean spread of the logits {window.logit_scale:.2g}."
    )
    row = {"kind": "guard", "step": state.step, "action": spec.action, "top_share": window.top_share,
           "accuracy": window.accuracy, "grad_norm": window.grad_norm, "logit_scale": window.logit_scale,
           "lr_scale": guard.lr_scale}  # fmt: skip
    if spec.action == "warn":
        log(state, row)
        state.accelerator.print(f"warning: {what} {ADVICE}.")
        return False
    if spec.action == "stop" or guard.rewinds >= spec.max_rewinds:
        raise UserError(f"{what} {ADVICE}, or use guard.action=rewind.")
    rewind(state, what, row)
    return True


def _validate_and_save(state: TrainState, progress: Progress) -> None:
    """After the last step of an epoch: validate and select if it is due, and save."""
    spec, epoch = state.recipe.train, state.step // state.data.steps_per_epoch
    final = epoch == spec.epochs
    improved = False
    state.validation_due = final or epoch % spec.validate_every == 0
    if state.validation_due:
        row = validate(state)
        if row is None:
            # Several ranks may have received different signals: all stop by the largest.
            signum = torch.tensor([state.signals.received], device=state.accelerator.device)
            _save_and_stop(state, int(gather(signum).max()))
            return
        state.validation_due = False
        log(state, row)
        progress.epoch(row)
        improved = state.best is None or row["robust"]["correct"] > state.best["robust"]["correct"]
        if improved:
            state.best = {key: row[key] for key in ("step", "epoch", "natural", "robust", "attack")}
    if improved or final or epoch % spec.save_every == 0 or state.step == state.last_step:
        save(state, is_best=improved, final=state.step == state.last_step)
