"""Start a run: check recipe, data and run folder, then build data, model, optimizer and state."""

import datetime
import os
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from nrat_scale import models
from nrat_scale.added_losses import check_added
from nrat_scale.attacks import evaluation_threat, fraction_text, short_reach
from nrat_scale.checkpoint.folder import checkpoint_folders, recover
from nrat_scale.checkpoint.saver import Saver
from nrat_scale.collapse import Guard
from nrat_scale.core.distributed import on_main, use_all_cores
from nrat_scale.core.errors import UserError, warn
from nrat_scale.core.files import make_folder, read_json, write_atomically, write_json
from nrat_scale.core.float32 import use_float32
from nrat_scale.core.modes import batchnorms
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive
from nrat_scale.data.spec import GENERATED, REAL
from nrat_scale.data.training_data import TrainingData, normalisation, open_training_data
from nrat_scale.evaluate.attacks import parse_attack
from nrat_scale.evaluate.overlap import with_initial_weights
from nrat_scale.labels import NONE, UNKNOWN, UNSET
from nrat_scale.loading.initial_weights import (
    InitialWeights,
    described,
    find_initial_weights,
    load_initial_weights,
)
from nrat_scale.objectives import Objective
from nrat_scale.optim import build_optimizer, zero_momentum
from nrat_scale.recipe import RecipeSpec, difference, load_recipe, outdated, to_yaml
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import RunningStatistics, check_batchnorm, convert
from nrat_scale.train.class_starts import ClassStarts
from nrat_scale.train.label_noise import keep_stored_noise, write_noise
from nrat_scale.train.metrics import sum_names
from nrat_scale.train.nonfinite import StepChecks
from nrat_scale.train.ownership import Ownership, claim
from nrat_scale.train.profiling import Clock
from nrat_scale.train.recovery import resume
from nrat_scale.train.state import TrainState
from nrat_scale.weights import build_ema

_LEAST_REACH = 0.25  # of eps: a shorter attack is a mistake in the units, not a quick try


