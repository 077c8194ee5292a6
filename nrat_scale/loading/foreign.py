"""Weight files of other projects and timm's pretrained models, with their normalisation inside."""

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
from nrat_scale.core.errors import UserError, did_you_mean, first_line
from nrat_scale.loading.checks import describe_differences, expected_tensors, is_ours, our_architectures, quoted

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema", "ema_state_dict")
_CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_PREFIX = re.compile(r"(module|model|net|0|1)\.")


# ---- files of weights -----------------------------------------------------------------------------------------------

Constants = dict[str, list[list[float]]]  # "mean" and "std" -> the different ones that were found


def load_weight_file(
    path: Path, arch: str, mean: Sequence[float] | None, std: Sequence[float] | None, model_args: dict[str, Any]
) -> nn.Module:
    if path.is_dir():
        raise UserError(f"{path} is a folder; arch= is for a file of weights. A release is loaded without it.")
    if not path.is_file():
        raise UserError(f"There is no file of weights {path}.")
    state, saved = _plain(_read(path), path)
    constants = {
        name: values
        for name, given in (("mean", mean), ("std", std))
        if (values := _constant(path, name, given, saved)) is not None
    }
    arguments = {**_inferred(arch, state), **model_args}
    ours = is_ours(arch)
    if ours:
        arguments.update(constants)
    expected = expected_tensors(arch, arguments, len(state))
    found = {key: (expected.get(key, ("?", ()))[0], tuple(value.shape)) for key, value in state.items()}
    if wrong := describe_differences(expected, found):
        raise UserError(f"The weights in {path} do not fit {arch}: {wrong}.")
    model = models.create(arch, arguments)
    model.load_state_dict(state)
    return model if ours else normalised_timm(model, arch, arguments, constants.get("mean"), constants.get("std"))


def _constant(path: Path, name: str, given: Sequence[float] | None, saved: Constants) -> list[float] | None:
    """The caller's mean or std, else the one that the file holds, else None."""
    if given is not None:
        return [float(value) for value in given]
    if len(saved[name]) > 1:
        shown = " and ".join(map(str, saved[name][:3]))
        raise UserError(f"{path} holds more than one {name} of a normalisation: {shown}. Say which with {name}=.")
    return saved[name][0] if saved[name] else None


def _read(path: Path) -> Any:
    """What the file holds: tensors and plain containers only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on the pickle protocol of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is no file of weights; such a file could run code and is not opened. "
            "Save model.state_dict() alone."
        ) from error
    except Exception as error:
        # A damaged pickle makes torch raise almost anything: KeyError, IndexError, AttributeError.
        raise UserError(f"The weights {path} cannot be read: {first_line(error)}") from error


def _plain(content: Any, path: Path) -> tuple[dict[str, Tensor], Constants]:
    """(state dict with the architecture's own names, normalisation constants) from the usual wrappings."""
    found = content
    # Beside a container a training script may have saved an accuracy as a tensor, which makes it no state dict.
    if isinstance(found, dict) and not (found and all(isinstance(value, Tensor) for value in found.values())):
        inner = [name for name in _CONTAINERS if isinstance(found.get(name), dict)]
        if len(inner) != 1:
            raise UserError(
                f"{path} holds {', '.join(map(quoted, list(found)[:6])) or 'nothing'}; expected a state dict, alone or under one of "
                f"{', '.join(_CONTAINERS)}. Save the one that is meant by itself."
            )
        found = found[inner[0]]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in found.items()):
        raise UserError(f"{path} holds no state dict (names and tensors).")
    state: dict[str, Tensor] = dict(found)
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
    """num_classes and in_chans as the tensors say."""
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


# ---- timm's own models ----------------------------------------------------------------------------------------------


class NormalisedTimm(models.Normalised):
    """One of timm's models with its normalisation inside."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
        super().__init__(int(model.num_classes), in_chans, mean, std)  # type: ignore[arg-type]
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x))


def normalised_timm(model: nn.Module, arch: str, arguments: dict[str, Any], mean: Any, std: Any) -> NormalisedTimm:
    """`model` of timm's, with these constants or else those that timm has for the architecture."""
    known = timm.get_pretrained_cfg(arch)
    if known is None and (mean is None or std is None):
        raise UserError(f"timm knows no normalisation for {arch}. Give mean= and std=.")
    for name, values in (("mean", mean), ("std", std)):
        listed = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if values is not None and not listed:
            raise UserError(f"The {name} of the normalisation must be a list of numbers, not {values!r}.")
    in_chans = arguments.get("in_chans", 3 if known is None else known.input_size[0])
    if known is not None:
        mean, std = known.mean if mean is None else mean, known.std if std is None else std
    return NormalisedTimm(model, mean, std, int(in_chans))


def pretrained(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """A model of timm's with its pretrained weights, in evaluation mode: [0, 1] images [B, C, H, W] -> logits [B, K].

    Raises:
        UserError: timm has no weights of that name, or they cannot be fetched.
    """
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None or not known.has_weights:
        raise UserError(
            f"timm has no pretrained weights for '{name}'. Give a file of weights with --arch {name}, or a release."
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise UserError(f"timm's weights of '{name}' cannot be fetched: {first_line(error)}") from error
    return NormalisedTimm(model, known.mean, known.std, known.input_size[0]).eval().to(device)
