"""Trained weights from anywhere: releases (here or on the Hub), files as RobustBench has them, timm's own.

Of a release only safetensors and JSON are read, the architecture is built here from its configuration, and names, types, shapes
and sizes are compared before anything is allocated: a file from a stranger can be wrong, but it cannot run.
"""

import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nrat_scale import models
from nrat_scale.errors import UserError, did_you_mean, first_line
from nrat_scale.files import parse_json, read_json, sha256_of

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
_EXTRAS = ("recipe.yaml", "results.json")
_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 64 << 20
_LARGEST_ARGUMENT = 1 << 20  # no depth, width or number of classes is larger
_DEEPEST = 1000  # layers that a configuration may ask for
_MOST_PARAMETERS = 10_000  # tensors, not numbers; the deepest of timm's models have some thousands
_BUFFER_BYTES = 1 << 28  # constants that a model computes for itself (masks, positions) and does not save
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_FLOATING = {"F64", "F32", "F16", "BF16"}
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema", "ema_state_dict")
_CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_PREFIX = re.compile(r"(module|model|net|0|1)\.")


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
        model = _from_file(Path(source), arch, mean, std, model_args)
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


# ---- releases -------------------------------------------------------------------------------------------------------


def resolve(source: str | Path) -> Path:
    """The local folder of a release: `source` itself, or its files fetched from the Hub. Raises as `load`."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(str(source))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{source} is not a release: it has no {name}. "
                "Make one with: python -m nrat_scale.release RUN --to FOLDER"
            )
    verify(folder)
    return folder


def verify(folder: Path, *, everything: bool = False) -> None:
    """Compare a release with its manifest: what `load` reads, or `everything`. Without a manifest (timm's own) nothing is known.

    Raises:
        UserError: a file is missing or has other bytes; with `everything` also where there is no manifest.
    """
    if not (folder / MANIFEST).is_file():
        if everything:
            raise UserError(f"{folder} has no {MANIFEST}: it was not made by python -m nrat_scale.release.")
        return
    files = read_json(folder / MANIFEST, "manifest of the release").get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise UserError(f"The manifest {folder / MANIFEST} is damaged: it lists no files.")
    for name, facts in files.items():
        path = folder / name
        if not everything and name not in (CONFIG, WEIGHTS):
            continue
        if not path.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing.")
        if path.stat().st_size != facts.get("bytes") or sha256_of(path) != facts.get("sha256"):
            raise UserError(f"{folder} is damaged: {name} is not what its manifest says. Fetch or release it again.")


def _fetch(source: str) -> Path:
    """The snapshot folder of `user/repo[@revision]`, all files of one commit."""
    repo, _, revision = source.partition("@")
    if repo.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"There is no release folder {source}, and it is not of the Hub's form user/repo either.")
    try:
        folder = Path(hf_hub_download(repo, CONFIG, revision=revision or None)).parent
        commit = folder.name  # what `revision` meant when the first file was asked for
        hf_hub_download(repo, WEIGHTS, revision=commit)
        for name in (*_EXTRAS, MANIFEST):
            with suppress(EntryNotFoundError, LocalEntryNotFoundError):
                hf_hub_download(repo, name, revision=commit)
        try:
            verify(folder)
        except UserError:  # damaged on the way, which the client does not notice: once more, past its cache
            for name in (CONFIG, WEIGHTS, MANIFEST):
                hf_hub_download(repo, name, revision=commit, force_download=True)
    except HFValidationError as error:
        raise UserError(
            f"There is no release folder {source}, and the Hub does not allow such a name: {first_line(error)}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"There is no folder {source} here, the Hub cannot be reached, and it is not in the cache either."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {source} here and no model {repo} on the Hub (or it is private)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"The model {repo} on the Hub has no revision '{revision}'.") from error
    except EntryNotFoundError as error:
        raise UserError(f"{repo} on the Hub is not a release: it lacks {CONFIG} or {WEIGHTS}.") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"The release {source} cannot be fetched from the Hub: {first_line(error)}") from error
    return folder


def _from_release(folder: Path) -> nn.Module:
    name, arguments, constants = _configuration(folder / CONFIG)
    found = _header(folder / WEIGHTS)
    if wrong := _differences(_described(name, arguments, len(found)), found):
        raise UserError(f"{WEIGHTS} does not fit the architecture {name}: {wrong}.")
    model = models.create(name, arguments)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"{WEIGHTS} cannot be read: {first_line(error)}") from error
    return model if _is_ours(name) else _normalised(model, name, arguments, constants.get("mean"), constants.get("std"))


def _configuration(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, arguments, what timm knows of its input) of a config.json in timm's format."""
    if path.stat().st_size > _CONFIG_BYTES:
        raise UserError(f"{CONFIG} has {path.stat().st_size} bytes; no configuration is that large.")
    config = parse_json(path.read_bytes(), "configuration", CONFIG)
    name, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{CONFIG} describes no model: it needs 'architecture' and 'model_args'.")
    if not timm.is_model(name):
        raise UserError(
            f"the architecture {_shown(name)} is not known here. {did_you_mean(name, _ours())} All of timm's models are known too; no "
            "code is taken from a release."
        )
    if "num_classes" not in arguments and isinstance(config.get("num_classes"), int):
        arguments = {**arguments, "num_classes": config["num_classes"]}
    for key, value in arguments.items():
        _check_argument(key, value)
    known = config.get("pretrained_cfg")
    return name, arguments, known if isinstance(known, dict) else {}


def _check_argument(key: str, value: Any) -> None:
    if not key.isidentifier() or len(key) > 80:
        raise UserError(f"{CONFIG} sets {_shown(key)}, which is no name of an argument.")
    if key in ("device", "dtype") or key.startswith(("pretrained", "checkpoint", "cache_dir")):
        # The first would leave the meta device and allocate, the others make timm read other files or addresses.
        raise UserError(f"{CONFIG} sets {_shown(key)}, which is no property of an architecture.")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, str) and not item.isprintable():
            raise UserError(f"{CONFIG} gives {_shown(key)} as {_shown(item)}; expected printable text.")
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if not (item is None or isinstance(item, bool | str) or number):
            raise UserError(
                f"{CONFIG} gives {_shown(key)} as {type(item).__name__}; expected a number, text, or a list of them."
            )
        limit = _DEEPEST if key == "depth" else _LARGEST_ARGUMENT
        if number and not abs(item) <= limit:
            raise UserError(f"{CONFIG} asks for {_shown(key)} = {item}; no model is that large.")
    if sum(abs(item) for item in items if isinstance(item, int | float)) > _LARGEST_ARGUMENT:
        raise UserError(
            f"{CONFIG} asks for {_shown(key)} with a sum above {_LARGEST_ARGUMENT}; no model is that large."
        )


