"""Training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`.

A run from its recipe to its last checkpoint: check everything that a user can get wrong, build, resume, loop over
epochs, validate, select, save. What happens within a step stands in `step`.
"""

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather
from torch import nn
from tqdm import tqdm

from nrat_scale import labels as label_noise
from nrat_scale import models
from nrat_scale.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_optimizer_tensors,
    newest_checkpoint,
    open_checkpoint,
    optimizer_tensors,
    prune,
    save_checkpoint,
    set_aside,
    step_of,
    write_pointer,
)
from nrat_scale.data import TrainingData, normalisation, open_training_data
from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import make_folder, write_atomically, write_json
from nrat_scale.guard import ADVICE, Guard
from nrat_scale.modes import batchnorms
from nrat_scale.optim import build_optimizer, schedule_table, set_epoch
from nrat_scale.recipe import RecipeSpec, build_objective, difference, load_recipe, to_yaml
from nrat_scale.seeds import derive
from nrat_scale.sources import SKIPPED
from nrat_scale.step import SUMS, Training, train_step
from nrat_scale.stops import Stopped, resume_command
from nrat_scale.validation import average_batchnorm, validate
from nrat_scale.weights import build_ema

Result = TypeVar("Result")
_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


# ---- records --------------------------------------------------------------------------------------------------------


