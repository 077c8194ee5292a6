"""Checks of untrusted configurations and weight files, before anything is allocated."""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nrat_scale import models
from nrat_scale.core.errors import UserError, did_you_mean, first_line, quoted
from nrat_scale.core.files import parse_json
from nrat_scale.loading.release_folder import CONFIG

_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 64 << 20
_LARGEST_ARGUMENT = 1 << 20  # above any depth, width or number of classes
_LARGEST_DEPTH = 1000  # layers
_MOST_PARAMETERS = 10_000  # parameter tensors; the deepest timm models have some thousands
_BUFFER_BYTES = 1 << 28  # of buffers that are not in the state dict (masks, positions)
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_FLOATING = {"F64", "F32", "F16", "BF16"}

Described = Mapping[str, tuple[str | None, tuple[int, ...]]]  # name -> type (None: any), shape


# ---- architectures and their configuration --------------------------------------------------------------------------


def our_architectures() -> list[str]:
    """The architectures of `nrat_scale.models`."""
    return [tag.split(".")[0] for tag in models.default_cfgs]


def is_ours(arch: str) -> bool:
    """Whether the model normalises its input itself; timm's models do not."""
    return arch.split(".")[0] in our_architectures()


def read_configuration(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, its arguments, `pretrained_cfg`) of a config.json in timm's format."""
    if path.stat().st_size > _CONFIG_BYTES:
        raise UserError(f"{CONFIG} has {path.stat().st_size} bytes; no configuration is that large.")
    config = parse_json(path.read_bytes(), "configuration", CONFIG)
    name, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{CONFIG} describes no model: it needs 'architecture' and 'model_args'.")
    if not timm.is_model(name):
        raise UserError(
            f"the architecture {quoted(name)} is unknown. {did_you_mean(name, our_architectures())} timm's architectures are "
            "known too; a release cannot bring its own code."
        )
    if "num_classes" not in arguments and isinstance(config.get("num_classes"), int):
        arguments = {**arguments, "num_classes": config["num_classes"]}
    for key, value in arguments.items():
        _check_argument(key, value)
    known = config.get("pretrained_cfg")
    return name, arguments, known if isinstance(known, dict) else {}


def _check_argument(key: str, value: Any) -> None:
    shown = f"{CONFIG} sets {quoted(key)}"
    if not key.isidentifier() or len(key) > 80:
        raise UserError(f"{shown}, which is not the name of an argument.")
    if key in ("device", "dtype") or key.startswith(("pretrained", "checkpoint", "cache_dir")):
        # device would leave the meta device and allocate; the others make timm read other files or addresses.
        raise UserError(f"{shown}, which is not a property of an architecture.")
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise UserError(f"{shown} to a {type(value).__name__}; expected a number, text, or a list of them.")
    if not all(item.isprintable() for item in items if isinstance(item, str)):
        raise UserError(f"{shown} to {quoted(value)}; expected printable text.")
    numbers = [abs(item) for item in items if isinstance(item, int | float)]
    limit = _LARGEST_DEPTH if key == "depth" else _LARGEST_ARGUMENT
    if not all(number <= limit for number in numbers) or sum(numbers) > _LARGEST_ARGUMENT:  # NaN is no number <= limit
        raise UserError(f"{shown} to {quoted(value)}; no model is that large.")


# ---- tensors --------------------------------------------------------------------------------------------------------


def read_safetensors_header(path: Path) -> Described:
    """Names, types and shapes in a safetensors file; the file must have exactly the size that they describe."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_BYTES, size - 8):
                raise UserError(f"{path.name} is damaged: its header claims {length} bytes of a file of {size}.")
            header = parse_json(file.read(length), "header of the weights", path.name)
    except struct.error:
        raise UserError(f"{path.name} is damaged: {size} bytes hold no safetensors header.") from None
    found: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    total = 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = str(entry["dtype"]), tuple(map(int, entry["shape"]))
                total += end - begin
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path.name} is damaged: its header does not describe tensors ({first_line(error)}).") from error
    if total != size - 8 - length:
        raise UserError(
            f"{path.name} is damaged: its header describes {total} bytes, the file has {size - 8 - length}."
        )
    return found


def check_tensors(name: str, arguments: dict[str, Any], found: Described, where: str) -> None:
    """Compare the tensors `found` in the file `where` with those of the architecture.

    Raises:
        UserError: missing, additional or different tensors, or an architecture far larger than the file.
    """
    expected = _expected_tensors(name, arguments, len(found))
    words = [f"{quoted(key)} is missing" for key in expected if key not in found]
    words += [f"{quoted(key)} is not part of it" for key in found if key not in expected]
    for key in expected.keys() & found.keys():
        (kind, shape), (found_kind, found_shape) = expected[key], found[key]
        if shape != found_shape:
            words.append(f"{quoted(key)} has shape {list(found_shape)} instead of {list(shape)}")
        elif (
            found_kind not in (None, kind) and not {kind, found_kind} <= _FLOATING
        ):  # weights of any precision are converted
            words.append(f"{quoted(key)} is {quoted(found_kind)} instead of {kind}")
    if words:
        more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
        raise UserError(f"{where} does not fit the architecture {name}: {'; '.join(sorted(words)[:3])}{more}.")


def _expected_tensors(name: str, arguments: dict[str, Any], tensors: int) -> Described:
    """The state dict that the architecture has, built on the meta device; the file holds `tensors` tensors."""
    # Some constructors register a parameter twice (a head that is replaced), hence the factor of 2.
    with torch.device("meta"), _at_most(min(2 * tensors + 100, _MOST_PARAMETERS)):
        model = models.create(name, arguments)
    state = model.state_dict()
    unsaved = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in state)
    if unsaved > _BUFFER_BYTES:
        raise UserError(f"the architecture {name} asks for {unsaved >> 20} MiB of constants; no model needs as many.")
    return {key: (_TYPES.get(value.dtype, str(value.dtype)), tuple(value.shape)) for key, value in state.items()}


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Abort the construction of a model with more parameters: a configuration may ask for millions of layers."""
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
