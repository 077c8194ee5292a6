"""TensorBoard events of a run. A failure to write them is a warning; it neither ends nor changes the run."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import first_line, warn


class Tracker:
    """Writes numbers to TensorBoard event files in `folder`, on the main process only (`folder` is None on the others).

    After the first failure, whatever it is (disk full, `folder` is a file, TensorBoard cannot be imported), it warns and
    writes nothing more.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        self._hook = threading.excepthook
        if folder is None:
            return
        with self._warned():
            # Not at the top: the import may fail, and takes a second.
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._print_unless_tracking
            self._writer = SummaryWriter(str(folder))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Write `numbers`, named by their keys, at an optimizer step."""
        if self._writer is None:
            return
        with self._warned():
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, global_step=step)
            self._writer.flush()  # raises what failed in the writer's thread

    def close(self) -> None:
        """End the event file."""
        if self._writer is not None:
            with self._warned():
                self._writer.close()
        self._writer = None
        threading.excepthook = self._hook

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of TensorBoard, protobuf, numpy or the file system
            self._writer = None
            warn(f"No more TensorBoard events: {first_line(error)}. Training continues; metrics.jsonl has its metrics.")

    def _print_unless_tracking(self, failed: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread that ended with an exception; `flush` reports that of TensorBoard's thread."""
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._hook(failed)
