"""Users' own classes: `model.name: package.module:factory`, and names given by `register`.

Importing a module runs its code, so the caller says whether the name comes from someone who may ask for that (`trust_code`).
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from nrat_scale.core.errors import UserError, did_you_mean, printable, quoted
from nrat_scale.core.imports import location, reason
from nrat_scale.models.wrapped import NormalisedModel

Factory = Callable[..., nn.Module]

REGISTERED: dict[str, Factory] = {}  # name -> factory, of `register`


def register(name: str) -> Callable[[Factory], Factory]:
    """Give a class or a factory a name for `model.name`: `register("my_net")(MyNet)`, or a decorator.

    The name holds in this process; another one must register it again, or use `package.module:factory`. Registering a name
    again replaces it, as when a notebook's cell runs twice.

    Raises:
        UserError: timm has a model of that name, or the name is not one.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UserError(f"{quoted(name)} cannot be the name of a model: use letters, digits and _.")
    if timm.is_model(name):
        raise UserError(f"timm knows a model {name} already. Choose another name.")

    def keep(factory: Factory) -> Factory:
        if not callable(factory) or isinstance(factory, nn.Module):
            raise UserError(
                f"register('{name}') takes a class or a function that makes a model, not {quoted(factory)}."
            )
        REGISTERED[name] = factory
        return factory

    return keep


def is_import(name: str) -> bool:
    """Whether `name` has the form package.module:factory."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def is_own(name: str) -> bool:
    """Whether `name` is a user's own model: registered in this process, or of the form package.module:factory."""
    return name in REGISTERED or is_import(name)


def as_import(name: str) -> str | None:
    """`name`, written as a path or with a dot, as package.module:factory, if there is such a file; else None."""
    module, colon, factory = name.partition(":")
    if not colon and not module.endswith(".py"):
        module, _, factory = module.rpartition(".") if "." in module else (module, "", "")
    module = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    meant = f"{module}:{factory or 'CLASS'}"
    written = is_import(meant) and meant != name and Path(*module.split(".")).with_suffix(".py").is_file()
    return meant if written else None


def find_factory(name: str, *, trust_code: bool) -> Factory:
    """The factory that is registered as `name`, or that `package.module:factory` imports.

    Raises:
        UserError: the code may not be imported, there is no such module or factory, or its import fails.
    """
    if name in REGISTERED:
        return REGISTERED[name]
    if not trust_code:
        raise UserError(
            f"The model {quoted(name)} is code, which is imported only for a recipe that you name or a run under the "
            "working directory. Read it first; then allow it with --trust-code."
        )
    module_name, _, path = name.partition(":")
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)  # as `python -m` does
    importlib.invalidate_caches()  # a notebook may have written the file a moment ago
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{name} cannot be imported: {printable(error)}{location(error)}.") from error
        meant = f" Did you mean {as_import(name)}?" if as_import(name) else ""
        raise UserError(
            f"There is no module '{error.name}' for model.name '{name}', neither installed nor in the working directory "
            f"{folder}.{meant}"
        ) from error
    except Exception as error:  # the user's module may raise anything
        raise UserError(f"{name} cannot be imported: {reason(error)}{location(error)}.") from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise UserError(f"The module '{module_name}' of model.name has no '{path}'. {did_you_mean(part, known)}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise UserError(f"model.name '{name}' must be a class or a function that makes a model, not {quoted(found)}.")
    return found


def origin(name: str) -> tuple[str, str]:
    """(module, factory) of a user's own model."""
    if name in REGISTERED:
        return str(REGISTERED[name].__module__), str(getattr(REGISTERED[name], "__qualname__", name))
    module, _, factory = name.partition(":")
    return module, factory


def build_own(name: str, factory: Factory, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that `factory` makes, with the normalisation inside.

    The factory is called with those of num_classes and in_chans that it takes, and with all other arguments. If it takes
    `mean` and `std`, it normalises by itself; otherwise its model is wrapped.

    Raises:
        UserError: it does not take the arguments, fails, or does not return a module.
    """
    given = dict(arguments)
    taken = inspect.signature(factory).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    itself = {"mean", "std"} <= set(taken)
    constants = {} if itself else {key: given.pop(key, None) for key in ("mean", "std")}
    num_classes, in_chans = given.get("num_classes"), given.get("in_chans", 3)
    for key in ("num_classes", "in_chans"):
        if key not in taken and not anything:
            given.pop(key, None)
    try:
        model = factory(**given)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        why = f"{reason(error)}{location(error)}"
        raise UserError(f"The model '{name}' does not take these arguments (model.kwargs): {why}.") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"The model '{name}' is a {type(model).__name__}; it must be a torch.nn.Module.")
    if num_classes is None:
        num_classes = getattr(model, "num_classes", None)
    if not isinstance(num_classes, int):
        raise UserError(f"The number of classes of '{name}' is not known. Give num_classes=.")
    if itself:
        for key, value in (("num_classes", num_classes), ("in_chans", in_chans)):
            if not hasattr(model, key):
                setattr(model, key, value)
        return model
    return NormalisedModel(model, num_classes, int(in_chans), constants["mean"], constants["std"])
