"""What a new process would have: Accelerate keeps one state per process, and training changes settings of torch."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState


@contextlib.contextmanager
def new_process() -> Iterator[None]:
    """Train inside the block as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Each test of the folder that imports this fixture runs in a `new_process`."""
    with new_process():
        yield
