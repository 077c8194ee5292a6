"""Load released models, weight files of other projects and timm's models."""
