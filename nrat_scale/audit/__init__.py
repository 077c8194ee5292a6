"""How many labels are wrong: `python -m nrat_scale.audit SHARDS`, or `audit` from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrat_scale.audit.api import audit

__all__ = ["audit"]


def __getattr__(name: str) -> Any:
    """Import `audit` when it is first used: importing the package stays cheap."""
    if name == "audit":
        from nrat_scale.audit.api import audit

        return audit
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
