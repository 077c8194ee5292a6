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
from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.loading.checks import check_tensors, is_ours, require_known

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema", "ema_state_dict")
_CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_PREFIX = re.compile(r"(module|model|net|0|1)\.")  # of DataParallel, Lightning, a normalising Sequential

Constants = dict[str, list[list[float]]]  # "mean" and "std" -> the different values found in a file


def load_weight_file(
    path: Path, arch: str, mean: Sequence[float] | None, std: Sequence[float] | None, model_args: dict[str, Any]
) -> nn.Module:
    """The model `arch` with the weights in `path`; arguments as for `load`."""
    if not path.is_file():
        raise UserError(f"There is no weight file {path}. (A release folder is loaded without arch=.)")
    state, saved = _state_dict(_read(path), path)
    constants = {}
    for name, given in (("mean", mean), ("std", std)):
        values = saved[name] if given is None else [[float(value) for value in given]]
        if len(values) > 1:
            shown = " and ".join(map(str, values[:3]))
            raise UserError(f"{path} holds more than one {name} of a normalisation: {shown}. Choose one with {name}=.")
        if values:
            constants[name] = values[0]
    arguments = {**_inferred(arch, state), **model_args}
    if is_ours(arch):
        arguments |= constants
    check_tensors(arch, arguments, {key: (None, tuple(value.shape)) for key, value in state.items()}, str(path))
    model = models.create(arch, arguments)
    model.load_state_dict(state)
    return model if is_ours(arch) else NormalisedTimm(model, arch, arguments, **constants)


def _read(path: Path) -> Any:
    """The content of the file: tensors and plain containers only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol of files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = "it is not a weight file, or holds more than tensors and could run code"
        raise UserError(f"{path} is not opened: {problem}. Save model.state_dict() alone.") from error
    except Exception as error:  # damaged pickles make torch raise KeyError, IndexError, AttributeError and others
        raise UserError(f"The weight file {path} cannot be read: {first_line(error)}") from error


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items())


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], Constants]:
    """(state dict under the architecture's own names, normalisation constants); containers and prefixes are removed."""
    if isinstance(content, dict) and not (content and _is_state_dict(content)):
        containers = [name for name in _CONTAINERS if isinstance(content.get(name), dict)]
        if len(containers) != 1:
            keys = ", ".join(map(quoted, list(content)[:6])) or "nothing"
            known = ", ".join(_CONTAINERS)
            raise UserError(f"{path} holds {keys}; expected one state dict, alone or under one of {known}.")
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
        prefixes = {match and match[0] for match in map(_PREFIX.match, state)}
        prefix = prefixes.pop() if len(prefixes) == 1 else None
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, constants


def _inferred(arch: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """num_classes and in_chans, from the shapes of the first and the last layer."""
    require_known(arch)
    known = timm.get_pretrained_cfg(arch)
    inferred = {}
    for attribute, argument, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = getattr(known, attribute, None)
        weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis:
            inferred[argument] = int(weight.shape[axis])
    return inferred


class NormalisedTimm(models.Normalised):
    """timm's `model` for [0, 1] images; `mean` and `std` are by default those that timm lists for the architecture."""

    def __init__(
        self, model: nn.Module, arch: str, arguments: dict[str, Any], mean: Any = None, std: Any = None
    ) -> None:
        known = timm.get_pretrained_cfg(arch)
        constants = {name: getattr(known, name, None) if v is None else v for name, v in (("mean", mean), ("std", std))}
        if None in constants.values():
            raise UserError(f"timm knows no normalisation for {arch}. Give mean= and std=.")
        for name, values in constants.items():
            if not isinstance(values, list | tuple) or not all(isinstance(value, int | float) for value in values):
                raise UserError(f"The {name} of the normalisation must be a list of numbers, not {quoted(values)}.")
        in_chans = arguments.get("in_chans", 3 if known is None else known.input_size[0])
        super().__init__(int(model.num_classes), int(in_chans), **constants)  # type: ignore[arg-type]
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x))

    # timm's interface is that of the model inside.

    @property
    def num_features(self) -> int:
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def head_hidden_size(self) -> int:
        return int(getattr(self.model, "head_hidden_size", self.num_features))  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.model.forward_features(self.normalise(x))  # type: ignore[operator]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(x, pre_logits=pre_logits)  # type: ignore[operator]

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.model.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))  # type: ignore[operator]
        self.num_classes = num_classes


def pretrained(name: str) -> nn.Module:
    """A timm model with its pretrained weights, in evaluation mode: [0, 1] images [B, C, H, W] -> logits [B, K].

    Raises:
        UserError: timm has no weights of that name, or they cannot be downloaded.
    """
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None or not known.has_weights:
        raise UserError(f"timm has no weights of '{name}'. Give a weight file with --arch {name}, or a release.")
    try:
        model = timm.create_model(name, pretrained=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise UserError(f"timm's weights of '{name}' cannot be fetched: {first_line(error)}") from error
    return NormalisedTimm(model, name, {}).eval()
