"""Training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`.

A run from its recipe to its last checkpoint: check everything that a user can get wrong, build, resume, loop over
epochs, validate, select, save. What happens within a step stands in `step`.
"""

import argparse
import contextlib
import datetime
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather
from torch import nn
from tqdm import tqdm

from nrat_scale import labels as label_noise
from nrat_scale import models
from nrat_scale.batchnorm import RunningState, check_batchnorm, convert
from nrat_scale.checkpoint import Saver, recover
from nrat_scale.clock import Clock
from nrat_scale.compiling import compile_where_faster
from nrat_scale.data import TrainingData, normalisation, open_training_data
from nrat_scale.diagnosis import report_bad_step
from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import make_folder, write_atomically, write_json
from nrat_scale.flags import Flags
from nrat_scale.guard import ADVICE, Guard
from nrat_scale.heartbeat import heartbeat, silent_ranks
from nrat_scale.modes import batchnorms
from nrat_scale.optim import build_optimizer, learning_rates, set_rates
from nrat_scale.processes import on_main, use_all_cores
from nrat_scale.progress import Profile, Progress, close_epoch, log
from nrat_scale.recipe import RecipeSpec, build_objective, difference, load_recipe, to_yaml
from nrat_scale.recovery import resume, rewind, save
from nrat_scale.seeds import derive
from nrat_scale.sources import SKIPPED
from nrat_scale.step import SUMS, Training, train_step
from nrat_scale.stops import Stopped, resume_command
from nrat_scale.twin import Twin
from nrat_scale.validation import validate
from nrat_scale.weights import build_ema

_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


# ---- a run ----------------------------------------------------------------------------------------------------------


