"""Processes that run a few lines with nrat_scale.remote."""

import json
import os
import subprocess
import sys
from typing import Any

PRELUDE = """
import json, os, sys
from pathlib import Path
from nrat_scale.core.errors import UserError
from nrat_scale.remote import stores, transfer
from nrat_scale.remote.cache import Cache
transfer.FIRST_PAUSE_SECONDS = 0.001
given = json.loads(sys.argv[1])
def output(value):
    print(json.dumps(value), flush=True)
"""


def started(script: str, given: object, **environment: str | None) -> "subprocess.Popen[str]":
    """Start a process that runs `script` with the variable `given`; the script returns values by `output(value)`.

    Args:
        environment: changes of the environment; None removes a variable.
    """
    changed = {**os.environ, "NO_PROXY": "*", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, json.dumps(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in changed.items() if value is not None},
    )


def outputs(process: "subprocess.Popen[str]") -> list[Any]:
    """The values that the process returned; asserts that it succeeds within two minutes."""
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]