def start(recipe: RecipeSpec) -> TrainState:
    """Check recipe, launch, data and run folder, then build the state and resume it from its newest checkpoint.

    Raises:
        UserError: data missing or damaged, a run folder of another recipe, a number of processes that does not fit, ...
    """
    accelerator = _accelerator(recipe)
    on_main(accelerator, lambda: _check_reach(recipe))
    pieces = accelerator.num_processes * recipe.train.accumulate
    if recipe.data.batch_size % pieces:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} does not divide by {accelerator.num_processes} processes x "
            f"{recipe.train.accumulate} accumulation steps. Use a multiple of {pieces}, or fewer processes."
        )
    check_batchnorm(recipe.model.bn, recipe.model.bn_group_size, recipe.data.batch_size // pieces, accelerator.device)
    run = RunFolder(Path(recipe.run_dir))
    recipe = _with_stored_kinds(recipe, run)
    data = on_main(accelerator, lambda: open_training_data(recipe.data, recipe.seed))
    if data is None:
        # The main process has verified the hashes; other ranks repeat it only to skip the same damaged shards.
        data = open_training_data(recipe.data, recipe.seed, verify=recipe.data.on_bad_shard == "skip")
    recipe = replace(recipe, data=data.spec)
    if not run.recipe.is_file():  # an older version may have begun such a run
        data.check_batch_size()
    shards = data.shards
    check_added(recipe.objective, shards.num_classes)
    arguments = models.model_arguments(recipe.model, shards.num_classes, shards.image_shape[2], *normalisation(shards))
    initial, record = _initial_weights(recipe, run, accelerator, arguments)
    torch.manual_seed(derive(recipe.seed, "weights") % 2**32)  # of the initial weights
    base = models.create(recipe.model.name, arguments, trust_code=True)  # the user has named the recipe
    draws = models.try_out(base, recipe.model.name, shards.image_shape, shards.num_classes)
    if initial is not None:
        record = load_initial_weights(base, recipe.model.name, initial)
        _check_same_weights(run, record)
        accelerator.print(described(record))
    owner: Ownership | None = on_main(accelerator, lambda: _claim(run, recipe))  # nothing is written before this line
    try:
        on_main(accelerator, lambda: _check_data(run, data))
        on_main(accelerator, lambda: data.skips.attach(run))
        data.skips.attach(run)
        keep_stored_noise(run, data)
        data.place_images(accelerator.device)
        state = _build(recipe, data, accelerator, base, draws)
        on_main(accelerator, lambda: recover(run.path))
        on_main(accelerator, lambda: _describe(state, arguments, record))
        if accelerator.is_main_process:
            state.saver = Saver(run.path, recipe.train.keep, queue_every=recipe.release.every_epochs)
            state.owner = owner
        resume(state)
    except BaseException:
        if owner is not None:
            owner.release()
        raise
    return state


def _with_stored_kinds(recipe: RecipeSpec, run: RunFolder) -> RecipeSpec:
    """With the kind of label noise that the run began with, where the recipe sets none and the run injects none."""
    if recipe.resume == "never" or not run.recipe.is_file():
        return recipe
    stored, data = load_recipe(run.recipe, run_code=False).data, recipe.data
    for kind in (REAL, GENERATED):
        began, noise = stored.noise_of(kind).kind, data.noise_of(kind)
        if noise.kind == UNSET and began in (NONE, UNKNOWN):
            source = replace(getattr(data, kind), noise=replace(noise, kind=began))
            data = replace(data, **{kind: source})
    return replace(recipe, data=data)


def _accelerator(recipe: RecipeSpec) -> Accelerator:
    gpu = torch.accelerator.is_available()
    _choose_arithmetic(recipe, gpu)
    if recipe.precision == "fp16" and not gpu:
        raise UserError("precision is 'fp16', which needs a GPU. Use bf16 or fp32 on a CPU.")
    timeout = datetime.timedelta(minutes=recipe.train.timeout_minutes)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timeout)]
    accelerator = Accelerator(
        mixed_precision=recipe.precision if recipe.precision in ("bf16", "fp16") else "no",
        cpu=not gpu,
        kwargs_handlers=handlers,
    )
    if accelerator.device.type == "cpu" or recipe.train.threads is not None:
        use_all_cores(recipe.train.threads)
    if accelerator.device.type == "cpu":
        # A collapsing model fills with denormal numbers, which make a CPU twenty times slower.
        torch.set_flush_denormal(True)
    return accelerator


def _check_reach(recipe: RecipeSpec) -> None:
    """Warn if the attack of training or validation cannot reach the surface of its ball; refuse a new run far from it.

    Without steps, training on the random start alone is what the recipe asks for. Runs of earlier versions are resumed.
    """
    threat, attack = recipe.threat, parse_attack(recipe.train.validation_attack)
    noise_alone = threat.num_steps == 0 and threat.start in ("uniform", "normal01")
    problem = None if noise_alone or recipe.objective.family == "natural" else short_reach(threat, threat.num_steps)
    if problem is not None:
        what = (
            f"The attack of training is too weak for its radius: {problem} (threat.step, threat.num_steps, threat.eps)"
        )
        step = fraction_text(round(2.5 * threat.eps / max(threat.num_steps, 1), 6))
        way_out = f"Use more steps, or longer ones, for instance threat.step={step}."
        far = 0 < threat.step * threat.num_steps < _LEAST_REACH * threat.eps
        if far and RunFolder(Path(recipe.run_dir)).is_new:
            raise UserError(f"{what}. {way_out}")
        warn(f"{what}. {way_out}")
    if (problem := short_reach(evaluation_threat(threat), attack.steps)) is not None:
        name = recipe.train.validation_attack
        warn(f"Robust validation accuracies are too high: {problem} (train.validation_attack={name}, threat.step).")


def _choose_arithmetic(recipe: RecipeSpec, gpu: bool) -> None:
    """TF32, deterministic algorithms and cuDNN's search, before the first operation on a GPU."""
    deterministic = recipe.train.deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = gpu and not deterministic
    use_float32("tf32" if recipe.train.tf32 else "ieee")


