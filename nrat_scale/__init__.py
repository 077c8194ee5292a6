"""nrat_scale: adversarially robust image classifiers from generated data and noisy labels, at scale."""

import importlib
from types import ModuleType

from nrat_scale.models import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_PUBLIC = ("attacks", "labels", "models", "objectives", "recipe", "weights")


def __getattr__(name: str) -> ModuleType:
    """`nrat_scale.recipe` and the other public modules, imported when they are first asked for."""
    if name in _PUBLIC:
        return importlib.import_module(f"nrat_scale.{name}")
    raise AttributeError(f"module 'nrat_scale' has no attribute '{name}'")
