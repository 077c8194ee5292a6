"""Trained weights from anywhere: releases (here or on the Hub), files as RobustBench has them, timm's own.

Of a release only safetensors and JSON are read, the architecture is built here from its configuration, and names, types, shapes
and sizes are compared before anything is allocated: a file from a stranger can be wrong, but it cannot run.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
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

from nrat_scale import models
from nrat_scale.errors import UserError, did_you_mean
from nrat_scale.files import parse_json, read_json, sha256_of

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
_EXTRAS = ("recipe.yaml", "results.json")
_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 64 << 20
_LARGEST_ARGUMENT = 1 << 20  # no depth, width or number of classes is larger
_DEEPEST = 1000  # layers that a configuration may ask for
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
            f"There is no release folder {source}, and the Hub does not allow such a name: {_first_line(error)}"
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
        raise UserError(f"The release {source} cannot be fetched from the Hub: {_first_line(error)}") from error
    return folder


def _from_release(folder: Path) -> nn.Module:
    name, arguments = _configuration(folder / CONFIG)
    if wrong := _differences(_described(name, arguments), _header(folder / WEIGHTS)):
        raise UserError(f"{WEIGHTS} does not fit the architecture {name}: {wrong}.")
    model = models.create(name, arguments)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"{WEIGHTS} cannot be read: {_first_line(error)}") from error
    return model


def _configuration(path: Path) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments) of a config.json in timm's format."""
    if path.stat().st_size > _CONFIG_BYTES:
        raise UserError(f"{CONFIG} has {path.stat().st_size} bytes; no configuration is that large.")
    config = parse_json(path.read_bytes(), "configuration", CONFIG)
    name, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{CONFIG} describes no model: it needs 'architecture' and 'model_args'.")
    if not timm.is_model(name):
        raise UserError(
            f"the architecture '{name}' is not known here. {did_you_mean(name, _ours())} All of timm's models are known too; no "
            "code is taken from a release."
        )
    if "num_classes" not in arguments and isinstance(config.get("num_classes"), int):
        arguments = {**arguments, "num_classes": config["num_classes"]}
    for key, value in arguments.items():
        _check_argument(key, value)
    return name, arguments


def _check_argument(key: str, value: Any) -> None:
    for item in value if isinstance(value, list) else [value]:
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if not (item is None or isinstance(item, bool | str) or number):
            raise UserError(
                f"{CONFIG} gives '{key}' as {type(item).__name__}; expected a number, text, or a list of them."
            )
        limit = _DEEPEST if key == "depth" else _LARGEST_ARGUMENT
        if number and not abs(item) <= limit:
            raise UserError(f"{CONFIG} asks for {key} = {item}; no model is that large.")
    if key.startswith(("pretrained", "checkpoint", "cache_dir")):  # would make timm read other files or addresses
        raise UserError(f"{CONFIG} sets '{key}', which is no property of an architecture.")


def _ours() -> list[str]:
    return [tag.split(".")[0] for tag in models.default_cfgs]


Described = dict[str, tuple[str, tuple[int, ...]]]  # name -> type, shape


def _described(name: str, arguments: dict[str, Any]) -> Described:
    """What the state dict of the architecture looks like; nothing is allocated."""
    try:
        with torch.device("meta"):
            model = models.create(name, arguments)
    except NotImplementedError as error:
        raise UserError(f"the architecture {name} cannot be described without building it.") from error
    return {key: (_TYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in model.state_dict().items()}


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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.name} is damaged: its header does not describe tensors ({error}).") from error
    if total != size - 8 - length:
        raise UserError(
            f"{path.name} is damaged: its header describes {total} bytes, and {size - 8 - length} are there."
        )
    return found


