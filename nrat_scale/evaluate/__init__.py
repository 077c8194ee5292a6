"""Evaluation: `python -m nrat_scale.evaluate WHAT --data SHARDS`, or `evaluate` from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.evaluate.api import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import `evaluate` when it is first used: importing the package stays cheap."""
    if name == "evaluate":
        from nrat_scale.evaluate.api import evaluate

        return evaluate
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