def _ours() -> list[str]:
    return [tag.split(".")[0] for tag in models.default_cfgs]


def _is_ours(arch: str) -> bool:
    """Whether the architecture normalises by itself; timm's own do not."""
    return arch.split(".")[0] in _ours()


Described = dict[str, tuple[str, tuple[int, ...]]]  # name -> type, shape


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop the construction of a model as soon as it has more parameters: `depths` of a million layers never end."""
    count = 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise UserError("the architecture asks for far more layers than there are weights.")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _described(name: str, arguments: dict[str, Any], tensors: int) -> Described:
    """What the state dict of the architecture looks like, which is to hold `tensors`; nothing is allocated."""
    # Some constructors register a parameter twice (a head that is replaced); what really differs is named afterwards.
    with torch.device("meta"), _at_most(min(2 * tensors + 100, _MOST_PARAMETERS)):
        model = models.create(name, arguments)
    state = model.state_dict()
    unsaved = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in state)
    if unsaved > _BUFFER_BYTES:
        raise UserError(f"the architecture {name} asks for {unsaved >> 20} MiB of constants; no model needs as many.")
    return {key: (_TYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in state.items()}


def _header(path: Path) -> Described:
    """Names, types and shapes in a safetensors file, which are made sure to fill it exactly."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_BYTES, size - 8):
                raise UserError(f"{path.name} is damaged: its header claims {length} bytes of a file of {size}.")
            header = parse_json(file.read(length), "header of the weights", path.name)
    except struct.error:
        raise UserError(f"{path.name} is damaged: {size} bytes hold no safetensors header.") from None
    found: Described = {}
    total = 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                kind, shape, (begin, end) = str(entry["dtype"]), tuple(map(int, entry["shape"])), entry["data_offsets"]
                found[name] = kind, shape
                total += end - begin
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path.name} is damaged: its header does not describe tensors ({error}).") from error
    if total != size - 8 - length:
        raise UserError(
            f"{path.name} is damaged: its header describes {total} bytes, and {size - 8 - length} are there."
        )
    return found