def _differences(expected: Described, found: Described) -> str:
    """The first differences in words; empty where there are none."""
    words = [f"'{name}' is missing" for name in expected if name not in found]
    words += [f"'{name}' is not part of it" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        (kind, shape), (other_kind, other_shape) = expected[name], found[name]
        if shape != other_shape:
            words.append(f"'{name}' has shape {list(other_shape)} instead of {list(shape)}")
        elif kind != other_kind and not {kind, other_kind} <= _FLOATING:  # weights of any precision are converted
            words.append(f"'{name}' is {other_kind} instead of {kind}")
    more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
    return "; ".join(sorted(words)[:3]) + more


# ---- files of weights -----------------------------------------------------------------------------------------------


def _from_file(
    path: Path, arch: str, mean: Sequence[float] | None, std: Sequence[float] | None, model_args: dict[str, Any]
) -> nn.Module:
    if path.is_dir():
        raise UserError(f"{path} is a folder; arch= is for a file of weights. A release is loaded without it.")
    if not path.is_file():
        raise UserError(f"There is no file of weights {path}.")
    state, constants = _plain(_read(path), path)
    arguments = {**_inferred(arch, state, constants), **model_args}
    for name, given in (("mean", mean), ("std", std)):
        if given is not None or name in constants:
            arguments[name] = [float(value) for value in (constants[name] if given is None else given)]
    expected = _described(arch, arguments)
    found = {key: (expected.get(key, ("?", ()))[0], tuple(value.shape)) for key, value in state.items()}
    if wrong := _differences(expected, found):
        raise UserError(f"The weights in {path} do not fit {arch}: {wrong}.")
    model = models.create(arch, arguments)
    model.load_state_dict(state)
    return model


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
    except (RuntimeError, SafetensorError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"The weights {path} cannot be read: {_first_line(error)}") from error


def _plain(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """(state dict with the architecture's own names, normalisation constants) from the usual wrappings."""
    found = content
    if isinstance(found, dict) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = [name for name in _CONTAINERS if isinstance(found.get(name), dict)]
        if len(inner) != 1:
            raise UserError(
                f"{path} holds {', '.join(map(str, list(found)[:6])) or 'nothing'}; expected a state dict, alone or under one of "
                f"{', '.join(_CONTAINERS)}. Save the one that is meant by itself."
            )
        found = found[inner[0]]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in found.items()):
        raise UserError(f"{path} holds no state dict (names and tensors).")
    state, constants = dict(found), dict[str, list[float]]()
    while state:
        for name in list(state):
            kind = _CONSTANTS.get(name.rpartition(".")[2])
            if kind is not None and state[name].numel() <= 4 and not name.startswith(("layer", "block")):
                constants[kind] = state.pop(name).flatten().double().tolist()
        prefixes = {match[0] if (match := _PREFIX.match(name)) else "" for name in state}
        if len(prefixes) != 1 or prefixes == {""}:
            break
        (prefix,) = prefixes
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, constants


def _inferred(arch: str, state: dict[str, Tensor], constants: dict[str, list[float]]) -> dict[str, Any]:
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
        raise UserError(f"timm's weights of '{name}' cannot be fetched: {_first_line(error)}") from error
    return _Zoo(model, known.mean, known.std, known.input_size[0]).eval().to(device)


# ---- RobustBench ----------------------------------------------------------------------------------------------------

_registered: dict[str, str] = {}  # entry point -> source


def register_robustbench(source: str, name: str, dataset: str = "cifar10", threat_model: str = "Linf") -> str:
    """Let RobustBench's `load_model(name, dataset=dataset, threat_model=threat_model)` find a release.

    RobustBench asks timm for a model called `<name>_<dataset>_<threat_model>` in lower case with `-` as `_`, before it looks into
    its own zoo.

    Args:
        source: as for `load`.
        name: what the model is to be called.

    Returns:
        The name registered with timm.

    Raises:
        UserError: the name is taken, or is none.
    """
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
        model = load(source)
        if num_classes not in (None, model.num_classes):
            raise UserError(f"{source} knows {model.num_classes} classes, not {num_classes}.")
        return model

    create.__name__, create.__module__ = entry, __name__
    register_model(create)
    _registered[entry] = source
    return entry


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
