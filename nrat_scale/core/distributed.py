"""Several processes of one launch: join them, act on the main process, share its result."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list

from nrat_scale.core.errors import UserError


def join_processes(*, on_cpu: bool = False) -> PartialState:
    """Join the processes of this launch, over gloo on CPUs (Accelerate does not choose it by itself).

    The timeout is two days, because evaluation ranks may wait hours for each other; the launcher detects dead ranks.
    """
    cpu = on_cpu or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=datetime.timedelta(days=2))


@contextlib.contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Inside the block an `Accelerator` starts anew, as in a new process; afterwards an earlier one is as before.

    Accelerate keeps the device and the precision of the first `Accelerator` of a process, in class attributes. The processes
    of a launch stay joined: only a single process forgets its device.
    """
    singletons: list[Any] = [AcceleratorState, GradientState]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        singletons.append(PartialState)
    before = [dict(singleton._shared_state) for singleton in singletons]
    for singleton in singletons:
        singleton._shared_state.clear()
    try:
        yield
    finally:
        for singleton, values in zip(singletons, before, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(values)


def use_all_cores(threads: int | None = None) -> int:
    """Set torch's threads of this process on CPUs, and return their number.

    `threads` if given; else OMP_NUM_THREADS; else this process's share of the cores. For users who have not set it,
    `torchrun` sets OMP_NUM_THREADS=1 when it starts several processes, and `accelerate launch` always, so 1 counts as not
    set there.
    """
    number = threads or _omp_num_threads()
    if number is None:
        number = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(number)
    return number


def launcher() -> str | None:
    """The launcher that started this process, `torchrun` or `accelerate launch`; None for Python itself."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return "torchrun"
    return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else None


def _omp_num_threads() -> int | None:
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested parallel regions
    # OpenMP ignores what is not a positive number, too.
    number = int(first) if first.isascii() and first.isdigit() else 0
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    set_by_launcher = number == 1 and (several or launcher() == "accelerate launch")
    return None if number == 0 or set_by_launcher else number


def on_main(state: Any, action: Callable[[], Any]) -> Any:
    """Run `action` on the main process while the others wait; returns its result there and None on the others.

    A `UserError` is raised on every process, so that no rank waits for one that has exited.
    """
    result, message = None, [""]
    if state.is_main_process:
        try:
            result = action()
        except UserError as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0]:
        raise UserError(message[0])
    return result


def known_to_all(state: Any, action: Callable[[], Any]) -> Any:
    """Run `action` on the main process and return its result on every process; errors as in `on_main`."""
    result = [on_main(state, action)]
    broadcast_object_list(result)
    return result[0]
