"""Trackers of a run: TensorBoard, Weights & Biases, trackio. A failure of one is a warning; it neither ends nor changes the run.

TensorBoard is written directly: Accelerate's tracker lets its errors, also those of its writer's thread, end the training.
The others are Accelerate's trackers, each behind a queue and a daemon thread: a server that hangs cannot hold up a step.
"""

import contextlib
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nrat_scale.core.errors import UserError, first_line, warn
from nrat_scale.core.files import read_json, write_json
from nrat_scale.core.run_folder import RunFolder

PROJECT = "nrat_scale"  # of all runs, in W&B and trackio
_CLOSE_SECONDS = 60.0  # for what is still queued when a run ends
_QUEUED = 1000  # calls; later ones are dropped, with a warning, if a server does not answer
_ID_LOCK = threading.Lock()  # several trackers start at once, each in its thread, and share one id

Values = Mapping[str, bool | int | float | str]


class Tracker(Protocol):
    """One tracker of one run. Every method may raise anything."""

    title: str  # what is missing after a failure, for the warning

    def describe(self, values: Values, text: str) -> None:
        """Store the flattened recipe, and its YAML."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Store numbers at an optimizer step."""

    def images(self, name: str, images: np.ndarray, step: int) -> None:
        """Store a few images, uint8 [n, H, W, C]."""

    def table(self, name: str, markdown: str, step: int) -> None:
        """Store a table."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    title = "TensorBoard events"

    def __init__(self, run: RunFolder) -> None:
        # Not at the top: the import may fail, and takes a second.
        from torch.utils.tensorboard import SummaryWriter

        self._hook = threading.excepthook
        self._writer: Any = SummaryWriter(str(run.tensorboard))
        threading.excepthook = self._print_unless_tracking

    def describe(self, values: Values, text: str) -> None:
        """The HParams page, and the recipe as text."""
        from torch.utils.tensorboard.summary import hparams

        for part in hparams(dict(values), {"validation/natural": 0.0, "validation/robust": 0.0}):
            self._writer.file_writer.add_summary(part)
        self.table("recipe", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Scalars."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()  # raises what failed in the writer's thread

    def images(self, name: str, images: np.ndarray, step: int) -> None:
        """The Images page."""
        self._writer.add_images(name, images, global_step=step, dataformats="NHWC")

    def table(self, name: str, markdown: str, step: int) -> None:
        """The Text page."""
        self._writer.add_text(name, markdown, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _print_unless_tracking(self, failed: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread that ended with an exception; `flush` reports that of TensorBoard's thread."""
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._hook(failed)


class Wandb:
    """A run of W&B, by Accelerate's tracker; offline (RUN/wandb, `wandb sync`) if no key is configured."""

    title = "W&B data"

    def __init__(self, run: RunFolder) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        offline = "WANDB_MODE" not in os.environ and wandb.api.api_key is None  # W&B would ask for a key, and wait
        if offline:
            warn(f"W&B has no API key: the run is stored in {run.path / 'wandb'}, for `wandb sync`.")
        self._tracker: Any = _started(
            WandBTracker(
                PROJECT, name=run.path.name, id=tracking_id(run), resume="allow", dir=str(run.path),
                mode="offline" if offline else None, settings=wandb.Settings(console="off"),
            )
        )  # fmt: skip
        # By our own step: W&B drops what a resumed run repeats at an earlier step than its last.
        self._tracker.tracker.define_metric("*", step_metric="step")

    def describe(self, values: Values, text: str) -> None:
        """The run's config."""
        self._tracker.store_init_configuration(dict(values))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Metrics by `step`."""
        self._tracker.log({**numbers, "step": step})

    def images(self, name: str, images: np.ndarray, step: int) -> None:
        """Media."""
        self._tracker.log_images({name: [image.squeeze(-1) if image.shape[-1] == 1 else image for image in images]})

    def table(self, name: str, markdown: str, step: int) -> None:
        """Nothing: W&B has the numbers as metrics."""

    def close(self) -> None:
        """Upload or store what is left."""
        self._tracker.finish()


class Trackio:
    """A run of trackio, local unless its own variables (TRACKIO_SPACE_ID, ...) say otherwise; by Accelerate's tracker."""

    title = "trackio data"

    def __init__(self, run: RunFolder) -> None:
        from accelerate.tracking import TrackioTracker

        name = f"{run.path.name}-{tracking_id(run)[:6]}"
        self._tracker: Any = _started(TrackioTracker(PROJECT, name=name, resume="allow", embed=False))

    def describe(self, values: Values, text: str) -> None:
        """The run's config."""
        self._tracker.store_init_configuration(dict(values))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Metrics."""
        self._tracker.log(dict(numbers), step=step)

    def images(self, name: str, images: np.ndarray, step: int) -> None:
        """Media."""
        import trackio

        rgb = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
        self._tracker.log({f"{name}/{i}": trackio.Image(image) for i, image in enumerate(rgb)}, step=step)

    def table(self, name: str, markdown: str, step: int) -> None:
        """Nothing: trackio has the numbers as metrics."""

    def close(self) -> None:
        """Store what is left."""
        self._tracker.finish()


# To add a tracker, add an entry: its name in `train.trackers`, its class, whether it runs behind a queue.
TRACKERS: dict[str, tuple[Callable[[RunFolder], Tracker], str, bool]] = {
    "tensorboard": (TensorBoard, TensorBoard.title, False),
    "wandb": (Wandb, Wandb.title, True),
    "trackio": (Trackio, Trackio.title, True),
}


def _without_secrets(text: str) -> str:
    """`text` without user, password and query of the addresses in it."""
    return re.sub(r"(\w+://)(?:[^/\s@]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)


def _started(tracker: Any) -> Any:
    """Accelerate's tracker, connected: since 1.7 its constructor does not do that."""
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def tracking_id(run: RunFolder) -> str:
    """A random id stored in the run, so that a resumed run and its evaluation continue the same tracked run."""
    with _ID_LOCK:
        with contextlib.suppress(UserError):
            if run.tracking.is_file():
                return str(read_json(run.tracking, "id for trackers")["id"])
        write_json(run.tracking, {"id": secrets.token_hex(8)})
        return str(read_json(run.tracking, "id for trackers")["id"])


