"""Fault campaigns: kill, stop and damage real runs, and count what was lost."""