def start(recipe: RecipeSpec) -> Training:
    """Check everything a user can get wrong, then build the run: data, model, optimizer, resumed state.

    Raises:
        UserError: data missing or damaged, a run directory used for something else, more processes than fit, ...
    """
    if recipe.precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("precision is 'fp16', which needs a GPU. Use bf16 or fp32 on a CPU.")
    accelerator = Accelerator(
        mixed_precision=_MIXED[recipe.precision],
        cpu=not torch.accelerator.is_available(),
        log_with="tensorboard",
        project_dir=recipe.run_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=recipe.train.timeout_minutes)),
        ],
    )
    if accelerator.device.type == "cpu":
        use_all_cores()
        # A model whose training collapses fills with denormal numbers, which make a CPU twenty times slower.
        torch.set_flush_denormal(True)
    pieces = accelerator.num_processes * recipe.train.accumulate
    if recipe.data.batch_size % pieces:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} does not divide by {accelerator.num_processes} processes x "
            f"{recipe.train.accumulate} accumulation steps. Use a multiple of {pieces}, or fewer processes."
        )
    check_batchnorm(recipe.model.bn, recipe.model.bn_group_size, recipe.data.batch_size // pieces, accelerator.device)
    data = on_main(accelerator, lambda: open_training_data(recipe.data, recipe.seed))
    if data is None:
        # Another rank: what the main one has verified need not be hashed again, unless what is bad is to be skipped.
        data = open_training_data(recipe.data, recipe.seed, verify=recipe.data.on_bad_shard == "skip")
    arguments, base = _model(recipe, data)
    run = Path(recipe.run_dir)
    on_main(accelerator, lambda: _claim(run, recipe))  # from here on something is written
    on_main(accelerator, lambda: data.skips.attach(run / SKIPPED))
    data.skips.attach(run / SKIPPED)
    data.place_images(accelerator.device)
    return _build(recipe, run, data, accelerator, arguments, base)


def _claim(run: Path, recipe: RecipeSpec) -> None:
    """Make the run directory ours, or make sure that it is."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; run_dir must be a folder. Choose another with run_dir=PATH.")
    path = run / "recipe.yaml"
    used = run.is_dir() and any(run.iterdir())
    if used and recipe.resume == "never":
        raise UserError(
            f"The run directory {run} is not empty and resume is 'never'. Choose another with run_dir=PATH."
        )
    if used and not path.is_file():
        raise UserError(
            f"{run} holds something that is not a run; nothing in it was touched. Choose another with run_dir=PATH."
        )
    if used and load_recipe(path).identity != recipe.identity:
        raise UserError(
            f"{run} holds a run of another recipe ({difference(load_recipe(path), recipe)}). "
            "Choose another directory with run_dir=PATH."
        )
    if not used:
        make_folder(run)
        write_atomically(path, to_yaml(recipe))  # first: with it an interrupted start can be taken up again
        write_atomically(run / "metrics.jsonl", "")
    elif not (run / "checkpoints").is_dir():
        make_folder(run / "checkpoints")


def _model(recipe: RecipeSpec, data: TrainingData) -> tuple[dict[str, Any], nn.Module]:
    """The arguments that rebuild the model, and the model with its initial weights, a function of the seed."""
    torch.manual_seed(derive(recipe.seed, "weights") % 2**32)
    shards = data.shards
    arguments = models.model_arguments(recipe.model, shards.num_classes, shards.image_shape[2], *normalisation(shards))
    base = models.create(recipe.model.name, arguments)
    if recipe.model.bn_momentum is not None:
        for layer in batchnorms(base):
            layer.momentum = recipe.model.bn_momentum
    return arguments, base


def _build(
    recipe: RecipeSpec,
    run: Path,
    data: TrainingData,
    accelerator: Accelerator,
    arguments: dict[str, Any],
    base: nn.Module,
) -> Training:
    device, several = accelerator.device, accelerator.num_processes > 1
    base = base.to(device, torch.float64 if recipe.precision == "fp64" else torch.float32)
    if recipe.train.channels_last:
        base = base.to(memory_format=torch.channels_last)
    base = convert(base, recipe.model.bn, recipe.model.bn_group_size)
    total_steps = recipe.train.epochs * data.steps_per_epoch
    ema = build_ema(base, recipe.ema, total_steps) if recipe.ema.decay else None
    twin = Twin(base, recipe.threat.bn, fold=recipe.train.fold_batchnorm)
    with warnings.catch_warnings():
        # torch deprecates `broadcast_buffers`, and Accelerate has no other word for it yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(base.train(), build_optimizer(base, recipe.optim))
    objective = build_objective(recipe.objective, data.shards.num_classes).to(device)
    guard = Guard.build(recipe.guard, data.shards.num_classes, device)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    running = RunningState(
        base,
        [sums, guard.sums, *objective.buffers()],
        (lambda tensor: accelerator.reduce(tensor, "mean")) if several else None,
    )
    flags = Flags(device, (lambda tensor: accelerator.reduce(tensor, "sum")) if several else None)
    t = Training(
        recipe, run, data, accelerator, base, model, twin, optimizer, objective, ema, data.validation(), guard, flags,
        Clock(device), running, sums,
    )  # fmt: skip
    if twin.untraced is not None and batchnorms(base):
        accelerator.print(f"BatchNorm is not folded while attacking: the model cannot be traced ({twin.untraced}).")
    on_main(accelerator, lambda: recover(run))
    if accelerator.is_main_process:
        _describe(t, arguments)
        t.saver = Saver(
            run,
            recipe.train.keep,
            warn=lambda sentence: tqdm.write(f"warning: {sentence}"),
            queue_every=recipe.release.every_epochs,
        )
    resume(t)
    return t


def _describe(t: Training, arguments: dict[str, Any]) -> None:
    """Files that say what the run is: model, data and label noise."""
    shards, real = t.data.shards, t.data.real
    description = {
        "architecture": t.recipe.model.name,
        "model_args": arguments,
        "image_shape": list(shards.image_shape),
        "class_names": list(shards.class_names),
        "dataset": shards.dataset,
    }
    write_json(t.run / "model.json", description)
    write_json(t.run / "data.json", t.data.describe())
    if real is not None and real.given is not None and real.clean is not None:
        order = real.shards.in_source_order()
        clean, given = real.clean[order], real.given[order]
        noise = label_noise.describe(clean, given, shards.num_classes, t.recipe.data.real.noise)
        write_json(t.run / "label_noise.json", noise)
        if not (t.run / "label_noise.npz").is_file():
            np.savez(t.run / "label_noise.npz", clean=clean, given=given, noisy=clean != given)


def fit(t: Training, profile: int = 0) -> None:
    """Train from `t.step` to `t.last_step`.

    Args:
        profile: steps to look at with torch's profiler.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        FloatingPointError: a step was not finite; it changed nothing, and no checkpoint is from after it.
    """
    progress, profiling = Progress(t), Profile(t, profile)
    table = learning_rates(t.recipe.optim, t.recipe.train.epochs, t.data.steps_per_epoch)
    while not _train_until(t, t.last_step, table, progress, profiling):
        pass  # training was rewound
    progress.close()
    if t.step % t.data.steps_per_epoch:  # stopped by max_steps within an epoch
        # Before the first validation nothing is selected: best.json then names the only checkpoint there is, and says so.
        save(t, is_best=t.best is None, final=True)


def _train_until(
    t: Training, stop: int, table: list[tuple[float, float]], progress: Progress, profiling: Profile
) -> bool:
    """The loop over steps; False where the collapse guard has rewound training and it is to be entered again."""
    per_epoch = t.data.steps_per_epoch
    momenta = {layer: layer.momentum for layer in batchnorms(t.base)}
    if t.validation_due:
        _validate_and_save(t, progress)
    batches = t.data.batches(t.step, stop, t.accelerator.process_index, t.accelerator.num_processes)
    while t.step < stop:
        profiling.update(t)
        with t.clock.section("data"):
            batch = next(batches)
        epoch = t.step // per_epoch
        lr, momentum = table[t.step]
        set_rates(t.optimizer, lr * t.guard.lr_scale, momentum)
        for layer, usual in momenta.items():
            layer.momentum = 1.0 if t.recipe.model.bn_first_step and t.step == 0 else usual
        torch.manual_seed(derive(t.recipe.seed, "step", t.step, t.accelerator.process_index) % 2**32)
        train_step(t, batch)
        t.step += 1
        boundary = t.step % per_epoch == 0 or t.step == stop or t.step % t.recipe.guard.window == 0
        signum = _heed(t, everything=boundary)
        progress.update(t, lr * t.guard.lr_scale)
        if watch_for_collapse(t):
            return False
        if t.step % per_epoch == 0:
            row = close_epoch(t, epoch + 1, lr * t.guard.lr_scale)
            log(t, row)
            progress.epoch(row)
            _validate_and_save(t, progress)
        if signum or (t.accelerator.num_processes == 1 and t.signals):
            _stop(t, signum or t.signals.received)
    profiling.update(t)
    return True


def watch_for_collapse(t: Training) -> bool:
    """At the end of a window of steps, act on a collapse as the recipe says; True where training was rewound.

    Raises:
        UserError: the recipe says stop, or there is nothing (more) to rewind to.
    """
    spec = t.recipe.guard
    if spec.action == "none" or t.step % spec.window:
        return False
    window = t.guard.close(t.accelerator.reduce(t.guard.sums.clone(), "sum"), t.step)
    if not t.guard.collapsed or (spec.action == "warn" and t.guard.warned):
        return False
    t.guard.warned = True
    what = (
        f"Training has collapsed by step {t.step}: in the last {spec.window} steps {100 * window.top_share:.0f} % of the "
        f"predictions name one class, accuracy is {100 * window.accuracy:.1f} %, the mean gradient norm {window.grad_norm:.2g}, "
        f"the mean spread of the logits {window.logit_scale:.2g}."
    )
    row = {"kind": "guard", "step": t.step, "action": spec.action, "top_share": window.top_share,
           "accuracy": window.accuracy, "grad_norm": window.grad_norm, "logit_scale": window.logit_scale,
           "lr_scale": t.guard.lr_scale}  # fmt: skip
    if spec.action == "warn":
        log(t, row)
        t.accelerator.print(f"warning: {what} {ADVICE}.")
        return False
    if spec.action == "stop" or t.guard.rewinds >= spec.max_rewinds:
        raise UserError(f"{what} {ADVICE}, or let guard.action rewind.")
    rewind(t, what, row)
    return True


def _heed(t: Training, *, everything: bool) -> int:
    """Look at what the device has told of the last steps; `everything`: wait for what it has still to tell.

    Returns:
        The signal that all ranks are to stop by, 0 for none.
    """
    verdict = t.flags.read(everything=everything)
    if verdict is not None and not verdict.wrong:
        verdict = t.flags.read(everything=True) or verdict  # what is saved must be good
    if verdict is not None and verdict.wrong:
        raise FloatingPointError(report_bad_step(t, verdict))
    return verdict.signum if verdict is not None else 0


def _stop(t: Training, signum: int) -> None:
    """Save, and leave the loop.

    Raises:
        Stopped: always.
    """
    verdict = t.flags.read(everything=True)
    if verdict is not None and verdict.wrong:
        raise FloatingPointError(report_bad_step(t, verdict))
    save(t, is_best=False, final=True)
    raise Stopped(signum)


def _validate_and_save(t: Training, progress: Progress) -> None:
    """What follows the last step of an epoch: validation where it is due, selection, a checkpoint."""
    spec, epoch = t.recipe.train, t.step // t.data.steps_per_epoch
    final = epoch == spec.epochs
    improved = False
    t.validation_due = final or epoch % spec.validate_every == 0
    if t.validation_due:
        validation = validate(t)
        if validation is None:  # one of the ranks has a signal: the one with the largest number counts
            signum = torch.tensor([t.signals.received], device=t.accelerator.device)
            _stop(t, int(gather(signum).max()))
            return
        t.validation_due = False
        log(t, validation)
        progress.epoch(validation)
        improved = t.best is None or validation["robust"]["correct"] > t.best["robust"]["correct"]
        if improved:
            t.best = {key: validation[key] for key in ("step", "epoch", "natural", "robust", "attack")}
    if improved or final or epoch % spec.save_every == 0 or t.step == t.last_step:
        save(t, is_best=improved, final=t.step == t.last_step)


def train(recipe: RecipeSpec, profile: int = 0) -> Path:
    """Run `recipe` (or go on with it) and return its run directory; `profile`: see `fit`."""
    t = start(recipe)
    if t.step >= t.last_step and not t.validation_due:
        t.accelerator.print(f"{t.run} is complete: {t.step} of {t.last_step} steps are done. Nothing to train.")
    else:
        t.accelerator.init_trackers("tensorboard")
        t.accelerator.print(
            f"{t.recipe.name}: {t.recipe.objective.name} on {t.accelerator.device.type}, "
            f"{t.accelerator.num_processes} process(es), {t.recipe.precision}, steps {t.step} to {t.last_step} of {t.total_steps}"
        )
        alive = heartbeat(t.run, t.accelerator.process_index, t.accelerator.num_processes)
        if recipe.train.compile:
            compile_where_faster(t)
        with alive, t.signals.watched(), t.saver or contextlib.nullcontext():
            fit(t, profile)
        best = t.best
        if best is not None and math.isfinite(best["robust"]["accuracy"]):
            t.accelerator.print(
                f"best: epoch {best['epoch']}, validation {best['attack']} {100 * best['robust']['accuracy']:.2f} % "
                f"(n = {best['robust']['n']}). Evaluate on the test split with:\n"
                f"  python -m nrat_scale.evaluate {t.run} --data TEST_SHARDS --attacks natural,pgd20,cw20,aa"
            )
    t.accelerator.end_training()
    return t.run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m nrat_scale.train",
        description="Train a recipe. It continues by itself after an interruption.",
        epilog="Example: accelerate launch -m nrat_scale.train recipes/wrn28_10_gen1m.yaml objective.name=trades seed=1",
    )
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="write a torch profiler trace of N steps, and where time goes",
    )
    arguments = parser.parse_args(argv)
    if arguments.profile < 0:
        raise UserError(f"--profile is {arguments.profile}; it is a number of steps.")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    try:
        train(recipe, arguments.profile)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        lost = " and ".join(f"rank {rank}" for rank in silent_ranks(Path(recipe.run_dir))) or "another process"
        print(
            f"error: rank {os.environ.get('RANK', '0')} has lost {lost} of this run: it has ended, or did not answer within "
            f"train.timeout_minutes ({str(error).strip().splitlines()[-1]}). The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the process group would be waited for once more on the way out
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{stop}; the run is saved. Go on with:\n{resume_command()}", flush=True)
        sys.exit(stop.status)


if __name__ == "__main__":
    run_cli(main)