def _check_data(run: RunFolder, data: TrainingData) -> None:
    """Refuse to resume a run with other images than it began with."""
    stored = read_json(run.data, "record of the training data") if run.data.is_file() else {}
    for kind, entry in data.describe().items():
        began = stored.get(kind)
        for key, what in (("fingerprint", "images"), ("held_out_sha256", "validation images")):
            if isinstance(began, dict) and key in began and began[key] != entry[key]:
                raise UserError(
                    f"{run.path} began with other {kind} {what} than data.{kind}.shards has now (see {key} in {run.data}). "
                    "Restore those shards, or start a new run with run_dir=PATH."
                )
        scores = ((record or {}).get("audit", {}).get("scores_sha256") for record in (began, entry))
        before, now = scores if isinstance(began, dict) else (None, None)
        if before != now:
            raise UserError(
                f"{run.path} began with other scores of an audit than data.{kind}.audit.scores has now (see audit in {run.data}). "
                "Restore those scores, or start a new run with run_dir=PATH."
            )


def _initial_weights(
    recipe: RecipeSpec, run: RunFolder, accelerator: Accelerator, arguments: dict[str, Any]
) -> tuple[InitialWeights | None, dict[str, Any] | None]:
    """(weights of `model.init`, None), or for a run with checkpoints (None, their record); both None without the key.

    Unless the recipe sets them, mean and std in `arguments` become those that the weights were trained with.
    """
    if recipe.model.init is None:
        return None, None
    initial, record = None, None
    if checkpoint_folders(run.path):  # the checkpoint has the weights; the source may be gone
        description = run.read_model()
        record = description.get("init")
        constants = {key: description["model_args"].get(key, arguments[key]) for key in ("mean", "std")}
    else:
        initial = on_main(accelerator, lambda: find_initial_weights(recipe.model, arguments))  # may download
        initial = initial or find_initial_weights(recipe.model, arguments)
        fit = all(len(values) in (1, arguments["in_chans"]) for values in initial.constants.values())
        constants = initial.constants if fit else {}
    if recipe.model.mean is None and recipe.model.std is None and constants:
        if initial is not None and any(constants[key] != arguments[key] for key in constants):
            shown = ", ".join(f"{key} {[round(value, 4) for value in constants[key]]}" for key in ("mean", "std"))
            accelerator.print(f"normalisation of the initial weights: {shown} (model.mean, model.std)")
        arguments |= constants
    return initial, record


def _check_same_weights(run: RunFolder, record: dict[str, Any]) -> None:
    """Raise `UserError` if a run that was interrupted before its first checkpoint began with other weights."""
    before = run.read_model().get("init") if run.model.is_file() else None
    if before is not None and before["source"] == record["source"] and before["sha256"] != record["sha256"]:
        raise UserError(
            f"model.init {record['source']} has changed since the run in {run.path} began. Choose another run folder with "
            "run_dir=PATH."
        )


def _claim(run: RunFolder, recipe: RecipeSpec) -> Ownership:
    """Own the run folder, and create it or check that it holds a run of this recipe."""
    _check_folder(run, recipe)
    make_folder(run.path)
    owner = claim(run)
    try:
        _check_folder(run, recipe)  # another process may have begun a run here before we owned it
        for path in run.leftovers():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if not run.recipe.is_file():
            write_atomically(run.recipe, to_yaml(recipe))  # first: an interrupted start can then be resumed
        elif not run.checkpoints.is_dir():
            make_folder(run.checkpoints)
        if not run.metrics.is_file():
            write_atomically(run.metrics, "")
    except BaseException as error:
        owner.release()
        if isinstance(error, OSError):
            raise UserError(f"{run.path} cannot be cleaned up ({error.strerror}). Change its permissions.") from error
        raise
    return owner


def _check_folder(run: RunFolder, recipe: RecipeSpec) -> None:
    """Raise `UserError` unless the folder is new or holds a run that `recipe` may resume; changes nothing."""
    path, problem = run.path, ""
    if path.exists() and not path.is_dir():
        problem = "is a file; run_dir must be a folder"
    elif run.is_new:
        return
    elif recipe.resume == "never":
        problem = "is not empty and resume is 'never'"
    elif not run.recipe.is_file():
        problem = "holds something that is not a run; nothing in it was touched"
    elif changed := outdated(run.recipe):
        problem = f"holds a run of an older version, in which {changed}; resume it with that version"
    elif (stored := load_recipe(run.recipe, run_code=False)).identity != recipe.identity:
        problem = f"holds a run of another recipe ({difference(stored, recipe)})"
    if problem:
        raise UserError(f"{path} {problem}. Choose another run folder with run_dir=PATH.")


