"""Each test runs as in a new process."""

from tests.support.accelerate import fresh_process  # noqa: F401  (autouse in this folder)
