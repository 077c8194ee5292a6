"""A training run: loop over steps, validate, select the best checkpoint, save. `step` has the algorithm."""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather

from nrat_scale.attacks import attack_text
from nrat_scale.collapse import ADVICE, catastrophic_epochs
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.memory import memory_message, ran_out_of_memory
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive
from nrat_scale.data.batches import Batch
from nrat_scale.optim import learning_rates, set_rates
from nrat_scale.recipe import RecipeSpec, flat_values, to_yaml
from nrat_scale.tracking import Trackers
from nrat_scale.train.compile import compile_models
from nrat_scale.train.display import Progress, lasting_output
from nrat_scale.train.graphs import use_graphs
from nrat_scale.train.liveness import heartbeat, silent_ranks
from nrat_scale.train.metrics import close_epoch, log, log_partial, partial_row, percent
from nrat_scale.train.nonfinite import report_bad_step
from nrat_scale.train.profiling import Profile
from nrat_scale.train.recovery import rewind, save
from nrat_scale.train.refinement import after_validation, memory_note, write_scores
from nrat_scale.train.setup import start
from nrat_scale.train.signals import Stopped, StopSignals, resume_command
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import train_step
from nrat_scale.train.timing import Timing
from nrat_scale.train.validate import validate


class OutOfMemoryError(UserError):
    """A process has too little memory for its part of a step."""


def train_and_exit(recipe: RecipeSpec, profile: int = 0) -> None:
    """`train` for a whole process: ends with 128 + number after a signal, and with 1 if another rank is lost.

    Lost terminals and full disks under its output do not end it.
    """
    with lasting_output():
        try:
            train(recipe, profile)
        except OutOfMemoryError as error:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                raise
            # The others wait for this rank in a collective: end at once, so that they notice.
            _print_and_exit(f"error: rank {os.environ.get('RANK', '0')}: {error}", 2)
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
                raise
            silent = silent_ranks(RunFolder(Path(recipe.run_dir)))
            lost = " and ".join(f"rank {rank}" for rank in silent) or "another process"
            _print_and_exit(
                f"error: rank {os.environ.get('RANK', '0')} has lost {lost} of this run: it has ended, or did not answer "
                f"within train.timeout_minutes ({first_line(error)}). The same command resumes from the last checkpoint.",
                1,
            )
        except Stopped as stop:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{stop}; the run is saved. Resume with:\n{resume_command()}", flush=True)
            sys.exit(stop.status)


def _print_and_exit(sentence: str, status: int) -> NoReturn:
    """End without waiting for the process group, which has lost a rank."""
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def train(recipe: RecipeSpec, profile: int = 0, signals: StopSignals | None = None) -> Path:
    """Train `recipe`, or resume it, and return its run directory.

    Args:
        profile: number of steps for torch's profiler.
        signals: what a second signal does; by default it ends the process.

    Raises:
        UserError: see `start`; training collapsed and `guard.action` is stop; a checkpoint could not be saved; a device is out
            of memory (`OutOfMemoryError`); another process has taken over the run directory.
        FloatingPointError: a step was not finite; its update was not applied, and no checkpoint contains it.
        Stopped: after a signal; the state is saved.
    """
    try:
        state = start(recipe)
        state.signals = signals or state.signals
        with state.owner or contextlib.nullcontext():
            _run(state, profile)
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemoryError(_memory_advice(recipe, error)) from error
        if recipe.train.deterministic and "does not have a deterministic implementation" in str(error):
            what = f"train.deterministic is true, but {first_line(error).split(', but you set')[0]}"
            raise UserError(f"{what}. Use another model, or train.deterministic=false.") from error
        raise
    state.accelerator.end_training()
    return state.run.path


def _memory_advice(recipe: RecipeSpec, error: Exception) -> str:
    """What was out of memory, and which settings need less."""
    size, processes = recipe.data.batch_size, int(os.environ.get("WORLD_SIZE", "1"))
    group = recipe.model.bn_group_size or 1
    fits = [n for n in range(recipe.train.accumulate + 1, size + 1) if size % (processes * n * group) == 0]
    way_out = f"train.accumulate={fits[0]}" if fits else "a smaller data.batch_size"
    return (
        f"Out of memory ({memory_message(error)}). A process computes {size // (processes * recipe.train.accumulate)} images at "
        f"once. Use {way_out}, which needs less, with a new run_dir, because it belongs to the recipe; or more processes."
    )