def _build(
    recipe: RecipeSpec, data: TrainingData, accelerator: Accelerator, base: nn.Module, draws: bool
) -> TrainState:
    """The state before the first step; `base` has its initial weights, and draws random numbers in training mode or not."""
    device, num_classes = accelerator.device, data.shards.num_classes
    if recipe.model.bn_momentum is not None:
        for layer in batchnorms(base):
            layer.momentum = recipe.model.bn_momentum
    base = base.to(device, torch.float64 if recipe.precision == "fp64" else torch.float32)
    if recipe.train.channels_last:
        base = base.to(memory_format=torch.channels_last)
    base = convert(base, recipe.model.bn, recipe.model.bn_group_size)
    ema = build_ema(base, recipe.ema, recipe.train.epochs * data.steps_per_epoch) if recipe.ema.decay else None
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    attack_model = AttackModel(base, recipe.threat.bn, fold=recipe.train.fold_batchnorm, compute=compute)
    if attack_model.untraced is not None and batchnorms(base):
        accelerator.print(f"BatchNorm is not folded: torch.fx cannot trace the model ({attack_model.untraced}).")
    with warnings.catch_warnings():
        # torch deprecates `broadcast_buffers`, and Accelerate offers no replacement yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(base.train(), build_optimizer(base, recipe.optim))
    objective = Objective(recipe.objective, num_classes, data.num_images).to(device)
    if recipe.precision == "fp64":
        objective.refinement.double()
    guard = Guard(recipe.guard, num_classes, device)
    sums = torch.zeros(len(sum_names()), dtype=torch.float64, device=device)
    checks = StepChecks(device, partial(accelerator.reduce, reduction="sum"))
    mean = partial(accelerator.reduce, reduction="mean") if accelerator.num_processes > 1 else None
    state = TrainState(
        recipe, RunFolder(Path(recipe.run_dir)), data, accelerator, base, model, attack_model, optimizer, objective, ema,
        data.validation(), guard, checks, Clock(device), RunningStatistics(base, mean), draws, sums,
    )  # fmt: skip
    if recipe.threat.init == "per_class" and objective.attacks:
        height, width, channels = data.shards.image_shape
        dtype = next(base.parameters()).dtype
        state.class_starts = ClassStarts(num_classes, (channels, height, width), recipe.seed, dtype).to(device)
    if recipe.precision == "fp16":
        prepare_for_skipped_steps(state)
    return state


def prepare_for_skipped_steps(state: TrainState) -> None:
    """Let training continue after a step that GradScaler skips: restore what the step changed besides the weights."""
    zero_momentum(state.optimizer.optimizer)
    statistics = [buffer for layer in batchnorms(state.base) for buffer in layer.buffers(recurse=False)]
    starts = () if state.class_starts is None else state.class_starts.buffers()
    state.restored = [*statistics, *state.objective.buffers(), *starts, state.sums, state.guard.sums]


def _describe(state: TrainState, arguments: dict[str, Any], init: dict[str, Any] | None) -> None:
    """Write model.json, data.json and the files of the label noise."""
    shards = state.data.shards
    description = {
        "architecture": state.recipe.model.name,
        "model_args": arguments,
        "image_shape": list(shards.image_shape),
        "class_names": list(shards.class_names),
        "dataset": shards.dataset,
        **({} if init is None else {"init": init}),
    }
    write_json(state.run.model, description)
    trained_on, source = state.data.describe(), state.recipe.model.init
    if source is not None:
        resumed = bool(checkpoint_folders(state.run.path)) or state.run.data.is_file()
        stored = read_json(state.run.data, "record of the training data") if state.run.data.is_file() else {}
        trained_on = with_initial_weights(trained_on, source, stored if resumed else None)
    write_json(state.run.data, trained_on)
    write_noise(state.run, state.data)
    if state.recipe.data.validation.shards is not None:
        of = state.data.validation_shards
        print(f"validation: {len(state.validation.labels)} of the {len(of)} images of {of.folder}")
