"""Prepare data: the old name of `python -m nrat_scale.prepare`."""

from nrat_scale.core.errors import run_cli
from nrat_scale.prepare.__main__ import main

if __name__ == "__main__":
    run_cli(main)
