"""Data preparation: `python -m nrat_scale.prepare KIND ... --out DIR`."""
