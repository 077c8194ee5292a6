"""Releases: `python -m nrat_scale.release RUN --to DIR`."""