class _Guarded:
    """A tracker whose failures are one warning, after which nothing more is sent."""

    def __init__(self, name: str, run: RunFolder) -> None:
        make, self._title, self._queued = TRACKERS[name]
        self._tracker: Tracker | None = None
        self._failure: Exception | None = None
        self._warned = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{name}")
        if self._queued:
            self._thread.start()

        def start() -> None:
            self._tracker = make(run)

        self._call(start)

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of the tracker, at once or by its thread."""
        self._call(lambda: getattr(self._tracker, method)(*arguments))

    def close(self) -> None:
        """Close the tracker; a thread that does not answer within a minute is left behind."""
        if self._queued:
            self._call(self._close)
            with contextlib.suppress(queue.Full):
                self._calls.put_nowait(None)
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                self._failure = self._failure or TimeoutError(f"no answer within {_CLOSE_SECONDS:.0f} s")
        elif self._tracker is not None:  # also after a failure, to restore what it has replaced
            self._guard(self._close)
        self._warn()

    def _close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close()

    def _call(self, action: Callable[[], None]) -> None:
        self._warn()
        if self._failure is not None:
            return
        if not self._queued:
            self._guard(action)
        else:
            try:
                self._calls.put_nowait(action)
            except queue.Full:
                self._failure = TimeoutError("it does not answer")
        self._warn()

    def _work(self) -> None:
        while (action := self._calls.get()) is not None:
            if self._failure is None:
                self._guard(action)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of the tracker, protobuf, numpy, the network or the file system
            self._failure = self._failure or error

    def _warn(self) -> None:
        if self._failure is not None and not self._warned:
            self._warned = True
            reason = first_line(self._failure)
            if isinstance(self._failure, ModuleNotFoundError):
                reason = f"{reason}. Install it with: pip install {self._failure.name}"
            warn(f"No more {self._title}: {reason}. Training continues; metrics.jsonl has its metrics.")


class Trackers:
    """The trackers `names` of a run, on the main process only (`run` is None on the others, which send nothing)."""

    def __init__(self, run: RunFolder | None, names: Sequence[str] = ()) -> None:
        self._trackers = [] if run is None else [_Guarded(name, run) for name in names]

    def __bool__(self) -> bool:
        """Whether anything is tracked."""
        return bool(self._trackers)

    def describe(self, recipe: Mapping[str, Any], text: str) -> None:
        """Send the recipe: dotted keys and values, and its YAML."""
        values = {
            key: value if isinstance(value, bool | int | float) else _without_secrets(str(value))
            for key, value in recipe.items()
        }
        self._send("describe", values, _without_secrets(text))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send `numbers`, named by their keys, at an optimizer step."""
        self._send("log", dict(numbers), step)

    def images(self, name: str, images: np.ndarray, step: int) -> None:
        """Send a few images, uint8 [n, H, W, C]."""
        self._send("images", name, images, step)

    def results(self, results: Mapping[str, Any], markdown: str) -> None:
        """Send the accuracies in a results.json as `test/CHECKPOINT/ATTACK`, at the step of their checkpoint, and their table."""
        steps = [0]
        for label, record in results["checkpoints"].items():
            numbers = {f"test/{label}/{attack}": entry["accuracy"] for attack, entry in record["attacks"].items()}
            steps.append(int(record.get("step", 0)))
            self.log(numbers, steps[-1])
        self._send("table", "results", markdown, max(steps))

    def close(self) -> None:
        """End all trackers."""
        for tracker in self._trackers:
            tracker.close()

    def _send(self, method: str, *arguments: Any) -> None:
        for tracker in self._trackers:
            tracker.call(method, *arguments)
