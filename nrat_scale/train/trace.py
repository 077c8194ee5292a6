"""torch's profiler over a few steps of a run."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nrat_scale.core.files import make_folder
from nrat_scale.train.profiling import SECTIONS
from nrat_scale.train.state import TrainState

_PROFILE_AFTER = 2  # steps, in which caches fill and kernels are chosen


# ---- a profile ------------------------------------------------------------------------------------------------------


class Profile:
    """torch's profiler over `num_steps` steps, begun after the first two; 0 for none."""

    def __init__(self, state: TrainState, num_steps: int) -> None:
        self._first, self._num_steps = state.step + _PROFILE_AFTER, num_steps
        self._profiler: Any = None
        if num_steps and state.last_step < self._first + num_steps:
            state.accelerator.print(
                f"warning: there will be no profile: {state.last_step - state.step} steps are left, and --profile {num_steps} takes "
                f"{num_steps + _PROFILE_AFTER}."
            )

    def update(self, state: TrainState) -> None:
        """Before each step, and after the last."""
        if not self._num_steps:
            return
        if state.step == self._first:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            state.clock.lap()
            self._profiler = profile(activities=kinds)
            self._profiler.__enter__()
        elif self._profiler is not None and state.step == self._first + self._num_steps:
            elapsed, seconds = state.clock.lap()
            self._profiler.__exit__(None, None, None)
            if state.accelerator.is_main_process:
                self._write(state, elapsed, seconds)
            self._profiler = None

    def _write(self, state: TrainState, elapsed: float, seconds: dict[str, float]) -> None:
        folder = state.run / "profile"
        make_folder(folder)
        path = folder / f"steps-{self._first + 1}-{state.step}.json"
        self._profiler.export_chrome_trace(str(path))
        rows = [*((name, seconds[name]) for name in SECTIONS), ("other", elapsed - sum(seconds.values()))]
        print(f"profile of steps {self._first + 1} to {state.step} (chrome://tracing opens {path}):")
        for name, value in rows:
            print(f"  {name:<10} {1e3 * value / self._num_steps:9.1f} ms a step  {100 * value / elapsed:5.1f} %")
        print(f"  {'all':<10} {1e3 * elapsed / self._num_steps:9.1f} ms a step", flush=True)
