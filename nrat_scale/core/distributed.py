"""What several processes do together: one acts and all end alike, or all know what one of them knows."""

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from nrat_scale.core.errors import UserError


def join_processes(*, on_cpu: bool = False) -> PartialState:
    """The processes of this launch, joined (over gloo on a CPU, where Accelerate needs to be told so).

    Who has gone is noticed by the launcher, so the processes wait for each other as long as their work takes.
    """
    cpu = on_cpu or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=datetime.timedelta(days=2))


def use_all_cores() -> None:
    """Let torch use this process's share of the machine's cores.

    `accelerate launch` sets OMP_NUM_THREADS=1 on a CPU, which leaves all cores but one idle.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores))


def on_main(state: Any, action: Callable[[], Any]) -> Any:
    """The result of `action` on the main process, None on the others, once it is done.

    A `UserError` is raised on every process: all end alike, and none waits for one that has gone.
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
    """The result of `action`, computed by the main process, on every process; errors as in `on_main`."""
    result = [on_main(state, action)]
    broadcast_object_list(result)
    return result[0]
