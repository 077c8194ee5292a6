"""nrat_scale: adversarially robust image classifiers from generated data and noisy labels, at scale.

Importing the package is cheap: torch and timm are imported when an attribute or a submodule that needs them is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.loading.load import load
    from nrat_scale.loading.robustbench import register_robustbench

__version__ = "0.1.0"
__all__ = ["__version__", "load", "register_robustbench"]

_LAZY = {"load": "nrat_scale.loading.load", "register_robustbench": "nrat_scale.loading.robustbench"}
_PUBLIC = ("attacks", "labels", "loading", "losses", "models", "objectives", "recipe", "weights")


def __getattr__(name: str) -> Any:
    """The public functions and modules, imported when they are first used."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PUBLIC:
        return importlib.import_module(f"nrat_scale.{name}")
    raise AttributeError(f"module 'nrat_scale' has no attribute '{name}'")
