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
    model, held_out = state.evaluated, state.validation
    training = model.training
    rows = np.arange(state.accelerator.process_index, len(held_out.labels), state.accelerator.num_processes)
    images = Images(held_out.images, held_out.labels, np.arange(len(held_out.labels))).take(rows)
    attack = state.recipe.train.validation_attack
    counts = [len(rows)]
    model.eval()
    try:
        with uncompiled(model), state.accelerator.autocast():
            for name in ("natural", attack):
                given, clean = _outcomes(state, name, model, images, rows)
                counts += [int(given.sum()), int(clean.sum())]
    except Interrupted:
        counts = [0] * 5
    model.train(training)
    counts.append(int(bool(state.signals)))
    total = state.accelerator.reduce(torch.tensor(counts, device=state.accelerator.device), "sum").tolist()
    if total[5]:
        return None
    n = total[0]

    def record(correct: int) -> dict[str, Any]:
        return {"correct": correct, "n": n, "accuracy": correct / n}

    known = held_out.clean_labels is not None
    return {
        "kind": "validation",
        "epoch": -(-state.step // state.data.steps_per_epoch),
        "step": state.step,
        "attack": attack,
        "labels": state.recipe.data.validation.labels,
        "natural": record(total[1]),
        "robust": record(total[3]),
        "natural_clean": record(total[2]) if known else None,
        "robust_clean": record(total[4]) if known else None,
    }


def _outcomes(
    state: TrainState, attack: str, model: nn.Module, images: Images, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes bool [m] of the images `rows` for the labels used, and for the clean ones (all false if unknown).

    An attack depends on its label, so it is repeated for the images whose clean label differs.
    """
    if state.recipe.precision == "fp64":
        model = _Float64(model)
    options: dict[str, Any] = {"seed": state.recipe.seed, "batch_size": 256, "stopped": lambda: bool(state.signals)}
    outcome = correct_under(attack, model, images, state.recipe.threat, **options)
    if state.validation.clean_labels is None:
        return outcome, np.zeros(len(outcome), bool)
    clean_labels = state.validation.clean_labels[torch.from_numpy(rows)]
    differ = np.flatnonzero(clean_labels.ne(images.labels).numpy())
    clean = outcome.copy()
    if len(differ):
        subset = dataclasses.replace(images, labels=clean_labels).take(differ)
        clean[differ] = correct_under(attack, model, subset, state.recipe.threat, **options)
    return outcome, clean


class _Float64(nn.Module):
    """Runs a float64 model on float32 images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        for name in ("mean", "std"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double())