def log(t: Training, row: dict[str, Any]) -> None:
    """Append one row to metrics.jsonl (durably) and show it to the trackers."""
    if not t.accelerator.is_main_process:
        return
    t.metrics.append(json.dumps(row, allow_nan=False))
    with open(t.run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(t.metrics[-1] + "\n")
    values = {key: value["accuracy"] if isinstance(value, dict) else value for key, value in row.items()}
    numbers = {f"{row['kind']}/{k}": v for k, v in values.items() if isinstance(v, float)}
    t.accelerator.log(numbers, step=row["step"])


def _train_row(t: Training, epoch: int, lr: float) -> dict[str, Any]:
    sums = dict(zip(SUMS, t.accelerator.reduce(t.sums, "sum").tolist(), strict=True))
    n = sums["images"]
    t.sums.zero_()
    family = t.objective.family

    def share(part: str, whole: str) -> float | None:
        return sums[part] / sums[whole] if sums[whole] else None

    return {
        "kind": "train",
        "epoch": epoch,
        "step": t.step,
        "loss": sums["loss"] / n,
        "natural_accuracy": sums["natural"] / n if family != "at" else None,
        "robust_accuracy": sums["robust"] / n if family != "natural" else None,
        "clean_accuracy": share("clean_fitted", "clean"),
        "noisy_memorised": share("noisy_fitted", "noisy"),
        "noisy_corrected": share("noisy_corrected", "noisy"),
        "grad_norm": share("grad_norm", "steps"),
        "lr": lr,
    }


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save(t: Training, *, is_best: bool) -> None:
    """Write a checkpoint of this step, and let last.json (and best.json) name it."""
    average_batchnorm(t)
    sums = t.accelerator.reduce(t.sums.clone(), "sum").tolist()
    guard_sums = t.accelerator.reduce(t.guard.sums.clone(), "sum").tolist()
    if t.accelerator.is_main_process:
        scaler = t.accelerator.scaler
        state = {
            "step": t.step,
            "epoch": -(-t.step // t.data.steps_per_epoch),
            "identity": t.recipe.identity,
            "best": t.best,
            "validation_due": t.validation_due,
            "guard": t.guard.state(),
            "guard_sums": guard_sums,
            "metrics_lines": len(t.metrics),
            "sums": sums,
            "seed": t.recipe.seed,  # all randomness is a function of (seed, step): there is no other state
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        tensors = {
            "model": dict(t.base.state_dict()),
            "ema": dict(t.ema.module.state_dict()) if t.ema is not None else {},
            "optimizer": optimizer_tensors(t.optimizer, t.base),
            "objective": dict(t.objective.state_dict()),
        }
        checkpoint = save_checkpoint(t.run, tensors, state)
        write_pointer(t.run, "last", checkpoint)
        if is_best:
            write_pointer(t.run, "best", checkpoint, selected=t.best is not None)
        prune(t.run, t.recipe.train.keep)
    t.accelerator.wait_for_everyone()


def resume(t: Training) -> None:
    """Go on from the newest checkpoint that verifies, if there is one."""
    checkpoint, damaged = newest_checkpoint(t.run)
    for sentence in damaged:
        t.accelerator.print(f"warning: {sentence} Going back to step {checkpoint.step if checkpoint else 0}.")
    if checkpoint is None:
        return
    _restore(t, checkpoint)
    path = t.run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    t.metrics = lines[: checkpoint.state["metrics_lines"]]
    if t.accelerator.is_main_process and len(lines) != len(t.metrics):
        write_atomically(t.run / "metrics.jsonl", "".join(line + "\n" for line in t.metrics))
    t.accelerator.print(f"resuming {t.run} from step {t.step} of {t.total_steps}")


def _restore(t: Training, checkpoint: Checkpoint) -> None:
    try:
        t.base.load_state_dict(checkpoint.tensors("model"))
        if t.ema is not None:
            t.ema.module.load_state_dict(checkpoint.tensors("ema"))
        t.objective.load_state_dict(checkpoint.tensors("objective"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint.folder} does not fit the recipe's model: {error}") from error
    load_optimizer_tensors(t.optimizer, t.base, checkpoint.tensors("optimizer"))
    state = checkpoint.state
    if t.accelerator.scaler is not None and state["scaler"] is not None:
        t.accelerator.scaler.load_state_dict(state["scaler"])
    if t.accelerator.is_main_process:
        t.sums += torch.tensor(state["sums"], dtype=torch.float64, device=t.sums.device)
        t.guard.sums += torch.tensor(state["guard_sums"], dtype=torch.float64, device=t.sums.device)
    t.guard.load(state["guard"])
    t.step, t.best, t.validation_due = int(state["step"]), state["best"], bool(state["validation_due"])


# ---- a run ----------------------------------------------------------------------------------------------------------


def start(recipe: RecipeSpec) -> Training:
    """Check everything a user can get wrong, then build the run: data, model, optimizer, resumed state.

    Raises:
        UserError: data missing or damaged, a run directory used for something else, more processes than fit, ...
    """
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
        # `accelerate launch` sets OMP_NUM_THREADS=1 on a CPU, which leaves all cores but one idle.
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores))
        # A model whose training collapses fills with denormal numbers, which make a CPU twenty times slower.
        torch.set_flush_denormal(True)
    pieces = accelerator.num_processes * recipe.train.accumulate
    if recipe.data.batch_size % pieces:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} does not divide by {accelerator.num_processes} processes x "
            f"{recipe.train.accumulate} accumulation steps. Use a multiple of {pieces}, or fewer processes."
        )
    data = _on_main(accelerator, lambda: open_training_data(recipe.data, recipe.seed))
    if data is None:  # another rank: what the main one has verified need not be hashed again
        data = open_training_data(recipe.data, recipe.seed, verify=False)
    arguments, base = _model(recipe, data)
    run = Path(recipe.run_dir)
    _on_main(accelerator, lambda: _claim(run, recipe))  # from here on something is written
    _on_main(accelerator, lambda: data.skips.attach(run / SKIPPED))
    data.skips.attach(run / SKIPPED)
    return _build(recipe, run, data, accelerator, arguments, base)


