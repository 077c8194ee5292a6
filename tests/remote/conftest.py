"""Fixtures of the tests of remote files."""

from collections.abc import Iterator

import pytest

import nrat_scale.remote.transfer
from tests.support.contents import random_bytes
from tests.support.http_server import HttpServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a millisecond, and no proxy between the tests and their server."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    """A server without faults that has /a.tar of 50,000 bytes."""
    with HttpServer(files={"/a.tar": random_bytes(50_000)}) as running:
        yield running
