"""Data preparation: `python -m nrat_scale.prepare KIND ... --out DIR`, or `write_shards` from Python."""

from nrat_scale.prepare.dataset import write_shards

__all__ = ["write_shards"]
