"""Each test starts as a new process would."""

from tests.support.accelerate import fresh_accelerate  # noqa: F401  (autouse in this folder)
