"""Where the time of training steps goes: a clock per section, and torch's profiler on request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

SECTIONS = ("data", "attack", "outer", "optimizer", "logging")


class Clock:
    """Seconds spent in each of SECTIONS: by CUDA events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._began = time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what happens inside; a profiler shows it under this name."""
        assert name in SECTIONS, name
        with record_function(name):
            # The loader and the log are the host's work, whatever the device.
            on_device = self._cuda and name not in ("data", "logging")
            begin = self._now(on_device)
            try:
                yield
            finally:
                end = self._now(on_device)
                if on_device:
                    self._events.append((name, begin, end))
                else:
                    self._seconds[name] += end - begin

    def _now(self, on_device: bool) -> Any:
        if not on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last lap, seconds by section); on a GPU it waits for what was started."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        now = time.perf_counter()
        result = now - self._began, self._seconds
        self._began, self._seconds, self._events = now, dict.fromkeys(SECTIONS, 0.0), []
        return result
