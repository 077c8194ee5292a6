"""Checkpoints: whole or not there, verified before anything is read."""
