"""nrat_scale: adversarially robust image classifiers from generated data and noisy labels, at scale."""

import importlib
import sys
from typing import Any

if sys.modules.get("torch", True):  # None: a process of tools/shard_dataset.py, which needs no models
    from nrat_scale.loading import load, register_robustbench

__version__ = "0.1.0"
__all__ = ["__version__", "load", "register_robustbench"]

_PUBLIC = ("attacks", "labels", "loading", "models", "objectives", "recipe", "weights")


def __getattr__(name: str) -> Any:
    """`nrat_scale.recipe` and the other public modules, imported when they are first asked for."""
    if name in ("load", "register_robustbench"):
        return getattr(importlib.import_module("nrat_scale.loading"), name)
    if name in _PUBLIC:
        return importlib.import_module(f"nrat_scale.{name}")
    raise AttributeError(f"module 'nrat_scale' has no attribute '{name}'")
