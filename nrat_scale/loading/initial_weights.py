"""Weights that a run starts from (`model.init`): a release, a weight file, or timm's pretrained weights.

Tensors are taken by name and shape; a head of another size keeps its random weights.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_arch_name
from torch import Tensor, nn

from nrat_scale import models
from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.core.files import sha256_of
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.loading.checks import read_configuration
from nrat_scale.loading.foreign import pretrained, read_weights, select_weights
from nrat_scale.loading.release_folder import CONFIG, WEIGHTS, resolve
from nrat_scale.loading.weight_sets import UNUSED_BATCH_COUNT

TIMM = "timm"
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
_NOT_OF_THE_WEIGHTS = ("num_classes", "mean", "std", "drop_rate", "drop_path_rate")


@dataclass(frozen=True)
class InitialWeights:
    """Weights for the start of a run."""

    source: str  # `model.init`
    sha256: str  # of the file; of timm's weights, of their tensors
    state: dict[str, Tensor]
    constants: dict[str, list[float]]  # mean and std of the normalisation that the weights were trained with, if known


def find_initial_weights(spec: models.ModelSpec, arguments: dict[str, Any]) -> InitialWeights:
    """The weights that `spec.init` names; `arguments` are those of the model that will take them.

    Raises:
        UserError: there are no such weights, or they cannot be read.
    """
    source = spec.init
    assert source is not None
    path = Path(source)
    if spec.init_key is not None and not path.is_file():
        raise UserError(f"model.init_key chooses a set of weights in a file; model.init {quoted(source)} is none.")
    if source == TIMM or source.startswith(f"{TIMM}:"):
        return _of_timm(source, spec.name, arguments)
    if path.is_file():
        content = read_weights(path)
        own = {key: value for key, value in arguments.items() if key not in ("mean", "std")}
        state, constants = select_weights(content, path, spec.name, own, spec.init_key)
        known = {key: values[0] for key, values in constants.items() if len(values) == 1}
        return InitialWeights(source, sha256_of(path), state, known if len(known) == 2 else {})
    if RunFolder(path).is_run:
        file = RunFolder(path).checkpoints / "step-XXXXXXXX" / "model.safetensors"
        raise UserError(
            f"model.init {quoted(source)} is a run. Give a release of it, or one of its weight files: {file}."
        )
    if path.suffix in _FILES:
        raise UserError(f"There is no weight file {source} (model.init).")
    folder = resolve(source)
    _, given = read_configuration(folder / CONFIG)
    known = {key: list(given[key]) for key in ("mean", "std") if isinstance(given.get(key), list | tuple)}
    try:
        state = load_file(folder / WEIGHTS)
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"model.init {quoted(source)} cannot be read: {first_line(error)}") from error
    return InitialWeights(source, sha256_of(folder / WEIGHTS), state, known if len(known) == 2 else {})


def _of_timm(source: str, name: str, arguments: dict[str, Any]) -> InitialWeights:
    """`timm` (the default weights of the model itself) or `timm:NAME`; timm adapts them to other sizes and channels."""
    weights = source.partition(":")[2] or name
    same = not models.is_own(name) and get_arch_name(weights) == get_arch_name(name)
    kept = {key: value for key, value in arguments.items() if key not in _NOT_OF_THE_WEIGHTS} if same else {}
    model = pretrained(weights, **kept)
    state = dict(model.state_dict())
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    constants = {key: getattr(model, key).flatten().tolist() for key in ("mean", "std")}
    return InitialWeights(source, digest.hexdigest(), state, constants)


def load_initial_weights(model: nn.Module, name: str, initial: InitialWeights) -> dict[str, Any]:
    """Copy the tensors of `initial` that fit into `model`; returns the record for model.json.

    Raises:
        UserError: fewer than half of the model's tensors are among them.
    """
    target = model.state_dict()
    counted = [key for key in target if not key.endswith(UNUSED_BATCH_COUNT)]
    fitting = {key: value for key, value in initial.state.items() if key in target and _fits(value, target[key])}
    missing = {key: _problem(key, target[key], initial.state) for key in counted if key not in fitting}
    loaded = len(counted) - len(missing)
    shown = "; ".join(list(missing.values())[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if loaded * 2 < len(counted):
        raise UserError(
            f"model.init {quoted(initial.source)} fits only {loaded} of the {len(counted)} tensors of {name}: {shown}. "
            "Are they weights of another architecture, or is model.kwargs another?"
        )
    with torch.no_grad():
        for key, value in fitting.items():
            target[key].copy_(value)
    return {
        "source": initial.source,
        "sha256": initial.sha256,
        "num_loaded": loaded,
        "num_tensors": len(counted),
        "not_loaded": list(missing),
        "reasons": list(missing.values()),
        "unused": [key for key in initial.state if key not in target and not key.endswith(UNUSED_BATCH_COUNT)],
    }


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.shape == target.shape and value.is_floating_point() == target.is_floating_point()


def _problem(key: str, target: Tensor, state: Mapping[str, Tensor]) -> str:
    if key not in state:
        return f"{key} is missing"
    return f"{key} has shape {list(state[key].shape)} instead of {list(target.shape)}"


def described(record: Mapping[str, Any]) -> str:
    """What was loaded and what was not, in a sentence."""
    text = f"initial weights: {record['num_loaded']} of {record['num_tensors']} tensors of {record['source']}"
    reasons, unused = list(record["reasons"]), list(record["unused"])
    if reasons:
        text += f"; not loaded, random: {'; '.join(reasons[:4])}" + (
            f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        )
    if unused:
        text += f"; not used: {', '.join(map(quoted, unused[:3]))}" + (
            f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        )
    return text
