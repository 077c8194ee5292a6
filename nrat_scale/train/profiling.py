"""The time of training steps: seconds per section, and torch's profiler (`--profile N`)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nrat_scale.core.errors import UserError, first_line, warn
from nrat_scale.core.files import make_folder

if TYPE_CHECKING:
    from nrat_scale.train.state import TrainState

SECTIONS = ("data", "attack", "outer", "optimizer", "logging")
_WARMUP_STEPS = 2  # caches fill, kernels are chosen


class Clock:
    """Seconds spent in each of SECTIONS: by CUDA events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []  # section, begin, end
        self._began = time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`; a profiler shows the block under this name."""
        assert name in SECTIONS, name
        now = _recorded_event if self._cuda and name not in ("data", "logging") else time.perf_counter
        with record_function(name):
            begin = now()
            try:
                yield
            finally:
                self._spans.append((name, begin, now()))

    def lap(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last lap, seconds by section); on a GPU it waits for the events of the lap."""
        seconds = dict.fromkeys(SECTIONS, 0.0)
        for name, begin, end in self._spans:
            if isinstance(end, float):
                seconds[name] += end - begin
            else:
                end.synchronize()
                seconds[name] += begin.elapsed_time(end) / 1e3
        began, self._began, self._spans = self._began, time.perf_counter(), []
        return self._began - began, seconds


def _recorded_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Profile:
    """torch's profiler over `num_steps` steps after two of warm-up; 0 for none."""

    def __init__(self, state: "TrainState", num_steps: int) -> None:
        self._first, self._num_steps = state.step + _WARMUP_STEPS, num_steps
        self._profiler: Any = None
        needed, left = num_steps + _WARMUP_STEPS, state.last_step - state.step
        if num_steps and left < needed:
            state.accelerator.print(f"warning: no profile: --profile {num_steps} needs {needed} steps, {left} remain.")

    def update(self, state: "TrainState") -> None:
        """Start or end the profile; call it before each step and after the last."""
        if self._num_steps and state.step == self._first:
            state.clock.lap()
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=kinds)
            self._profiler.start()
        elif self._profiler is not None and state.step == self._first + self._num_steps:
            elapsed, seconds = state.clock.lap()
            self._profiler.stop()
            if state.accelerator.is_main_process:
                self._write(state, elapsed, seconds)
            self._profiler = None

    def _write(self, state: "TrainState", elapsed: float, seconds: dict[str, float]) -> None:
        path = state.run.profile / f"steps-{self._first + 1}-{state.step}.json"
        try:
            make_folder(state.run.profile)
            self._profiler.export_chrome_trace(str(path))
        except (UserError, OSError, RuntimeError) as error:
            warn(f"The profile is not written: {first_line(error)}. Training continues.")
        print(f"profile of steps {self._first + 1} to {state.step} (chrome://tracing opens {path}):")
        for name, value in (seconds | {"other": elapsed - sum(seconds.values())}).items():
            print(f"  {name:<10} {1e3 * value / self._num_steps:9.1f} ms a step  {100 * value / elapsed:5.1f} %")
        print(f"  {'all':<10} {1e3 * elapsed / self._num_steps:9.1f} ms a step", flush=True)
