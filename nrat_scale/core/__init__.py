"""Shared by every package: errors, files, run directories, seeds, processes, module modes, HTML pages."""
