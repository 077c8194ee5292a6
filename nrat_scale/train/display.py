"""Progress of a run: a bar on a terminal, else plain lines, and speeds for TensorBoard; output that may fail.

Speeds are not written to metrics.jsonl, so that an interrupted run ends with the same bytes as an uninterrupted one.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TextIO

import torch
from tqdm import tqdm

from nrat_scale.attacks import attack_text
from nrat_scale.cost import forward_equivalents
from nrat_scale.train.metrics import METRICS, PARTIAL, averages, percent, sum_names, total_sums
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import reuses_natural
from nrat_scale.train.throughput import forward_flops, peak_tflops


class Progress:
    """A bar on rank 0 if stderr is a terminal, else a line every `train.log_every` steps."""

    def __init__(self, state: TrainState) -> None:
        self._terminal, self._shown = sys.stderr.isatty(), state.accelerator.is_main_process
        hidden = not (self._shown and self._terminal)
        self._bar = tqdm(total=state.last_step, initial=state.step, desc=state.recipe.name, unit="step", disable=hidden)
        self._known = state.data.known_before
        self._before = total_sums(state)
        self._step = state.step
        self._phase = state.recipe.threat.phase(state.progress)
        self._utilisation = _utilisation(state)
        self._first_step, self._training_seconds, self._mark = state.step, 0.0, time.perf_counter()
        state.clock.lap()

    def update(self, state: TrainState, lr: float) -> None:
        """Call it after each step on all ranks: every `train.log_every` steps it sums the metrics over ranks."""
        now = time.perf_counter()
        self._training_seconds, self._mark = self._training_seconds + now - self._mark, now
        self._bar.n = state.step
        self._bar.update(0)
        self._announce_phase(state)
        if state.step % state.recipe.train.log_every == 0:
            with state.clock.section("logging"):
                self._report(state, lr)

    def _report(self, state: TrainState, lr: float) -> None:
        """Show and log the metrics and the speed since the last report."""
        sums, steps = total_sums(state), state.step - self._step
        if sums["images"] <= self._before["images"]:  # the sums were cleared at the end of an epoch, or by a rewind
            self._before = dict.fromkeys(sum_names(), 0.0)
        recent = averages(state, {name: sums[name] - self._before[name] for name in sums})
        elapsed, seconds = state.clock.lap()
        self._before, self._step = sums, state.step
        if steps <= 0 or elapsed <= 0 or not self._shown:
            return
        speed, share = steps * state.recipe.data.batch_size / elapsed, seconds["attack"] / elapsed
        known = {name: value for name, value in recent.items() if value is not None}
        numbers = {"speed/images_per_second": speed, "speed/attack_share": share}
        state.trackers.log(numbers | {f"recent/{name}": known[name] for name in known}, state.step)
        shown = {name: METRICS[name] for name in known if METRICS[name].progress}
        texts = [f"{metric.progress} {metric.show(known[name])}" for name, metric in shown.items()]
        place = (state.step - 1) // state.data.steps_per_epoch
        used = f" ({self._utilisation(speed, place)})" if self._utilisation else ""
        if phases := state.recipe.threat.schedule:
            texts.append(
                f"phase {state.recipe.threat.phase((state.step - 1) / state.total_steps) + 1}/{len(phases) + 1}"
            )
        text = "  ".join([*texts, f"lr {lr:.3g}", f"{speed:.4g} img/s{used}", f"attack {100 * share:.0f} %"])
        if self._terminal:
            self._bar.set_postfix_str(text)
            return
        epoch = f"epoch {place + 1}/{state.recipe.train.epochs}"
        left = timedelta(seconds=round((state.last_step - state.step) * elapsed / steps))
        self._line(f"step {state.step}/{state.last_step}  {epoch}  {text}  ETA {left}")

    def _announce_phase(self, state: TrainState) -> None:
        """A line if the next step is the first of a phase of `threat.schedule`."""
        phase = state.recipe.threat.phase(state.progress)
        if phase != self._phase and state.step < state.total_steps:
            number, of = phase + 1, len(state.recipe.threat.schedule) + 1
            self._line(
                f"phase {number}/{of} from step {state.step}: the attack of training takes {attack_text(state.threat)}"
            )
        self._phase = phase

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the row of an epoch or of a validation."""
        if row["kind"] == "validation":
            what, named = "validation", {"natural": row["natural"], row["attack"]: row["robust"]}
            texts = [f"{name} {percent(value['accuracy'])}" for name, value in named.items()]
        else:
            of = f" (step {row['step']}, {row['steps_of_epoch']} of the epoch)" if row["kind"] == PARTIAL else ""
            what, shown = f"training{of}", {name: metric for name, metric in METRICS.items() if metric.summary}
            names = {name: m.summary if self._known else m.injected or m.summary for name, m in shown.items()}
            texts = [f"{names[name]} {m.show(row[name])}" for name, m in shown.items() if row[name] is not None]
        self._line(f"epoch {row['epoch']}: {what} {', '.join(texts)}")
        if row["kind"] == "validation":
            self._mark = time.perf_counter()  # validating is not training

    def _line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self, state: TrainState) -> None:
        """Remove the bar, and show the speed of the whole call."""
        self._bar.close()
        steps = state.step - self._first_step
        if steps > 0 and self._training_seconds > 0:
            speed = steps * state.recipe.data.batch_size / self._training_seconds
            used = f", {self._utilisation(speed, None)}" if self._utilisation else ""
            self._line(f"speed: {speed:.4g} images/s over {steps} steps{used}; validation not counted")


def _utilisation(state: TrainState) -> Callable[[float, int | None], str] | None:
    """(images/s, epoch from 0, None for all) -> the share of the cards' bf16 peak in words; None without a card in the table."""
    device = state.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_tflops(name)
    if peak is None:
        return None
    flops: float = forward_flops(state.attack_model.module, state.data.shards.image_shape)
    available, reuses = peak * 1e12 * state.accelerator.num_processes, reuses_natural(state)

    def share(speed: float, epoch: int | None) -> str:
        cost = flops * forward_equivalents(state.recipe, epoch, reuses_natural=reuses)
        return f"{100 * speed * cost / available:.0f} % of the bf16 peak of {name}"

    return share


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block, a lost terminal, a closed pipe or a full disk under stdout or stderr does not end the run.

    What cannot be written is dropped. A lost terminal or pipe is replaced by /dev/null.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream whose `write` and `flush` do not raise OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EPIPE, errno.ENXIO):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
