"""Weight files of other projects and timm's pretrained models, with their normalisation inside the model."""

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from nrat_scale.loading.checks import check_tensors, expected_tensors, require_known, type_name
from nrat_scale.loading.file_kind import TRUNCATED, is_cut_pickle, is_safetensors, pickled_object, recognise
from nrat_scale.loading.weight_sets import (
    UNUSED_BATCH_COUNT,
    Constants,
    choose,
    few_averaged,
    find_sets,
    flatten,
    hidden_sets,
    left_over,
)

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST"}

# architecture -> a tensor that only some of its files have -> the argument for them
_OPTIONAL = {
    "wrn34_10": {"sub_block1.layer.0.conv1.weight": "sub_block1"},
    "preact_resnet18": {"bn.weight": "bn_before_fc"},
}


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
    if not models.is_own(arch):
        require_known(arch)
    content = read_weights(path)
    model_args = {**_optional(arch, content), **model_args}
    state, saved = select_weights(content, path, arch, model_args, weights_key)
    constants = {}
    for name, given in (("mean", mean), ("std", std)):
        values = saved[name] if given is None else [[float(value) for value in given]]
        if len(values) > 1:
            shown = " and ".join(map(str, values[:3]))
            raise UserError(f"{path} holds more than one {name} of a normalisation: {shown}. Choose one with {name}=.")
        if values:
            constants[name] = values[0]
    arguments = {**_inferred(arch, state), **model_args, **constants}
    described = {
        key: (None if key.endswith(UNUSED_BATCH_COUNT) else type_name(value.dtype), tuple(value.shape))
        for key, value in state.items()
    }
    check_tensors(arch, arguments, described, str(path), trust_code=True)
    model = models.create(arch, arguments, trust_code=True)  # the caller has named the code
    model.load_state_dict(state)
    whole = model
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


def read_weights(path: Path) -> Any:
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


def select_weights(
    content: Any, path: Path, arch: str, model_args: dict[str, Any], weights_key: str | None
) -> tuple[dict[str, Tensor], Constants]:
    """(state dict under the architecture's own names, normalisation constants) of the one set of weights that is meant."""
    try:
        expected, parameters = expected_tensors(arch, model_args, len(flatten(content)), trust_code=True)
        saved = flatten(content, (parameters, expected))
        sets = find_sets(saved, expected)
        everything = flatten(content, (parameters, expected), optimizers=True) if sets else saved
        hidden = hidden_sets(everything, expected) if len(everything) > len(saved) else []
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    if not sets:
        keys = ", ".join(map(quoted, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        missing = next(name for name in expected if name not in saved)
        names = f", but has {', '.join(map(quoted, list(saved)[:3]))}" if saved else ""
        wanted = f"expected one state dict of {arch}: {quoted(missing)} is missing, as most of its tensors are{names}"
        raise UserError(f"{path} holds {keys or 'nothing'}; {wanted}.")
    saved |= {name: everything[name] for found in hidden for name in found.names.values()}
    sets += hidden
    chosen = choose(sets, weights_key, saved, str(path))
    if weights_key is None and (few := few_averaged(everything, sets, expected)):
        names = ", ".join(map(quoted, few[:3])) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
        raise UserError(
            f"{path} holds weights of {arch} under {quoted(chosen.path or '.')}, and averages of a few of them: {names}. "
            f"weights_key={chosen.path or '.'!r} (--weights-key) loads the weights without the averages."
        )
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


def _optional(arch: str, content: Any) -> dict[str, bool]:
    """The arguments for parts of the architecture that only some files have."""
    optional = _OPTIONAL.get(arch, {})
    names: list[str] = []
    with suppress(UserError):  # raised again, with the file's name, when the weights are looked for
        names = [f".{name}" for name in flatten(content)] if optional else []
    return {key: True for end, key in optional.items() if any(name.endswith(f".{end}") for name in names)}


def _inferred(arch: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """num_classes and in_chans, from the shapes of the first and the last layer."""
    known = None if models.is_own(arch) else timm.get_pretrained_cfg(arch)
    inferred: dict[str, Any] = {}
    for attribute, argument, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = getattr(known, attribute, None)
        weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis:
            inferred[argument] = int(weight.shape[axis])
    return inferred


def pretrained(name: str, **arguments: Any) -> nn.Module:
    """A timm model with its pretrained weights, in evaluation mode: [0, 1] images [B, C, H, W] -> logits [B, K].

    timm adapts the weights to `arguments` such as in_chans and img_size.

    Raises:
        UserError: timm has no weights of that name, or they cannot be downloaded.
    """
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None or not known.has_weights:
        raise UserError(f"timm has no weights of '{name}'. Give a weight file with --arch {name}, or a release.")
    try:
        model = timm.create_model(name, pretrained=True, **arguments)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"timm's weights of '{name}' cannot be fetched: {first_line(error)}") from error
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        given = f" with {quoted(arguments)}" if arguments else ""
        raise UserError(f"timm's weights of '{name}' cannot be used{given}: {first_line(error)}") from error
    # The constants are those of the weights, for their channels.
    known = timm.get_pretrained_cfg(name)
    assert known is not None, "its weights were found"
    in_chans = int(arguments.get("in_chans", known.input_size[0]))
    constants = (known.mean, known.std) if len(known.mean) in (1, in_chans) else ((0.5,), (0.5,))
    return models.around_timm(model, name, arguments, *constants).eval()
