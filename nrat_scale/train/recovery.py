"""Checkpoints of a run: save while training, resume after an interruption, rewind after a collapse."""

from typing import Any

import torch
from accelerate.utils import gather
from torch import nn

from nrat_scale.checkpoint.folder import checkpoint_folders, newest_checkpoint, set_aside, step_of, write_pointer
from nrat_scale.checkpoint.format import Checkpoint, open_checkpoint
from nrat_scale.checkpoint.state import load_optimizer_tensors, optimizer_tensors, tensor_mismatch
from nrat_scale.collapse import ADVICE
from nrat_scale.core.distributed import on_main
from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.train.metrics import is_partial, log, sum_names, write_metrics
from nrat_scale.train.state import TrainState

# The order of `sums` in checkpoints that do not name them.
UNNAMED_SUMS = (
    "loss", "natural_accuracy", "robust_accuracy", "images", "grad_norm", "steps",
    "clean", "clean_accuracy", "noisy", "noisy_memorised", "noisy_corrected",
)  # fmt: skip


def save(state: TrainState, *, is_best: bool, final: bool = False) -> None:
    """Save a checkpoint of this step in the background; last.json (and best.json if `is_best`) will name it.

    `final` waits until it is durable. Raises `UserError` on all ranks if an earlier save failed with an error that is not
    transient, or a final one with any.
    """
    # Save one row per rank: summing first would round differently from the uninterrupted run.
    sums, guard_sums = (gather(sums[None]).tolist() for sums in (state.sums, state.guard.sums))

    def write() -> None:
        assert state.saver is not None
        if state.owner is not None:
            state.owner.check()
        scaler = state.accelerator.scaler
        facts = {
            "step": state.step,
            "epoch": -(-state.step // state.data.steps_per_epoch),
            "whole_epoch": state.step > 0 and state.step % state.data.steps_per_epoch == 0,
            "identity": state.recipe.identity,
            "best": state.best,
            "validation_due": state.validation_due,
            "guard": state.guard.state(),
            "guard_sums": guard_sums,
            "metrics_lines": len(state.metrics),
            "sums": sums,
            "sum_names": sum_names(),
            "seed": state.recipe.seed,  # all random numbers are functions of (seed, step): no generator needs saving
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        tensors = {
            "model": state.base.state_dict(),
            "ema": state.ema.module.state_dict() if state.ema is not None else {},
            "optimizer": optimizer_tensors(state.optimizer, state.base),
            "objective": state.objective.state_dict(),
            "attack": state.class_starts.state_dict() if state.class_starts is not None else {},
        }
        good_until = state.guard.healthy_step if state.recipe.guard.action == "rewind" else None
        selected = state.best is not None
        state.saver.save(tensors, facts, best=is_best, selected=selected, final=final, good_until=good_until)

    on_main(state.accelerator, write)


def resume(state: TrainState) -> None:
    """Restore the newest intact checkpoint, if there is one, and drop the rows of metrics.jsonl that came after it."""
    checkpoint, damaged = newest_checkpoint(state.run.path)
    for sentence in damaged:
        state.accelerator.print(f"warning: {sentence} Going back to step {checkpoint.step if checkpoint else 0}.")
    if checkpoint is None:
        return
    try:
        lines = state.run.metrics.read_text(encoding="utf-8").splitlines() if state.run.metrics.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{state.run.metrics} cannot be read ({first_line(error)}). Restore or remove it.") from error
    state.metrics = [line for line in lines if not is_partial(line)]  # a finished epoch has its own row
    _restore(state, checkpoint)
    if len(state.metrics) < checkpoint.state["metrics_lines"]:
        state.accelerator.print(
            f"warning: {state.run.metrics} has {len(state.metrics)} of the {checkpoint.state['metrics_lines']} rows up to step {state.step}."
        )
    if state.accelerator.is_main_process and len(lines) != len(state.metrics):
        write_metrics(state)
    state.accelerator.print(f"resuming {state.run.path} from step {state.step} of {state.total_steps}")


def _restore(state: TrainState, checkpoint: Checkpoint) -> None:
    facts = checkpoint.state
    _check_origin(state, checkpoint)
    try:
        _restore_sums(state, facts)
        state.guard.load(facts["guard"])
    except UserError as error:
        way_out = "Resume with that version, or start a new run with run_dir=PATH."
        raise UserError(f"{checkpoint.folder} was written by another version ({error}). {way_out}") from error
    modules: dict[str, nn.Module] = {"model": state.base, "objective": state.objective}
    modules |= {"ema": state.ema.module} if state.ema is not None else {}
    modules |= {"attack": state.class_starts} if state.class_starts is not None else {}
    tensors = {name: checkpoint.tensors(name) for name in modules}
    for name, module in modules.items():
        if mismatch := tensor_mismatch(tensors[name], module.state_dict()):
            raise UserError(
                f"{checkpoint.folder} does not fit this version's {name} for the recipe: {mismatch}. Resume with the version "
                "that wrote it, or start a new run with run_dir=PATH."
            )
    for name, module in modules.items():
        module.load_state_dict(tensors[name])
    load_optimizer_tensors(state.optimizer, state.base, checkpoint.tensors("optimizer"))
    if state.accelerator.scaler is not None and facts["scaler"] is not None:
        state.accelerator.scaler.load_state_dict(facts["scaler"])
    state.metrics = state.metrics[: facts["metrics_lines"]]
    state.step, state.best, state.validation_due = facts["step"], facts["best"], facts["validation_due"]


def _check_origin(state: TrainState, checkpoint: Checkpoint) -> None:
    """Raise `UserError` if the checkpoint is of a run with another seed, length, or number of steps in an epoch."""
    facts, per_epoch, problem = checkpoint.state, state.data.steps_per_epoch, ""
    if facts.get("seed", state.recipe.seed) != state.recipe.seed:
        problem = f"its seed is {facts['seed']} and the recipe's is {state.recipe.seed}"
    elif facts["step"] > state.total_steps:
        problem = f"it is of step {facts['step']} and the run has {state.total_steps} steps"
    elif facts["epoch"] != -(-facts["step"] // per_epoch):
        problem = f"it counts step {facts['step']} as epoch {facts['epoch']}, and an epoch has {per_epoch} steps with these data"
    if problem:
        raise UserError(
            f"{checkpoint.folder} is not of this run: {problem}. Restore its data, or choose another run_dir."
        )


def _restore_sums(state: TrainState, facts: dict[str, Any]) -> None:
    """Restore the sums of the metrics and of the guard, saved as one row per rank; `UserError` if they are others."""
    names = facts.get("sum_names", list(UNNAMED_SUMS))
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(sum_names()):
        raise UserError(f"it has sums of {quoted(names)}, expected {', '.join(sum_names())}")
    for key, ours in (("sums", state.sums), ("guard_sums", state.guard.sums)):
        if any(len(row) != len(ours) for row in facts[key]):
            raise UserError(f"'{key}' in state.json does not have {len(ours)} numbers per process")
        rows = torch.tensor(facts[key], dtype=torch.float64)
        if key == "sums":
            rows = rows[:, [names.index(name) for name in sum_names()]]
        if len(rows) == state.accelerator.num_processes:
            ours.copy_(rows[state.accelerator.process_index])
        else:  # saved by another number of processes: the main one takes the total
            ours.copy_(rows.sum(0) * state.accelerator.is_main_process)


def rewind(state: TrainState, what: str, row: dict[str, Any]) -> None:
    """Restore the newest checkpoint from before a collapse and reduce the learning rate; `UserError` if there is none.

    The checkpoint counts as good again only after another good window. If the run collapses without one, the weights were
    about to collapse already, and the next rewind goes further back: in the end to the initial weights.

    `what` describes the collapse in a sentence, `row` in metrics.jsonl.
    """
    guard, run = state.guard, state.run
    rewinds, lr_scale = guard.rewinds + 1, guard.lr_scale * state.recipe.guard.lr_factor
    on_main(state.accelerator, lambda: state.saver.wait() if state.saver is not None else None)
    good = [folder for folder in checkpoint_folders(run.path) if step_of(folder) <= guard.healthy_step]
    if not good:
        raise UserError(f"{what} No checkpoint is from before it. {ADVICE}.")
    state.accelerator.wait_for_everyone()
    checkpoint = open_checkpoint(good[0])
    _restore(state, checkpoint)
    guard.rewinds, guard.lr_scale, guard.bad_windows, guard.warned = rewinds, lr_scale, 0, False
    guard.healthy_step = max(0, min(guard.healthy_step, state.step - 1))
    state.accelerator.print(
        f"warning: {what} Going back to step {state.step}, with {lr_scale:g} times the learning rate."
    )
    if state.best is not None and not run.checkpoint(state.best["step"]).is_dir():
        state.best = None  # its checkpoint was pruned after a later best: the next validation selects anew
    best = checkpoint if state.best is None else open_checkpoint(run.checkpoint(state.best["step"]))
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        set_aside(run.path, after=state.step)
        write_pointer(run.path, "best", best, selected=state.best is not None)
        write_pointer(run.path, "last", checkpoint)
        write_metrics(state)
    log(state, {**row, "rewound_to": state.step, "lr_scale": lr_scale})
    save(state, is_best=best.step == state.step)
