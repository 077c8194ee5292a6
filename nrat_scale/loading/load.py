"""Trained weights from anywhere: releases (here or on the Hub), files as RobustBench has them, timm's own.

Of a release only safetensors and JSON are read, the architecture is built here from its configuration, and names, types, shapes
and sizes are compared before anything is allocated: a file from a stranger can be wrong, but it cannot run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nrat_scale import models
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.loading.checks import (
    describe_differences,
    expected_tensors,
    is_ours,
    read_configuration,
    read_safetensors_header,
)
from nrat_scale.loading.foreign import load_weight_file, normalised_timm
from nrat_scale.loading.release_folder import CONFIG, WEIGHTS, resolve


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **model_args: Any,
) -> nn.Module:
    """A trained model in evaluation mode: [0, 1] images [B, C, H, W] -> logits [B, K].

    Args:
        source: a release folder; `user/repo` or `user/repo@revision` on the Hugging Face Hub; or, with `arch`, a file of
            weights (`.pt` and the like, read with `weights_only=True`, or `.safetensors`).
        device: where to put it.
        arch: of a file of weights: a model that timm knows, such as `wrn28_10_silu`.
        mean, std: normalisation of a file of weights: by default what the file holds, else the architecture's.
        model_args: further arguments of the architecture, such as `width=64`.

    Raises:
        UserError: there is nothing of that name, it cannot be reached, or its parts do not fit together.
    """
    if arch is not None:
        model = load_weight_file(Path(source), arch, mean, std, model_args)
    elif Path(source).is_file():
        raise UserError(f"{source} is a file of weights: say of which model, such as arch='wrn28_10_silu'.")
    elif mean is not None or std is not None or model_args:
        raise UserError(
            "mean, std and other arguments describe a file of weights and need arch=; a release has its own."
        )
    else:
        folder = resolve(source)
        try:
            model = _from_release(folder)
        except UserError as error:
            raise UserError(f"The release {source} cannot be loaded: {error}") from error
    return model.eval().to(device)


def _from_release(folder: Path) -> nn.Module:
    name, arguments, constants = read_configuration(folder / CONFIG)
    found = read_safetensors_header(folder / WEIGHTS)
    if wrong := describe_differences(expected_tensors(name, arguments, len(found)), found):
        raise UserError(f"{WEIGHTS} does not fit the architecture {name}: {wrong}.")
    model = models.create(name, arguments)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"{WEIGHTS} cannot be read: {first_line(error)}") from error
    return (
        model if is_ours(name) else normalised_timm(model, name, arguments, constants.get("mean"), constants.get("std"))
    )
