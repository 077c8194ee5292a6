"""Checks of untrusted configurations and weight files, before anything is allocated."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nrat_scale import models
from nrat_scale.core.errors import UserError, printable, quoted
from nrat_scale.core.files import parse_json
from nrat_scale.loading.file_kind import recognise
from nrat_scale.loading.release_folder import CONFIG

_CONFIG_BYTES = 1 << 20
_FLOATING = {"F64", "F32", "F16", "BF16"}  # converted into each other when weights are loaded
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_LARGEST_ARGUMENT = 1 << 20  # above any depth, width or number of classes
_LARGEST_DEPTH = 1000  # layers
_MOST_PARAMETERS = 10_000  # parameter tensors; the deepest timm models have some thousands
_BUFFER_BYTES = 1 << 28  # of buffers that are not in the state dict (masks, positions)

Described = Mapping[str, tuple[str | None, tuple[int, ...]]]  # name -> safetensors type (None: any), shape


def require_known(arch: str) -> None:
    """Raise `UserError` if timm does not know the architecture and this process has not registered it."""
    if not timm.is_model(arch) and arch not in models.REGISTERED:
        if meant := models.as_import(arch):
            raise UserError(f"The architecture {quoted(arch)} is unknown. A class of your own is written {meant}.")
        raise UserError(
            f"The architecture {quoted(arch)} is unknown. {models.near_model(arch)} Any timm model can be used; code in a release is not."
        )


def require_buildable(arch: str) -> None:
    """Raise `UserError` if a release's architecture is neither timm's nor registered in this process."""
    if models.is_import(arch):
        factory = printable(arch.rpartition(":")[2])
        raise UserError(
            f"its model {quoted(arch)} is code, which a release never contains. With the code at hand: "
            f"nrat_scale.load(..., model={factory}), on the command line --arch MODULE:FACTORY."
        )
    try:
        require_known(arch)
    except UserError as error:
        raise UserError(f"{error} If it is a class of yours: nrat_scale.load(..., model=CLASS).") from error


def read_configuration(path: Path) -> tuple[str, dict[str, Any]]:
    """(architecture, its arguments) of a config.json in timm's format.

    A model of timm gets its normalisation from `pretrained_cfg`, one of ours, or of a user's code, from its arguments.
    """
    if path.stat().st_size > _CONFIG_BYTES:
        raise UserError(f"{CONFIG} has {path.stat().st_size} bytes; no configuration is that large.")
    config = parse_json(path.read_bytes(), "configuration", CONFIG)
    name, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{CONFIG} describes no model: it needs 'architecture' and 'model_args'.")
    if isinstance(config.get("num_classes"), int):
        arguments = {"num_classes": config["num_classes"], **arguments}
    for key, value in arguments.items():
        _check_argument(key, value)
    known = config.get("pretrained_cfg")
    known = known if isinstance(known, dict) else {}
    if not models.is_ours(name):
        arguments = {
            **arguments,
            **{key: known[key] for key in ("mean", "std") if key in known and key not in arguments},
        }
    return name, arguments


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


def read_safetensors_header(path: Path) -> Described:
    """Types and shapes of the tensors in a safetensors file; the library verifies the header against the file size."""
    try:
        if what := recognise(path):
            raise UserError(f"{path.name} {what}.")
        with safe_open(path, "np") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in tensors.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.name} is damaged: {quoted(error)}.") from error


def type_name(dtype: torch.dtype) -> str:
    """safetensors' name of a type, or torch's if it is in no model."""
    return _KINDS.get(dtype, str(dtype).removeprefix("torch."))


def check_tensors(
    name: str, arguments: dict[str, Any], found: Described, where: str, *, trust_code: bool = False
) -> None:
    """Compare the tensors `found` in the file `where` with those of the architecture.

    Raises:
        UserError: missing, additional or different tensors, or an architecture far larger than the file.
    """
    expected, _ = expected_tensors(name, arguments, len(found), trust_code=trust_code)
    compare_tensors(expected, found, where, name)


def compare_tensors(expected: Mapping[str, Tensor], found: Described, where: str, name: str) -> None:
    """Compare the tensors `found` in the file `where` with those `expected` of the architecture `name`; as `check_tensors`."""
    words = [f"{quoted(key)} is missing" for key in expected if key not in found]
    words += [f"{quoted(key)} is not part of it" for key in found if key not in expected]
    other_size = False
    for key in expected.keys() & found.keys():
        tensor, (kind, shape) = expected[key], found[key]
        if tensor.shape != shape:
            words.append(f"{quoted(key)} has shape {list(shape)} instead of {list(tensor.shape)}")
            other_size = True
        elif kind not in (None, _KINDS.get(tensor.dtype)) and not {kind, _KINDS.get(tensor.dtype)} <= _FLOATING:
            words.append(f"{quoted(key)} has type {quoted(kind)} instead of {tensor.dtype}")
    if words:
        more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
        hint = (
            " If it has another size, give its arguments: width=8 in Python, --arch-args width=8" if other_size else ""
        )
        raise UserError(f"{where} does not fit the architecture {name}: {'; '.join(sorted(words)[:3])}{more}.{hint}")


def expected_tensors(
    name: str, arguments: dict[str, Any], num_tensors: int, *, trust_code: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The architecture's (state dict, parameters) on the meta device; `trust_code` as for `models.create`.

    Raises:
        UserError: it has far more parameters than `num_tensors`, or huge buffers, or does not take the arguments.
    """
    if models.is_own(name):  # the user has named this code, which may not work on the meta device
        model = models.bare(models.create(name, arguments, trust_code=trust_code))
        return model.state_dict(), dict(model.named_parameters())
    # Some constructors register a parameter twice (a head that is replaced), hence the factor of 2.
    with torch.device("meta"), _at_most(min(2 * num_tensors + 100, _MOST_PARAMETERS)):
        model = models.bare(models.create(name, arguments))
    state = model.state_dict()
    unsaved = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in state)
    if unsaved > _BUFFER_BYTES:
        raise UserError(f"the architecture {name} asks for {unsaved >> 20} MiB of constants; no model needs as many.")
    return state, dict(model.named_parameters())


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Abort the construction of a model with more parameters; a configuration may ask for millions of layers."""
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
