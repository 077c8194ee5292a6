"""Benchmarks of the training step, the data plane and data preparation."""
