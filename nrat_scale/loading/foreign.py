"""Weight files of other projects and timm's pretrained models, with their normalisation inside the model."""

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from nrat_scale import models
from nrat_scale.core.errors import UserError, did_you_mean, first_line, quoted
from nrat_scale.loading.checks import check_tensors, is_ours, our_architectures

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema", "ema_state_dict")
_CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_PREFIX = re.compile(r"(module|model|net|0|1)\.")  # of DataParallel, Lightning, a normalising Sequential

Constants = dict[str, list[list[float]]]  # "mean" and "std" -> the different values found in a file


# ---- weight files ---------------------------------------------------------------------------------------------------


def load_weight_file(
    path: Path, arch: str, mean: Sequence[float] | None, std: Sequence[float] | None, model_args: dict[str, Any]
) -> nn.Module:
    """The model `arch` with the weights in `path`; arguments as for `load`."""
    if path.is_dir():
        raise UserError(f"arch= needs a weight file; {path} is a folder. A release is loaded without arch=.")
    if not path.is_file():
        raise UserError(f"There is no weight file {path}.")
    state, saved = _state_dict(_read(path), path)
    constants = {
        name: values
        for name, given in (("mean", mean), ("std", std))
        if (values := _constant(path, name, given, saved[name])) is not None
    }
    arguments = {**_inferred(arch, state), **model_args}
    ours = is_ours(arch)
    if ours:
        arguments.update(constants)
    check_tensors(arch, arguments, {key: (None, tuple(value.shape)) for key, value in state.items()}, str(path))
    model = models.create(arch, arguments)
    model.load_state_dict(state)
    return model if ours else normalised_timm(model, arch, arguments, constants.get("mean"), constants.get("std"))


def _constant(path: Path, name: str, given: Sequence[float] | None, saved: list[list[float]]) -> list[float] | None:
    """The caller's mean or std, else the one in the file, else None."""
    if given is not None:
        return [float(value) for value in given]
    if len(saved) > 1:
        shown = " and ".join(map(str, saved[:3]))
        raise UserError(f"{path} holds more than one {name} of a normalisation: {shown}. Choose one with {name}=.")
    return saved[0] if saved else None


def _read(path: Path) -> Any:
    """The content of the file: tensors and plain containers only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol of files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is not a weight file; such a file could run code and is not opened. "
            "Save model.state_dict() alone."
        ) from error
    except Exception as error:
        # Damaged pickles make torch raise KeyError, IndexError, AttributeError and others.
        raise UserError(f"The weight file {path} cannot be read: {first_line(error)}") from error


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items())


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], Constants]:
    """(state dict with the architecture's own names, normalisation constants), without containers and prefixes."""
    # A container may lie beside tensors, such as an accuracy, so that not every value is a container.
    if isinstance(content, dict) and not (content and _is_state_dict(content)):
        containers = [name for name in _CONTAINERS if isinstance(content.get(name), dict)]
        if len(containers) != 1:
            raise UserError(
                f"{path} holds {', '.join(map(quoted, list(content)[:6])) or 'nothing'}; expected a state dict, alone or under "
                f"one of {', '.join(_CONTAINERS)}. Save the right one by itself."
            )
        content = content[containers[0]]
    if not _is_state_dict(content):
        raise UserError(f"{path} holds no state dict (names and tensors).")
    state: dict[str, Tensor] = dict(content)
    constants: Constants = {"mean": [], "std": []}
    while state:
        for name in list(state):
            kind = _CONSTANTS.get(name.rpartition(".")[2])
            if kind is not None and state[name].numel() <= 4 and not name.startswith(("layer", "block")):
                values = state.pop(name).flatten().double().tolist()
                if values not in constants[kind]:
                    constants[kind].append(values)
        prefixes = {match[0] if (match := _PREFIX.match(name)) else "" for name in state}
        if len(prefixes) != 1 or prefixes == {""}:
            break
        (prefix,) = prefixes
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, constants


def _inferred(arch: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """num_classes and in_chans, from the shapes of the first and the last layer."""
    if not timm.is_model(arch):
        raise UserError(
            f"Unknown architecture '{arch}'. {did_you_mean(arch, our_architectures())} Any timm model can be used."
        )
    known = timm.get_pretrained_cfg(arch)
    inferred: dict[str, Any] = {}
    for attribute, argument, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = getattr(known, attribute, None)
        weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis:
            inferred[argument] = int(weight.shape[axis])
    return inferred


# ---- timm's models --------------------------------------------------------------------------------------------------


class NormalisedTimm(models.Normalised):
    """A timm model with its normalisation inside."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
        super().__init__(int(model.num_classes), in_chans, mean, std)  # type: ignore[arg-type]
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x))


def normalised_timm(model: nn.Module, arch: str, arguments: dict[str, Any], mean: Any, std: Any) -> NormalisedTimm:
    """timm's `model` with these constants, by default those that timm lists for the architecture."""
    known = timm.get_pretrained_cfg(arch)
    if known is None and (mean is None or std is None):
        raise UserError(f"timm knows no normalisation for {arch}. Give mean= and std=.")
    for name, values in (("mean", mean), ("std", std)):
        listed = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if values is not None and not listed:
            raise UserError(f"The {name} of the normalisation must be a list of numbers, not {quoted(values)}.")
    in_chans = arguments.get("in_chans", 3 if known is None else known.input_size[0])
    if known is not None:
        mean, std = known.mean if mean is None else mean, known.std if std is None else std
    return NormalisedTimm(model, mean, std, int(in_chans))


def pretrained(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """A timm model with its pretrained weights, in evaluation mode: [0, 1] images [B, C, H, W] -> logits [B, K].

    Raises:
        UserError: timm has no weights of that name, or they cannot be downloaded.
    """
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None or not known.has_weights:
        raise UserError(
            f"timm has no pretrained weights for '{name}'. Give a weight file with --arch {name}, or a release."
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise UserError(f"timm's weights of '{name}' cannot be fetched: {first_line(error)}") from error
    return NormalisedTimm(model, known.mean, known.std, known.input_size[0]).eval().to(device)