def _run(state: TrainState, profile: int) -> None:
    """Train a started run to its end, and say how it went."""
    recipe, run, accelerator = state.recipe, state.run.path, state.accelerator
    if state.step >= state.last_step and not state.validation_due:
        log_partial(state, _partial_row(state))  # resuming has removed it
        write_scores(state)
        accelerator.print(f"{run} is complete: {state.step} of {state.last_step} steps are done. Nothing to train.")
        return
    state.trackers = Trackers(state.run if accelerator.is_main_process else None, recipe.train.trackers)
    state.trackers.describe(flat_values(recipe), to_yaml(recipe))
    accelerator.print(
        f"{recipe.name}: {recipe.objective.title} on {accelerator.device.type}, {accelerator.num_processes} process(es), "
        f"{torch.get_num_threads()} CPU thread(s) each, "
        f"{recipe.precision}, steps {state.step} to {state.last_step} of {state.total_steps}"
    )
    if recipe.objective.warm_start and not recipe.objective.starts_warm:
        accelerator.print(f"objective.warm_start has no effect: {recipe.objective.title} has cross-entropy throughout.")
    threat = recipe.threat
    if recipe.objective.family != "natural" and (
        threat.schedule or (threat.attack, threat.init == "per_class") != ("pgd", False)
    ):
        accelerator.print(f"attack of training: {attack_text(threat)}")
    for note in recipe.objective.cutmix_notes if recipe.data.augment.cutmix else ():
        accelerator.print(note)
    if note := memory_note(state):
        accelerator.print(note)
    compile_models(state)
    use_graphs(state)
    nothing = contextlib.nullcontext()
    alive = heartbeat(state.run, accelerator.process_index) if accelerator.num_processes > 1 else nothing
    tracked, timed = contextlib.closing(state.trackers), contextlib.closing(Timing(state))
    with alive, state.signals.watched(), tracked, state.saver or nothing, timed as timing:
        _fit(state, profile, timing)
    write_scores(state)
    best = state.best
    if best is not None and math.isfinite(best["robust"]["accuracy"]):
        accelerator.print(
            f"best: epoch {best['epoch']}, validation {best['attack']} {100 * best['robust']['accuracy']:.2f} % "
            f"(n = {best['robust']['n']}). Evaluate on the test split with:\n"
            f"  python -m nrat_scale.evaluate {shlex.quote(str(run))} --data TEST_SHARDS --attacks natural,pgd20,cw20,aa"
        )


