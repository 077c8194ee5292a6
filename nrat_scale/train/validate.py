"""Validation: natural and robust accuracy on the held-out images, which selects the best checkpoint."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.evaluate.measures import Images, Interrupted, correct_under
from nrat_scale.train.compile import uncompiled
from nrat_scale.train.state import TrainState


def validate(state: TrainState) -> dict[str, Any] | None:
    """Natural and robust accuracy on the held-out images, split over ranks: a row of metrics.jsonl.

    None on all ranks if one of them received a signal to stop; the resumed run validates again.
    """
    model, held_out = state.base if state.ema is None else state.ema.module, state.validation
    training, attack = model.training, state.recipe.train.validation_attack
    rows = np.arange(state.accelerator.process_index, len(held_out.labels), state.accelerator.num_processes)
    images = Images(held_out.images, held_out.labels, np.arange(len(held_out.labels))).take(rows)
    counts = [len(rows)]
    model.eval()
    try:
        with uncompiled(model), state.accelerator.autocast():
            for name in ("natural", attack):
                counts += _correct(state, name, model, images, rows)
    except Interrupted:
        counts = [0] * 5
    model.train(training)
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
    if state.recipe.precision == "fp64":
        model = _Float64(model)
    options: dict[str, Any] = {"seed": state.recipe.seed, "stopped": lambda: state.signals.received != 0}
    given = correct_under(attack, model, images, state.recipe.threat, **options)
    if state.validation.clean_labels is None:
        return [int(given.sum()), 0]
    clean_labels = state.validation.clean_labels[torch.from_numpy(rows)]
    differ = clean_labels.ne(images.labels).numpy()
    subset = dataclasses.replace(images, labels=clean_labels).take(np.flatnonzero(differ))
    again = correct_under(attack, model, subset, state.recipe.threat, **options)
    return [int(given.sum()), int(given[~differ].sum() + again.sum())]


class _Float64(nn.Module):
    """Runs a float64 model on float32 images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, getattr(model, "mean", None), getattr(model, "std", None)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double())
