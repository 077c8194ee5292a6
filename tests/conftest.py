"""The import path of processes that tests start, one thread, and the shared fixtures."""

import os
from pathlib import Path

import torch

pytest_plugins = ["tests.support.fixtures"]

# Processes that tests start import tools/ and tests/ as pytest does.
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT), str(_ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

torch.set_num_threads(1)  # more threads slow down the small models of the tests
