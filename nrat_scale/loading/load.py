"""Load trained weights: a release (a folder or on the Hub), or a weight file in RobustBench's layout.

Only safetensors and JSON are read from a release, and none of its code is run: the architecture is built from its configuration.
Names, types, shapes and sizes are checked before anything is allocated.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nrat_scale import models
from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.loading.checks import (
    check_tensors,
    compare_tensors,
    read_configuration,
    read_safetensors_header,
    require_buildable,
)
from nrat_scale.loading.foreign import load_weight_file
from nrat_scale.loading.release_folder import CONFIG, WEIGHTS, resolve


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights_key: str | None = None,
    model: Callable[..., nn.Module] | None = None,
    **model_args: Any,
) -> nn.Module:
    """A trained model in evaluation mode: [0, 1] images [B, C, H, W] -> logits [B, K].

    Args:
        source: a release folder; `user/repo` or `user/repo@revision` on the Hugging Face Hub; or, with `arch`, a weight file
            (`.pt` and the like, read with `weights_only=True`, or `.safetensors`).
        device: where to put the model.
        arch: architecture of a weight file: a model that timm knows, such as `wrn28_10_silu`, or `package.module:factory`.
        mean, std: normalisation of a weight file (default: the constants in the file, else those of the architecture).
        weights_key: of a weight file with several sets of weights, such as raw ones and their average, that to load: what
            precedes the names, such as `ema`, `state_dict.teacher`, or `.` for nothing.
        model: the class, or a function that makes the model, of a release whose model is the user's own code.
        model_args: further arguments of the architecture, such as `width=64`.

    Raises:
        UserError: there is nothing of that name, it cannot be reached, or its parts do not fit together.
    """
    path = Path(source)
    if model is not None and (arch is not None or path.is_file()):
        raise UserError(
            "model= is for a release. Of a weight file give arch='package.module:factory', or a registered name."
        )
    if model is not None and (isinstance(model, nn.Module) or not callable(model)):
        raise UserError(f"model= takes the class of the model, or a function that makes it, not {quoted(model)}.")
    if arch is not None:
        loaded = load_weight_file(path, arch, mean, std, weights_key, model_args)
    elif path.is_file():
        raise UserError(f"{source} is a weight file: name its model with arch=, such as arch='wrn28_10_silu'.")
    elif mean is not None or std is not None or weights_key is not None or model_args:
        raise UserError(
            "mean, std, weights_key and other arguments describe a weight file and need arch=; a release has its own."
        )
    else:
        folder = resolve(source)
        try:
            loaded = _from_release(folder, model)
        except UserError as error:
            raise UserError(f"The release {source} cannot be loaded: {error}") from error
    return loaded.eval().to(device)


def _from_release(folder: Path, factory: Callable[..., nn.Module] | None) -> nn.Module:
    name, arguments = read_configuration(folder / CONFIG)
    found = read_safetensors_header(folder / WEIGHTS)
    if factory is None:
        require_buildable(name)
        check_tensors(name, arguments, found, WEIGHTS)
        model = models.create(name, arguments)
    else:
        model = models.build_own(name, factory, arguments)
        compare_tensors(model.state_dict(), found, WEIGHTS, name)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"{WEIGHTS} cannot be read: {first_line(error)}") from error
    return model
