"""The folder for what later runs of the same user read again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """$NRAT_SCALE_CACHE, else nrat_scale in $XDG_CACHE_HOME or ~/.cache; it may not exist."""
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/nrat_scale"
    return Path(os.environ.get("NRAT_SCALE_CACHE") or default).expanduser()
