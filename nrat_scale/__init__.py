"""nrat_scale: adversarially robust image classifiers from generated data and noisy labels, at scale.

Importing the package is cheap: torch and timm are imported when an attribute or a submodule first needs them.
`import nrat_scale.models` registers our architectures with timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.data.dataset import open_shards
    from nrat_scale.evaluate.perturb import attack
    from nrat_scale.loading.load import load
    from nrat_scale.loading.robustbench import register_robustbench
    from nrat_scale.report.data_frames import metrics, results

__version__ = "0.1.0"
__all__ = ["__version__", "attack", "load", "metrics", "open_shards", "register_robustbench", "results"]

_FUNCTIONS = {
    "attack": "evaluate.perturb",
    "load": "loading.load",
    "open_shards": "data.dataset",
    "metrics": "report.data_frames",
    "register_robustbench": "loading.robustbench",
    "results": "report.data_frames",
}
_MODULES = (
    "attacks", "audit", "datasets", "evaluate", "labels", "loading", "losses", "models", "objectives", "optim", "prepare", "recipe",
    "release", "report", "train", "weights",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public function or module when it is first used."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"nrat_scale.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"nrat_scale.{name}")
    raise AttributeError(f"module 'nrat_scale' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS, *_MODULES})
