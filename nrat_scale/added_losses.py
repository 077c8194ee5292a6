"""Losses, divergences and presets that users add to `LOSSES`, `DIVERGENCES` and `OBJECTIVES`: docs/your_loss.md."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.imports import location, reason
from nrat_scale.losses import DIVERGENCES, LOSSES, PUBLISHED
from nrat_scale.presets import OBJECTIVES, ObjectiveSpec


def stand_in(objective: dict[str, Any]) -> None:
    """Let the raw section `objective` of a stored recipe be read without the code that adds its losses and its preset.

    Names that this process does not know get entries that raise `UserError` when they are computed; the code itself, if it is
    imported later, replaces them.
    """
    name, loss, divergence, inner = (objective.get(key) for key in ("name", "loss", "divergence", "inner"))
    if not all(isinstance(value, str) for value in (name, loss, inner)):
        return  # not a resolved recipe
    LOSSES.setdefault(str(loss), _absent(str(loss)))
    if divergence:
        DIVERGENCES.setdefault(str(divergence), _absent(str(divergence)))
    if inner not in DIVERGENCES:
        LOSSES.setdefault(str(inner), _absent(str(inner)))
    if name not in OBJECTIVES:  # the family is not stored: one that has such a divergence and such an inner loss
        family = "trades" if divergence else "mart" if inner in DIVERGENCES else "at"
        lam = 1.0 if divergence == "ikl" else 0.0
        OBJECTIVES[str(name)] = ObjectiveSpec(str(name), family, str(loss), str(divergence or ""), lam, str(inner))


def _absent(name: str) -> Callable[..., Tensor]:
    """The entry of `LOSSES` or `DIVERGENCES` for a function whose code is not imported."""

    def compute(*arguments: Any, **constants: Any) -> Tensor:
        raise UserError(f"'{name}' is not a loss of nrat_scale. Import the module that adds it: imports=[MODULE].")

    return compute


def check_added(spec: ObjectiveSpec, num_classes: int | None = None) -> None:
    """Try the losses that users have added on three images, so that a wrong signature or shape is a sentence.

    Raises:
        UserError: one fails, or does not return one differentiable loss per image.
    """
    k = num_classes or 10
    logits = torch.linspace(-1, 1, 3 * k).reshape(3, k)
    y = torch.arange(3) % k
    used = {
        "LOSSES": {spec.loss, spec.inner} & LOSSES.keys(),
        "DIVERGENCES": {spec.divergence, spec.inner} & DIVERGENCES.keys(),
    }
    for table, names in used.items():
        for name in sorted(names - PUBLISHED):
            z = logits.clone().requires_grad_(True)
            usage = "f(logits, y, smoothing=0.0)" if table == "LOSSES" else "f(logits, logits_adv, y=None)"
            try:
                with torch.enable_grad():
                    found = LOSSES[name](z, y, 0.0) if table == "LOSSES" else DIVERGENCES[name](logits.flip(1), z, y)
                if not isinstance(found, Tensor) or list(found.shape) != [3]:
                    shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
                    raise UserError(
                        f"it gives {shape} for 3 images; it must give one loss per image, [3], without a mean"
                    )
                if not found.requires_grad:
                    raise UserError("its loss has no gradient with respect to the logits")
            except Exception as error:  # the user's code may raise anything
                what = first_line(error) if isinstance(error, UserError) else f"{reason(error)}{location(error)}"
                raise UserError(f"{table}['{name}'] cannot be used: {what}. It is called as {usage}.") from error
