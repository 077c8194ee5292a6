"""Start a run: check what a user can get wrong, then build data, model, optimizer and state."""

import datetime
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from tqdm import tqdm

from nrat_scale import labels as label_noise
from nrat_scale import models
from nrat_scale.checkpoint.folder import recover
from nrat_scale.checkpoint.saver import Saver
from nrat_scale.collapse import Guard
from nrat_scale.core.distributed import on_main, use_all_cores
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, write_atomically, write_json
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive
from nrat_scale.data.training_data import TrainingData, normalisation, open_training_data
from nrat_scale.optim import build_optimizer
from nrat_scale.recipe import RecipeSpec, build_objective, difference, load_recipe, to_yaml
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import RunningState, check_batchnorm, convert
from nrat_scale.train.nonfinite import StepChecks
from nrat_scale.train.profiling import Clock
from nrat_scale.train.recovery import resume
from nrat_scale.train.state import SUMS, TrainState
from nrat_scale.weights import build_ema

_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


# ---- a run ----------------------------------------------------------------------------------------------------------


def start(recipe: RecipeSpec) -> TrainState:
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
    on_main(accelerator, lambda: data.skips.attach(RunFolder(run)))
    data.skips.attach(RunFolder(run))
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
) -> TrainState:
    device, several = accelerator.device, accelerator.num_processes > 1
    base = base.to(device, torch.float64 if recipe.precision == "fp64" else torch.float32)
    if recipe.train.channels_last:
        base = base.to(memory_format=torch.channels_last)
    base = convert(base, recipe.model.bn, recipe.model.bn_group_size)
    total_steps = recipe.train.epochs * data.steps_per_epoch
    ema = build_ema(base, recipe.ema, total_steps) if recipe.ema.decay else None
    twin = AttackModel(base, recipe.threat.bn, fold=recipe.train.fold_batchnorm)
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
    flags = StepChecks(device, (lambda tensor: accelerator.reduce(tensor, "sum")) if several else None)
    state = TrainState(
        recipe, run, data, accelerator, base, model, twin, optimizer, objective, ema, data.validation(), guard, flags,
        Clock(device), running, sums,
    )  # fmt: skip
    if twin.untraced is not None and batchnorms(base):
        accelerator.print(f"BatchNorm is not folded while attacking: the model cannot be traced ({twin.untraced}).")
    on_main(accelerator, lambda: recover(run))
    if accelerator.is_main_process:
        _describe(state, arguments)
        state.saver = Saver(
            run,
            recipe.train.keep,
            warn=lambda sentence: tqdm.write(f"warning: {sentence}"),
            queue_every=recipe.release.every_epochs,
        )
    resume(state)
    return state


def _describe(state: TrainState, arguments: dict[str, Any]) -> None:
    """Files that say what the run is: model, data and label noise."""
    shards, real = state.data.shards, state.data.real
    description = {
        "architecture": state.recipe.model.name,
        "model_args": arguments,
        "image_shape": list(shards.image_shape),
        "class_names": list(shards.class_names),
        "dataset": shards.dataset,
    }
    write_json(state.run / "model.json", description)
    write_json(state.run / "data.json", state.data.describe())
    if real is not None and real.given is not None and real.clean is not None:
        order = real.shards.in_source_order()
        clean, given = real.clean[order], real.given[order]
        noise = label_noise.describe(clean, given, shards.num_classes, state.recipe.data.real.noise)
        write_json(state.run / "label_noise.json", noise)
        if not (state.run / "label_noise.npz").is_file():
            np.savez(state.run / "label_noise.npz", clean=clean, given=given, noisy=clean != given)
