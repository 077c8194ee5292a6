"""Validation: natural and robust accuracy on the held-out images, which selects the best checkpoint."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from nrat_scale.attacks import evaluation_threat
from nrat_scale.core.errors import warn
from nrat_scale.core.float32 import exact_float32
from nrat_scale.core.memory import ran_out_of_memory
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.attacks import ATTACKS, Block, parse_attack
from nrat_scale.evaluate.measures import Images, Interrupted, correct_under
from nrat_scale.train.state import TrainState

_EXAMPLES = 4  # adversarial images for the trackers
_BLOCK_SIZES = (256, 64, 16)  # images at once; smaller if memory does not suffice, as noise belongs to the image


def validate(state: TrainState) -> dict[str, Any] | None:
    """Natural and robust accuracy on the held-out images, split over ranks: a row of metrics.jsonl.

    None on all ranks if one of them received a signal to stop; the resumed run validates again.
    """
    model, held_out = state.base if state.ema is None else state.ema.module, state.validation
    attack, dtype = state.recipe.train.validation_attack, next(model.parameters()).dtype
    rows = np.arange(state.accelerator.process_index, len(held_out.labels), state.accelerator.num_processes)
    images = Images(held_out.images, held_out.labels, np.arange(len(held_out.labels))).take(rows)
    counts = [len(rows)]
    training, compiled = model.training, model._compiled_call_impl
    model._compiled_call_impl = None  # other batch sizes and modes would each compile one more graph
    # The images are float32 under fp64, too.
    cast = model.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    model.eval()
    try:
        with exact_float32():  # also under bf16, where near ties change half a percent of the predictions
            for name in ("natural", attack):
                counts += _correct(state, name, model, images, rows)
            _show_examples(state, attack, model)
    except Interrupted:
        counts = [0] * 5
    cast.remove()
    model.train(training)
    model._compiled_call_impl = compiled
    counts.append(int(state.signals.received != 0))
    total = state.accelerator.reduce(torch.tensor(counts, device=state.accelerator.device), "sum").tolist()
    if total[5]:
        return None
    natural, natural_clean, robust, robust_clean = (
        {"correct": correct, "n": total[0], "accuracy": correct / total[0]} for correct in total[1:5]
    )
    known = held_out.clean_labels is not None
    return {
        "kind": "validation",
        "epoch": -(-state.step // state.data.steps_per_epoch),
        "step": state.step,
        "attack": attack,
        "labels": state.recipe.data.validation.labels,
        "natural": natural,
        "robust": robust,
        "natural_clean": natural_clean if known else None,
        "robust_clean": robust_clean if known else None,
    }


def _correct(state: TrainState, attack: str, model: nn.Module, images: Images, rows: np.ndarray) -> list[int]:
    """How many of the images `rows` are correct for the labels used, and for the clean ones (0 if unknown).

    An attack depends on its label, so it is repeated for the images whose clean label differs.
    """
    given = _outcomes(state, attack, model, images)
    if state.validation.clean_labels is None:
        return [int(given.sum()), 0]
    clean_labels = state.validation.clean_labels[torch.from_numpy(rows)]
    differ = clean_labels.ne(images.labels).numpy()
    subset = dataclasses.replace(images, labels=clean_labels).take(np.flatnonzero(differ))
    again = _outcomes(state, attack, model, subset)
    return [int(given.sum()), int(given[~differ].sum() + again.sum())]


def _show_examples(state: TrainState, name: str, model: nn.Module) -> None:
    """Send the first held-out images and their adversarial versions, rows of pairs, to the trackers of the main process."""
    if not state.trackers:
        return
    attack, held_out = parse_attack(name), state.validation
    device = next(model.parameters()).device
    x, y = to_float(held_out.images[:_EXAMPLES].to(device)), held_out.labels[:_EXAMPLES].to(device)
    perturb = ATTACKS[attack.kind].perturb
    assert perturb is not None, "train.validation_attack is pgdN or cwN"
    try:
        block = Block(model, x, y, np.arange(len(x)), evaluation_threat(state.recipe.threat), state.recipe.seed)
        pairs = torch.cat([x, perturb(attack, block).to(x)], dim=3)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return
    pixels = (255 * pairs.detach()).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    state.trackers.images("validation/natural_and_adversarial", pixels, state.step)


def _outcomes(state: TrainState, attack: str, model: nn.Module, images: Images) -> np.ndarray:
    """`correct_under`, in smaller blocks if memory does not suffice."""
    options: dict[str, Any] = {"seed": state.recipe.seed, "stopped": lambda: state.signals.received != 0}
    (*larger, smallest), threat = _BLOCK_SIZES, evaluation_threat(state.recipe.threat)
    for size in larger:
        try:
            return correct_under(attack, model, images, threat, batch_size=size, **options)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
        warn(f"{size} validation images at once do not fit into memory: validating with fewer.")
    return correct_under(attack, model, images, threat, batch_size=smallest, **options)