def _on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result | None:
    """The result of `action` on the main process, None on the others, once it is done.

    A `UserError` is raised on every process: all end alike, and none waits for one that has gone.
    """
    result, message = None, [""]
    if accelerator.is_main_process:
        try:
            result = action()
        except UserError as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0]:
        raise UserError(message[0])
    return result


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
    base = base.to(accelerator.device, torch.float64 if recipe.precision == "fp64" else torch.float32)
    total_steps = recipe.train.epochs * data.steps_per_epoch
    ema = build_ema(base, recipe.ema, total_steps) if recipe.ema.decay else None
    model, optimizer = accelerator.prepare(base.train(), build_optimizer(base, recipe.optim))
    objective = build_objective(recipe.objective, data.shards.num_classes).to(accelerator.device)
    guard = Guard.build(recipe.guard, data.shards.num_classes, accelerator.device)
    t = Training(recipe, run, data, accelerator, base, model, optimizer, objective, ema, data.validation(), guard)
    t.sums = t.sums.to(accelerator.device)
    if accelerator.is_main_process:
        _describe(t, arguments)
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


def fit(t: Training) -> None:
    """Train from `t.step` to `t.last_step`.

    Raises:
        Stopped: a signal asked for it; the state is saved.
    """
    per_epoch = t.data.steps_per_epoch
    table = schedule_table(t.recipe.optim, t.recipe.train.epochs)
    momenta = {layer: layer.momentum for layer in batchnorms(t.base)}
    bar = tqdm(
        total=t.last_step,
        initial=t.step,
        desc=t.recipe.name,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        disable=not t.accelerator.is_main_process,
    )
    while not _train_until(t, t.last_step, table, momenta, bar):
        bar.n = t.step  # training was rewound
    bar.close()
    if t.step % per_epoch:  # stopped by max_steps within an epoch
        # Before the first validation nothing is selected: best.json then names the only checkpoint there is, and says so.
        save(t, is_best=t.best is None)


def _train_until(
    t: Training, stop: int, table: list[tuple[float, float]], momenta: dict[Any, float | None], bar: Any
) -> bool:
    """The loop over steps; False where the collapse guard has rewound training and it is to be entered again."""
    per_epoch = t.data.steps_per_epoch
    if t.validation_due:
        _validate_and_save(t, bar)
    batches = t.data.batches(t.step, stop, t.accelerator.process_index, t.accelerator.num_processes)
    for batch in batches:
        epoch = t.step // per_epoch
        lr, momentum = table[epoch]
        set_epoch(t.optimizer, lr * t.guard.lr_scale, momentum)
        for layer, usual in momenta.items():
            layer.momentum = 1.0 if t.recipe.model.bn_first_step and t.step == 0 else usual
        torch.manual_seed(derive(t.recipe.seed, "step", t.step, t.accelerator.process_index) % 2**32)
        train_step(t, batch)
        t.step += 1
        bar.update()
        if watch_for_collapse(t):
            return False
        if t.step % per_epoch == 0:
            log(t, _train_row(t, epoch + 1, lr * t.guard.lr_scale))
            _validate_and_save(t, bar)
        _stop_if_asked(t)
    return True


def watch_for_collapse(t: Training) -> bool:
    """At the end of a window of steps, act on a collapse as the recipe says; True where training was rewound.

    Raises:
        UserError: the recipe says stop, or there is nothing (more) to rewind to.
    """
    spec = t.recipe.guard
    if spec.action == "none" or t.step % spec.window:
        return False
    window = t.guard.close(t.accelerator.reduce(t.guard.sums, "sum"), t.step)
    if not t.guard.collapsed or (spec.action == "warn" and t.guard.warned):
        return False
    t.guard.warned = True
    what = (
        f"Training has collapsed by step {t.step}: in the last {spec.window} steps {100 * window.top_share:.0f} % of the "
        f"predictions name one class, accuracy is {100 * window.accuracy:.1f} %, the mean gradient norm {window.grad_norm:.2g}."
    )
    row = {"kind": "guard", "step": t.step, "action": spec.action, "top_share": window.top_share,
           "accuracy": window.accuracy, "grad_norm": window.grad_norm, "lr_scale": t.guard.lr_scale}  # fmt: skip
    if spec.action == "warn":
        log(t, row)
        t.accelerator.print(f"warning: {what} {ADVICE}.")
        return False
    if spec.action == "stop" or t.guard.rewinds >= spec.max_rewinds:
        raise UserError(f"{what} {ADVICE}, or let guard.action rewind.")
    _rewind(t, what, row)
    return True


