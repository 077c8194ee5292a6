"""Weight files of other projects and timm's pretrained models, with their normalisation inside the model."""

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from nrat_scale import models
from nrat_scale.core.errors import UserError, first_line, quoted, warn
from nrat_scale.datasets import DATASETS
from nrat_scale.loading.checks import check_tensors, expected_tensors, is_ours, require_known, type_name
from nrat_scale.loading.file_kind import TRUNCATED, is_cut_pickle, is_safetensors, pickled_object, recognise
from nrat_scale.loading.weight_sets import UNUSED_BATCH_COUNT, Constants, choose, find_sets, flatten, left_over

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST"}


def load_weight_file(
    path: Path,
    arch: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    weights_key: str | None,
    model_args: dict[str, Any],
) -> nn.Module:
    """The model `arch` with the weights in `path`; arguments as for `load`."""
    if not path.is_file():
        raise UserError(f"There is no weight file {path}. (A release folder is loaded without arch=.)")
    require_known(arch)
    state, saved = _state_dict(_read(path), path, arch, model_args, weights_key)
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
    described = {
        key: (None if key.endswith(UNUSED_BATCH_COUNT) else type_name(value.dtype), tuple(value.shape))
        for key, value in state.items()
    }
    check_tensors(arch, arguments, described, str(path))
    model = models.create(arch, arguments)
    model.load_state_dict(state)
    whole = model if is_ours(arch) else NormalisedTimm(model, arch, arguments, **constants)
    missing = [
        name for name in ("mean", "std") if name not in constants and isinstance(getattr(whole, name, None), Tensor)
    ]
    if missing:
        whole.assumed_normalisation = normalisation_text(whole)  # type: ignore[assignment]
        options = f"{' and '.join(f'{name}=' for name in missing)} ({', '.join(f'--{name}' for name in missing)})"
        warn(
            f"{path} has no normalisation: {whole.assumed_normalisation}, assumed. If it was trained with another, give {options}."
        )
    return whole


def normalisation_text(model: nn.Module) -> str:
    """`CIFAR-10 mean/std`, or the values if they are of no data set that we know."""
    mean, std = (getattr(model, name).flatten().tolist() for name in ("mean", "std"))
    known = {_TITLES.get(name, name): (facts.mean, facts.std) for name, facts in DATASETS.items()}
    known |= {"ImageNet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)}
    for title, constants in known.items():
        wanted = [value for values in constants for value in (values * len(mean) if len(values) == 1 else values)]
        if len(wanted) == 2 * len(mean) and all(abs(a - b) < 1e-4 for a, b in zip(wanted, [*mean, *std], strict=True)):
            return f"{title} mean/std"
    texts = (",".join(f"{value:.4g}" for value in dict.fromkeys(values)) for values in (mean, std))
    return "mean {}, std {}".format(*texts)


def _read(path: Path) -> Any:
    """The content of the file, whose format its first bytes tell: tensors and plain containers only."""
    try:
        if what := recognise(path):
            raise UserError(f"{path} {what}.")
        with path.open("rb") as file:
            if is_safetensors(file.read(9)):
                return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol of files that it then refuses
            with path.open("rb") as file:  # by its name, torch would take a file for another format
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(_refused_pickle(path, error)) from error
    except Exception as error:  # damaged pickles make torch raise KeyError, IndexError, AttributeError and others
        reason = first_line(error).rstrip(".")
        if (
            isinstance(error, EOFError)
            or re.search(r"unexpected EOF|Ran out of input|truncated", reason)
            or is_cut_pickle(path)
        ):
            raise UserError(f"{path} {TRUNCATED}") from error
        raise UserError(f"The weight file {path} cannot be read: {reason}.") from error


def _refused_pickle(path: Path, error: pickle.UnpicklingError) -> str:
    """Why a pickle is not opened: a whole model, an object beside the tensors, or no pickle of torch's."""
    if is_cut_pickle(path):
        return f"{path} {TRUNCATED}"
    if whole := pickled_object(path):
        what = f"is a pickle of a whole model or another object ({quoted(whole)}), which could run code"
        return f"{path} {what} and is not opened. Save model.state_dict() alone."
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"{quoted(named[1])} beside the tensors" if named else "more than tensors"
    problem = f"it is not a weight file, or holds {what} and could run code"
    return f"{path} is not opened: {problem}. Save model.state_dict() alone."


def _state_dict(
    content: Any, path: Path, arch: str, model_args: dict[str, Any], weights_key: str | None
) -> tuple[dict[str, Tensor], Constants]:
    """(state dict under the architecture's own names, normalisation constants) of the one set of weights that is meant."""
    try:
        expected, parameters = expected_tensors(arch, model_args, len(flatten(content)))
        saved = flatten(content, (parameters, expected))
        sets = find_sets(saved, expected)
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    if not sets:
        keys = ", ".join(map(quoted, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        missing = next(name for name in expected if name not in saved)
        names = f", but has {', '.join(map(quoted, list(saved)[:3]))}" if saved else ""
        wanted = f"expected one state dict of {arch}: {quoted(missing)} is missing, as most of its tensors are{names}"
        raise UserError(f"{path} holds {keys or 'nothing'}; {wanted}.")
    chosen = choose(sets, weights_key, saved, str(path))
    more, constants = left_over(saved, chosen, sets)
    inside = [name for name in more if not chosen.path or name.startswith(f"{chosen.path}.")]
    if weights_key is None and len(inside) < len(more):
        where = f"{path} holds weights of {arch} under {quoted(chosen.path)}, and beside them"
        other = quoted(next(name for name in more if name not in inside))
        key = f"weights_key={chosen.path!r} (--weights-key)"
        raise UserError(f"{where} {other}, which is not part of it. {key} leaves out what is not under it.")
    state = {name: saved[found].tensor for name, found in chosen.names.items()}
    state |= {name.removeprefix(f"{chosen.path}."): saved[name].tensor for name in inside}
    if not any(name.endswith(UNUSED_BATCH_COUNT) for name in state):
        state |= {name: torch.tensor(0) for name in expected if name.endswith(UNUSED_BATCH_COUNT)}
    return state, constants


def _inferred(arch: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """num_classes and in_chans, from the shapes of the first and the last layer."""
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
        return int(getattr(self.model, "head_hidden_size", self.num_features))

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