def _shown(name: object) -> str:
    """A name that a file chose, quoted: it may hold line ends, what a terminal obeys, or a novel."""
    text = str(name)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _differences(expected: Described, found: Described) -> str:
    """The first differences in words; empty where there are none."""
    words = [f"{_shown(name)} is missing" for name in expected if name not in found]
    words += [f"{_shown(name)} is not part of it" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        (kind, shape), (other_kind, other_shape) = expected[name], found[name]
        if shape != other_shape:
            words.append(f"{_shown(name)} has shape {list(other_shape)} instead of {list(shape)}")
        elif kind != other_kind and not {kind, other_kind} <= _FLOATING:  # weights of any precision are converted
            words.append(f"{_shown(name)} is {_shown(other_kind)} instead of {kind}")
    more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
    return "; ".join(sorted(words)[:3]) + more


# ---- files of weights -----------------------------------------------------------------------------------------------

Constants = dict[str, list[list[float]]]  # "mean" and "std" -> the different ones that were found


def _from_file(
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
    ours = _is_ours(arch)
    if ours:
        arguments.update(constants)
    expected = _described(arch, arguments, len(state))
    found = {key: (expected.get(key, ("?", ()))[0], tuple(value.shape)) for key, value in state.items()}
    if wrong := _differences(expected, found):
        raise UserError(f"The weights in {path} do not fit {arch}: {wrong}.")
    model = models.create(arch, arguments)
    model.load_state_dict(state)
    return model if ours else _normalised(model, arch, arguments, constants.get("mean"), constants.get("std"))


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
                f"{path} holds {', '.join(map(_shown, list(found)[:6])) or 'nothing'}; expected a state dict, alone or under one of "
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
        raise UserError(f"Unknown architecture '{arch}'. {did_you_mean(arch, _ours())} Any timm model can be used.")
    known = timm.get_pretrained_cfg(arch)
    inferred: dict[str, Any] = {}
    for attribute, argument, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = getattr(known, attribute, None)
        weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis:
            inferred[argument] = int(weight.shape[axis])
    return inferred


# ---- timm's own models ----------------------------------------------------------------------------------------------


class _Zoo(models.Normalised):
    """One of timm's models with its normalisation inside."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
        super().__init__(int(model.num_classes), in_chans, mean, std)  # type: ignore[arg-type]
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x))


def _normalised(model: nn.Module, arch: str, arguments: dict[str, Any], mean: Any, std: Any) -> _Zoo:
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
    return _Zoo(model, mean, std, int(in_chans))


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
    return _Zoo(model, known.mean, known.std, known.input_size[0]).eval().to(device)


# ---- RobustBench ----------------------------------------------------------------------------------------------------

_registered: dict[str, str] = {}  # entry point -> source
_BENCHMARKS = {"dataset": ("cifar10", "cifar100", "imagenet"), "threat_model": ("Linf", "L2", "corruptions")}


def register_robustbench(source: str | Path, name: str, dataset: str = "cifar10", threat_model: str = "Linf") -> str:
    """Let RobustBench's `load_model(name, dataset=dataset, threat_model=threat_model)` find a release.

    RobustBench asks timm for a model called `<name>_<dataset>_<threat_model>` in lower case with `-` as `_`, before it looks into
    its own zoo.

    Args:
        source: as for `load`.
        name: what the model is to be called.
        dataset: `cifar10`, `cifar100` or `imagenet`.
        threat_model: `Linf`, `L2` or `corruptions`, which RobustBench also asks for where `corruptions_3d` is meant.

    Returns:
        The name registered with timm.

    Raises:
        UserError: the name is taken, or is none, or RobustBench has no such data set or threat model.
    """
    for what, value in (("dataset", dataset), ("threat_model", threat_model)):
        if value not in _BENCHMARKS[what]:
            raise UserError(
                f"RobustBench has no {what} '{value}' and would never ask for it. {did_you_mean(value, _BENCHMARKS[what])}"
            )
    # What is meant must not change with the working directory between now and the call.
    source = str(Path(source).resolve() if Path(source).exists() else source)
    entry = f"{name.lower().replace('-', '_')}_{dataset.lower()}_{threat_model.lower()}"
    if not entry.isidentifier():
        raise UserError(f"'{name}' cannot be the name of a model: use letters, digits, - and _.")
    if _registered.get(entry) == source:
        return entry
    if timm.is_model(entry):
        raise UserError(f"timm knows a model {entry} already. Choose another name.")

    def create(pretrained: bool = False, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
        if not pretrained:
            raise UserError(f"{entry} is a trained model: use pretrained=True.")
        if others := [key for key, value in kwargs.items() if value is not None]:
            raise UserError(f"{entry} is a trained model and takes no {', '.join(others)}.")
        model = load(source)
        if num_classes not in (None, model.num_classes):
            raise UserError(f"{source} knows {model.num_classes} classes, not {num_classes}.")
        return model

    create.__name__, create.__module__ = entry, __name__
    register_model(create)
    _registered[entry] = source
    return entry
