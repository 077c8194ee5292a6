"""nrat_scale: adversarially robust image classifiers from generated data and noisy labels, at scale."""

from nrat_scale.models import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]