def _fit(state: TrainState, profile: int, timing: Timing) -> None:
    """Train from `state.step` to `state.last_step`."""
    recipe, per_epoch = state.recipe, state.data.steps_per_epoch
    rank, num_processes = state.accelerator.process_index, state.accelerator.num_processes
    progress, profiler = Progress(state), Profile(state, profile)
    table = learning_rates(recipe.optim, recipe.train.epochs, per_epoch)
    momenta = {layer: layer.momentum for layer in batchnorms(state.base)}
    if state.step == 0 and recipe.guard.action == "rewind":
        save(state, is_best=False)  # an early collapse is rewound to the initial weights
    batches = _batches(state, progress, timing)
    while state.step < state.last_step:
        profiler.update(state)
        with state.clock.section("data"):
            batch = next(batches)
        lr, momentum = table[state.step]
        lr *= state.guard.lr_scale
        set_rates(state.optimizer, lr, momentum)
        for layer, usual in momenta.items():
            layer.momentum = 1.0 if recipe.model.bn_first_step and state.step == 0 else usual
        torch.manual_seed(derive(recipe.seed, "step", state.step, rank) % 2**32)
        train_step(state, batch)
        state.step += 1
        timing.step()
        epoch_ends = state.step % per_epoch == 0
        everything = epoch_ends or state.step == state.last_step or state.step % recipe.guard.window == 0
        signum = _check_recent_steps(state, everything=everything)
        progress.update(state, lr)
        if _watch_for_collapse(state):
            batches = _batches(state, progress, timing)
            continue
        if epoch_ends:
            row = close_epoch(state, state.step // per_epoch, lr)
            timing.epoch()
            log(state, row)
            progress.epoch(row)
            _validate_and_save(state, progress, timing)
        if state.owner is not None and state.owner.replaced_by is not None and num_processes == 1:
            state.owner.check()  # several processes find it out together, at the next save
        if signum or (num_processes == 1 and state.signals.received):
            _save_and_stop(state, signum or state.signals.received, progress)
    profiler.update(state)
    progress.close(state)
    if state.step % per_epoch:  # stopped by max_steps within an epoch
        # Before the first validation no checkpoint is selected: best.json then names this one, with "selected": false.
        save(state, is_best=state.best is None, final=True)
        _log_partial(state, progress)
        none = "" if state.best is not None else " Nothing has been validated yet: best.json names the last checkpoint."
        state.accelerator.print(
            f"stopped after {state.step} of {state.total_steps} steps, as train.max_steps asks, within epoch "
            f"{state.step // per_epoch + 1}; the run is saved.{none} A larger train.max_steps resumes it."
        )


def _partial_row(state: TrainState) -> dict[str, Any] | None:
    """The row of the epoch that has begun, with the learning rate of the last step."""
    table = learning_rates(state.recipe.optim, state.recipe.train.epochs, state.data.steps_per_epoch)
    return partial_row(state, table[state.step - 1][0] * state.guard.lr_scale)


def _log_partial(state: TrainState, progress: Progress) -> None:
    """Log and show what an epoch that has begun has seen so far."""
    row = _partial_row(state)
    log_partial(state, row)
    if row is not None:
        progress.epoch(row)


def _batches(state: TrainState, progress: Progress, timing: Timing) -> Iterator[Batch]:
    """Make up for a validation that a signal interrupted, then return the batches from `state.step` on."""
    if state.validation_due:
        _validate_and_save(state, progress, timing)
    ranks = state.accelerator.process_index, state.accelerator.num_processes
    return state.data.batches(state.step, state.last_step, *ranks)


def _check_recent_steps(state: TrainState, *, everything: bool) -> int:
    """Raise if a recent step was not finite, else return the signal that stops all ranks, 0 for none.

    On a GPU the checks of the last step are still in flight; `everything` waits for them.
    """
    verdict = state.checks.read(everything=everything)
    if verdict is None:
        return 0
    if not verdict.wrong:
        verdict = state.checks.read(everything=True) or verdict  # the state is about to be saved
    if verdict.wrong:
        raise FloatingPointError(report_bad_step(verdict, state))
    return verdict.signum


def _save_and_stop(state: TrainState, signum: int, progress: Progress) -> NoReturn:
    """Save and end training by raising `Stopped`, unless a step was not finite."""
    _check_recent_steps(state, everything=True)
    save(state, is_best=False, final=True)
    _log_partial(state, progress)
    raise Stopped(signum)


def _watch_for_collapse(state: TrainState) -> bool:
    """At the end of a window of steps, act on a collapse as `guard.action` says; True if training was rewound."""
    spec, guard = state.recipe.guard, state.guard
    if spec.action == "none" or state.step % spec.window:
        return False
    window = guard.close(state.accelerator.reduce(guard.sums, "sum"), state.step)
    untrained = spec.action == "rewind" and not guard.has_learnt(window)
    action = "warn" if untrained else spec.action
    if not guard.collapsed or (action == "warn" and guard.warned):
        return False
    guard.warned = True
    has, advice = ("has not begun to learn", "optim.lr may be too small") if untrained else ("has collapsed", ADVICE)
    what = (
        f"Training {has} by step {state.step}: in the last {spec.window} steps {100 * window.top_share:.0f} % of the "
        f"predictions name one class, accuracy is {percent(window.accuracy)}, the mean gradient norm {window.grad_norm:.2g}, "
        f"the mean spread of the logits {window.logit_scale:.2g}."
    )
    row = {"kind": "guard", "step": state.step, "action": action, **asdict(window), "lr_scale": guard.lr_scale}
    if action == "warn":
        log(state, row)
        state.accelerator.print(f"warning: {what} {advice}.")
        return False
    if action == "stop" or guard.rewinds >= spec.max_rewinds:
        tried = f"{guard.rewinds} rewinds did not help." if guard.rewinds else "Or use guard.action=rewind."
        raise UserError(f"{what} {ADVICE}. {tried}")
    rewind(state, what, row)
    return True


def _watch_for_overfitting(state: TrainState, epoch: int) -> None:
    """Warn of catastrophic overfitting when a validation finds it and the one before did not."""
    rows = [json.loads(line) for line in state.metrics]  # empty on other ranks
    validated, overfitted = [row["epoch"] for row in rows if row["kind"] == "validation"], catastrophic_epochs(rows)
    if epoch in overfitted and (len(validated) < 2 or validated[-2] not in overfitted):
        state.accelerator.print(
            f"warning: catastrophic overfitting in epoch {epoch}: the model withstands the attack of training, and "
            f"{state.recipe.train.validation_attack} breaks nearly all images. Use more threat.num_steps, or threat.attack=n_fgsm."
        )


def _validate_and_save(state: TrainState, progress: Progress, timing: Timing) -> None:
    """At the end of an epoch: validate if due, select the best checkpoint, save."""
    spec, epoch = state.recipe.train, state.step // state.data.steps_per_epoch
    improved, last = False, state.step == state.last_step
    state.validation_due = epoch == spec.epochs or epoch % spec.validate_every == 0
    if state.validation_due:
        began = time.perf_counter()
        row = validate(state)
        if row is None:
            # Ranks may have received different signals; all use the largest number.
            signum = torch.tensor([state.signals.received], device=state.accelerator.device)
            _save_and_stop(state, int(gather(signum).max()), progress)
        state.validation_due = False
        after_validation(state, row)
        timing.validation(epoch, time.perf_counter() - began)
        log(state, row)
        progress.epoch(row)
        _watch_for_overfitting(state, epoch)
        improved = state.best is None or row["robust"]["correct"] > state.best["robust"]["correct"]
        if improved:
            state.best = {key: row[key] for key in ("step", "epoch", "natural", "robust", "attack")}
    if improved or last or epoch % spec.save_every == 0:
        save(state, is_best=improved, final=last)
    timing.resume()
