"""timing.jsonl: hardware, seconds and throughput of a run.

They differ between equal runs, hence are not in metrics.jsonl. A resumed run appends: a `start` row, then its own rows.
"""

import json
import time
from datetime import UTC, datetime
from typing import Any

import torch

import nrat_scale
from nrat_scale.core.errors import warn
from nrat_scale.evaluate.key import machine_facts
from nrat_scale.train.state import TrainState


class Timing:
    """Appends the rows of one process of training; a failure to write is a warning and ends nothing."""

    def __init__(self, state: TrainState) -> None:
        self._state, self._works = state, state.accelerator.is_main_process
        self._began = self._epoch_began = time.perf_counter()
        self._steps = 0  # of the epoch so far, those that a rewind repeats included
        device = state.accelerator.device
        self._append(
            {
                "kind": "start",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": device.type,
                **machine_facts(device, state.accelerator.num_processes),
                "precision": state.recipe.precision,
                "versions": {"nrat_scale": nrat_scale.__version__, "torch": torch.__version__},
            }
        )

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def epoch(self) -> None:
        """End an epoch; call it once the metrics of the epoch are on the host, so that the device has finished its steps."""
        now = time.perf_counter()
        seconds, images = now - self._epoch_began, self._steps * self._state.recipe.data.batch_size
        row = {"kind": "epoch", "epoch": self._state.step // self._state.data.steps_per_epoch, "images": images}
        row |= {"seconds": round(seconds, 3), "images_per_second": round(images / seconds, 2)}
        if self._state.accelerator.device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self._state.accelerator.device)
        self._append(row)
        self.resume()

    def validation(self, epoch: int, seconds: float) -> None:
        """Record a validation."""
        self._append({"kind": "validation", "epoch": epoch, "seconds": round(seconds, 3)})

    def resume(self) -> None:
        """Start the clock of the next epoch: validations and checkpoints do not count."""
        self._epoch_began, self._steps = time.perf_counter(), 0

    def close(self) -> None:
        """Record how long this process trained, all included."""
        self._append({"kind": "end", "seconds": round(time.perf_counter() - self._began, 3)})

    def _append(self, row: dict[str, Any]) -> None:
        owner, path = self._state.owner, self._state.run.timing
        if not self._works or (owner is not None and owner.replaced_by is not None):
            return
        line = json.dumps({**row, "step": self._state.step}, allow_nan=False)
        try:
            with open(path, "a+b") as file:
                # A killed process may have left half a line.
                size = file.seek(0, 2)
                whole = not size or (file.seek(size - 1), file.read(1))[1] == b"\n"
                file.write((("" if whole else "\n") + line + "\n").encode())
        except OSError as error:
            self._works = False
            warn(f"{path} cannot be written ({error.strerror}). Training continues without timing.")