def _rewind(t: Training, what: str, row: dict[str, Any]) -> None:
    """Go back to the newest checkpoint from before the collapse, with a smaller learning rate."""
    spec, rewinds, scale, healthy = t.recipe.guard, t.guard.rewinds, t.guard.lr_scale, t.guard.healthy_step
    good = [folder for folder in checkpoint_folders(t.run) if step_of(folder) <= healthy]
    if not good:
        raise UserError(f"{what} No checkpoint is from before it. {ADVICE}.")
    t.accelerator.wait_for_everyone()
    checkpoint = open_checkpoint(good[0])
    t.sums.zero_()
    t.guard.sums.zero_()
    _restore(t, checkpoint)
    t.metrics = t.metrics[: checkpoint.state["metrics_lines"]]
    t.guard.rewinds, t.guard.lr_scale = rewinds + 1, scale * spec.lr_factor
    t.guard.bad_windows, t.guard.warned = 0, False
    t.accelerator.print(
        f"warning: {what} Going back to step {t.step}, with {t.guard.lr_scale:g} times the learning rate."
    )
    if t.accelerator.is_main_process:
        set_aside(t.run, after=t.step)
        write_atomically(t.run / "metrics.jsonl", "".join(line + "\n" for line in t.metrics))
    log(t, {**row, "rewound_to": t.step, "lr_scale": t.guard.lr_scale})
    save(t, is_best=t.best is not None and t.best["step"] == t.step)


def _stop_if_asked(t: Training) -> None:
    """Save and raise `Stopped` on all ranks, at the same step, once one of them has received a signal."""
    signum = t.signals.received
    if t.accelerator.num_processes > 1:
        signum = int(gather(torch.tensor([signum], device=t.accelerator.device)).max())
    if signum:
        save(t, is_best=False)
        raise Stopped(signum)


def _validate_and_save(t: Training, bar: Any) -> None:
    """What follows the last step of an epoch: validation where it is due, selection, a checkpoint."""
    spec, epoch = t.recipe.train, t.step // t.data.steps_per_epoch
    final = epoch == spec.epochs
    improved = False
    t.validation_due = final or epoch % spec.validate_every == 0
    if t.validation_due:
        validation = validate(t)
        if validation is None:
            return _stop_if_asked(t)
        t.validation_due = False
        log(t, validation)
        improved = t.best is None or validation["robust"]["correct"] > t.best["robust"]["correct"]
        if improved:
            t.best = {key: validation[key] for key in ("step", "epoch", "natural", "robust", "attack")}
        bar.set_postfix_str(
            f"epoch {epoch}: validation natural {100 * validation['natural']['accuracy']:.1f} %, {spec.validation_attack} "
            f"{100 * validation['robust']['accuracy']:.1f} %"
        )
    if improved or final or epoch % spec.save_every == 0 or t.step == t.last_step:
        save(t, is_best=improved)
    return None


def train(recipe: RecipeSpec) -> Path:
    """Run `recipe` (or go on with it) and return its run directory."""
    t = start(recipe)
    if t.step >= t.last_step:
        t.accelerator.print(f"{t.run} is complete: {t.step} of {t.last_step} steps are done. Nothing to train.")
    else:
        t.accelerator.init_trackers("tensorboard")
        t.accelerator.print(
            f"{t.recipe.name}: {t.recipe.objective.name} on {t.accelerator.device.type}, "
            f"{t.accelerator.num_processes} process(es), {t.recipe.precision}, steps {t.step} to {t.last_step} of {t.total_steps}"
        )
        with t.signals.watched():
            fit(t)
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
    arguments = parser.parse_args(argv)
    try:
        train(load_recipe(arguments.recipe, arguments.overrides))
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        rank = os.environ.get("RANK", "0")
        print(
            f"error: rank {rank} has lost another process of this run: it has ended, or did not answer within "
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
