"""Training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`, or `train` from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.train.api import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """Import `train` when it is first used: importing the package stays cheap."""
    if name == "train":
        from nrat_scale.train.api import train

        return train
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
