"""Several processes of one launch: join them, act on the main process, share its result."""

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from nrat_scale.core.errors import UserError


def join_processes(*, on_cpu: bool = False) -> PartialState:
    """Join the processes of this launch, over gloo on CPUs (Accelerate does not choose it by itself).

    The timeout is two days, because evaluation ranks may wait hours for each other; the launcher detects dead ranks.
    """
    cpu = on_cpu or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=datetime.timedelta(days=2))


def use_all_cores() -> None:
    """Run torch on this process's share of the cores; `accelerate launch` on CPUs sets OMP_NUM_THREADS=1."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores))


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
