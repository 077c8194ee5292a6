"""Releases: `python -m nrat_scale.release RUN --to DIR`, or `release` from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.release.api import release

__all__ = ["release"]


def __getattr__(name: str) -> Any:
    """Import `release` when it is first used: importing the package stays cheap."""
    if name == "release":
        from nrat_scale.release.api import release

        return release
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
