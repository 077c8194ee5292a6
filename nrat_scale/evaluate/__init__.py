"""Evaluation: `python -m nrat_scale.evaluate WHAT --data SHARDS`."""
