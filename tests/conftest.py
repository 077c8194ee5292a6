"""The import signal
import path of processes that tests start, one thread, and the shared fixtures."""

import os
import signal
from pathlib import Path

import torch
from hypothesis import settings

pytest_plugins = ["tests.support.fixtures"]

# Processes that tests start import tools/ and tests/ as pytest does.
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT), str(_ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

settings.register_profile("tests", deadline=None, derandomize=True)  # a busy machine is slow at times
settings.load_profile("tests")

torch.set_num_threads(1)  # more threads slow down the small models of the tests

# nohup ignores SIGHUP, and a shell's `&` SIGINT and SIGQUIT; the processes that tests start would inherit that.
for _number, _usual in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)
