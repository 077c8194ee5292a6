"""Reports: `python -m nrat_scale.report RUN [RUN ...]`, or `report` from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.report.api import report

__all__ = ["report"]


def __getattr__(name: str) -> Any:
    """Import `report` when it is first used: importing the package stays cheap."""
    if name == "report":
        from nrat_scale.report.api import report

        return report
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
