"""Checks of configurations and weight files from strangers, before anything is allocated."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nrat_scale import models
from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.core.files import parse_json
from nrat_scale.loading.release_folder import CONFIG

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


def read_configuration(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, arguments, what timm knows of its input) of a config.json in timm's format."""
    if path.stat().st_size > _CONFIG_BYTES:
        raise UserError(f"{CONFIG} has {path.stat().st_size} bytes; no configuration is that large.")
    config = parse_json(path.read_bytes(), "configuration", CONFIG)
    name, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{CONFIG} describes no model: it needs 'architecture' and 'model_args'.")
    if not timm.is_model(name):
        raise UserError(
            f"the architecture {quoted(name)} is not known here. {did_you_mean(name, our_architectures())} All of timm's models are known too; no "
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
        raise UserError(f"{CONFIG} sets {quoted(key)}, which is no name of an argument.")
    if key in ("device", "dtype") or key.startswith(("pretrained", "checkpoint", "cache_dir")):
        # The first would leave the meta device and allocate, the others make timm read other files or addresses.
        raise UserError(f"{CONFIG} sets {quoted(key)}, which is no property of an architecture.")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, str) and not item.isprintable():
            raise UserError(f"{CONFIG} gives {quoted(key)} as {quoted(item)}; expected printable text.")
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if not (item is None or isinstance(item, bool | str) or number):
            raise UserError(
                f"{CONFIG} gives {quoted(key)} as {type(item).__name__}; expected a number, text, or a list of them."
            )
        limit = _DEEPEST if key == "depth" else _LARGEST_ARGUMENT
        if number and not abs(item) <= limit:
            raise UserError(f"{CONFIG} asks for {quoted(key)} = {item}; no model is that large.")
    if sum(abs(item) for item in items if isinstance(item, int | float)) > _LARGEST_ARGUMENT:
        raise UserError(
            f"{CONFIG} asks for {quoted(key)} with a sum above {_LARGEST_ARGUMENT}; no model is that large."
        )


def our_architectures() -> list[str]:
    return list(models.default_cfgs)


def is_ours(arch: str) -> bool:
    """Whether the architecture normalises by itself; timm's own do not."""
    return arch.split(".")[0] in our_architectures()


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


def expected_tensors(name: str, arguments: dict[str, Any], tensors: int) -> Described:
    """What the state dict of the architecture looks like, which is to hold `tensors`; nothing is allocated."""
    # Some constructors register a parameter twice (a head that is replaced); what really differs is named afterwards.
    with torch.device("meta"), _at_most(min(2 * tensors + 100, _MOST_PARAMETERS)):
        model = models.create(name, arguments)
    state = model.state_dict()
    unsaved = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in state)
    if unsaved > _BUFFER_BYTES:
        raise UserError(f"the architecture {name} asks for {unsaved >> 20} MiB of constants; no model needs as many.")
    return {key: (_TYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in state.items()}


def read_safetensors_header(path: Path) -> Described:
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


def quoted(name: object) -> str:
    """A name that a file chose, quoted: it may hold line ends, what a terminal obeys, or a novel."""
    text = str(name)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def describe_differences(expected: Described, found: Described) -> str:
    """The first differences in words; empty where there are none."""
    words = [f"{quoted(name)} is missing" for name in expected if name not in found]
    words += [f"{quoted(name)} is not part of it" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        (kind, shape), (other_kind, other_shape) = expected[name], found[name]
        if shape != other_shape:
            words.append(f"{quoted(name)} has shape {list(other_shape)} instead of {list(shape)}")
        elif kind != other_kind and not {kind, other_kind} <= _FLOATING:  # weights of any precision are converted
            words.append(f"{quoted(name)} is {quoted(other_kind)} instead of {kind}")
    more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
    return "; ".join(sorted(words)[:3]) + more
