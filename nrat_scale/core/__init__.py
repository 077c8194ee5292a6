"""Errors, files, seeds, processes and module modes: what everything else builds on."""
