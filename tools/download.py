"""Download published generated data, kept under its old name: the same as `python -m nrat_scale.prepare.download`."""

from nrat_scale.core.errors import run_cli
from nrat_scale.prepare.download import main

if __name__ == "__main__":
    run_cli(main)
