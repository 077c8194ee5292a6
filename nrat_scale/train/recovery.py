"""The state of a run: written beside training, taken up again after an interruption, gone back to after a collapse."""

from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from nrat_scale.checkpoint.folder import checkpoint_folders, newest_checkpoint, set_aside, step_of, write_pointer
from nrat_scale.checkpoint.format import Checkpoint, open_checkpoint
from nrat_scale.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from nrat_scale.collapse import ADVICE
from nrat_scale.core.distributed import on_main
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_atomically
from nrat_scale.train.metrics import log
from nrat_scale.train.state import TrainState


def save(t: TrainState, *, is_best: bool, final: bool = False) -> None:
    """Write a checkpoint of this step, beside training; let last.json (and best.json) name it.

    Args:
        final: return only once it is durable.

    Raises:
        UserError: on all ranks, where a save failed for another reason than a full disk, or a final one for any.
    """
    # Of each rank: added up in another order they would not give the same bits.
    sums, guard_sums = (gather(sums[None]).tolist() for sums in (t.sums, t.guard.sums))

    def write() -> None:
        assert t.saver is not None
        scaler = t.accelerator.scaler
        state = {
            "step": t.step,
            "epoch": -(-t.step // t.data.steps_per_epoch),
            "whole_epoch": t.step % t.data.steps_per_epoch == 0,
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
        tensors: dict[str, dict[str, Tensor]] = {
            "model": dict(t.base.state_dict()),
            "ema": dict(t.ema.module.state_dict()) if t.ema is not None else {},
            "optimizer": optimizer_tensors(t.optimizer, t.base),
            "objective": dict(t.objective.state_dict()),
        }
        t.saver.save(tensors, state, best=is_best, selected=t.best is not None, final=final)

    on_main(t.accelerator, write)


def resume(state: TrainState) -> None:
    """Go on from the newest checkpoint that verifies, if there is one."""
    checkpoint, damaged = newest_checkpoint(state.run)
    for sentence in damaged:
        state.accelerator.print(f"warning: {sentence} Going back to step {checkpoint.step if checkpoint else 0}.")
    if checkpoint is None:
        return
    _restore(state, checkpoint)
    path = state.run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    state.metrics = lines[: checkpoint.state["metrics_lines"]]
    if state.accelerator.is_main_process and len(lines) != len(state.metrics):
        write_atomically(state.run / "metrics.jsonl", "".join(line + "\n" for line in state.metrics))
    state.accelerator.print(f"resuming {state.run} from step {state.step} of {state.total_steps}")


def _restore(t: TrainState, checkpoint: Checkpoint) -> None:
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
    for sums, rows in ((t.sums, state["sums"]), (t.guard.sums, state["guard_sums"])):
        of_ranks = torch.tensor(rows, dtype=torch.float64, device=sums.device)
        if len(of_ranks) == t.accelerator.num_processes:
            sums.copy_(of_ranks[t.accelerator.process_index])
        else:  # another number of processes has saved it: the main one takes them all
            sums.copy_(of_ranks.sum(0) * t.accelerator.is_main_process)
    t.guard.load(state["guard"])
    t.step, t.best, t.validation_due = int(state["step"]), state["best"], bool(state["validation_due"])


def rewind(state: TrainState, what: str, row: dict[str, Any]) -> None:
    """Go back to the newest checkpoint from before a collapse, with a smaller learning rate.

    Args:
        what: a sentence about the collapse.
        row: of metrics.jsonl about it.

    Raises:
        UserError: no checkpoint is from before it.
    """
    spec, rewinds, scale, healthy = (
        state.recipe.guard,
        state.guard.rewinds,
        state.guard.lr_scale,
        state.guard.healthy_step,
    )
    on_main(state.accelerator, lambda: state.saver.wait() if state.saver is not None else None)
    good = [folder for folder in checkpoint_folders(state.run) if step_of(folder) <= healthy]
    if not good:
        raise UserError(f"{what} No checkpoint is from before it. {ADVICE}.")
    state.accelerator.wait_for_everyone()
    checkpoint = open_checkpoint(good[0])
    _restore(state, checkpoint)
    state.metrics = state.metrics[: checkpoint.state["metrics_lines"]]
    state.guard.rewinds, state.guard.lr_scale = rewinds + 1, scale * spec.lr_factor
    state.guard.bad_windows, state.guard.warned = 0, False
    state.accelerator.print(
        f"warning: {what} Going back to step {state.step}, with {state.guard.lr_scale:g} times the learning rate."
    )
    best = _best_left(state, checkpoint)
    if best.step != (state.best or {}).get("step"):
        state.best = None  # it was replaced, and removed, by one of the collapse's: the next validation selects anew
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        set_aside(state.run, after=state.step)
        write_pointer(state.run, "best", best, selected=state.best is not None)
        write_pointer(state.run, "last", checkpoint)
        write_atomically(state.run / "metrics.jsonl", "".join(line + "\n" for line in state.metrics))
    log(state, {**row, "rewound_to": state.step, "lr_scale": state.guard.lr_scale})
    save(state, is_best=best.step == state.step)


def _best_left(state: TrainState, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that was the best one at the time of `checkpoint`, where it is still there, else that itself."""
    step = (state.best or {}).get("step")
    for folder in checkpoint_folders(state.run):
        if step_of(folder) == step:
            return open_checkpoint(folder)
    return checkpoint
