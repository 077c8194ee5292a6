"""What a run tells while it trains: rows of metrics.jsonl, one bar or plain lines, TensorBoard, a profile.

metrics.jsonl has no times in it, so that an interrupted run ends with the same bytes; speeds are shown and sent to the
trackers.
"""

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from nrat_scale.clock import SECTIONS
from nrat_scale.errors import UserError
from nrat_scale.files import make_folder, write_atomically
from nrat_scale.step import SUMS, Training

_PROFILE_AFTER = 2  # steps, in which caches fill and kernels are chosen


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def log(t: Training, row: dict[str, Any]) -> None:
    """Append one row to metrics.jsonl and show it to the trackers. Where the disk is full it is written with the next."""
    if not t.accelerator.is_main_process:
        return
    t.metrics.append(json.dumps(row, allow_nan=False))
    try:
        write_atomically(t.run / "metrics.jsonl", "".join(line + "\n" for line in t.metrics))
    except UserError as error:
        t.accelerator.print(f"warning: {error} The run goes on.")
    values = {key: value["accuracy"] if isinstance(value, dict) else value for key, value in row.items()}
    numbers = {f"{row['kind']}/{k}": v for k, v in values.items() if isinstance(v, float)}
    t.accelerator.log(numbers, step=row["step"])


def close_epoch(t: Training, epoch: int, lr: float) -> dict[str, Any]:
    """The row of the epoch that ends, and new sums for the next."""
    sums = _total(t)
    t.sums.zero_()
    return {"kind": "train", "epoch": epoch, "step": t.step, **averages(t, sums), "lr": lr}


def _total(t: Training) -> dict[str, float]:
    return dict(zip(SUMS, t.accelerator.reduce(t.sums.clone(), "sum").tolist(), strict=True))


def averages(t: Training, sums: Mapping[str, float]) -> dict[str, float | None]:
    """Means over the images (gradient norm: the steps) that `sums` counts; None for what this run has none of."""

    def share(part: str, whole: str) -> float | None:
        return sums[part] / sums[whole] if sums[whole] else None

    family = t.objective.family
    return {
        "loss": share("loss", "images"),
        "natural_accuracy": share("natural", "images") if family != "at" else None,
        "robust_accuracy": share("robust", "images") if family != "natural" else None,
        "clean_accuracy": share("clean_fitted", "clean"),
        "noisy_memorised": share("noisy_fitted", "noisy"),
        "noisy_corrected": share("noisy_corrected", "noisy"),
        "grad_norm": share("grad_norm", "steps"),
    }


# ---- on the screen --------------------------------------------------------------------------------------------------


class Progress:
    """One bar on rank 0, or a line every `train.log_every` steps where nobody watches a terminal."""

    def __init__(self, t: Training) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = t.accelerator.is_main_process
        self._bar = tqdm(
            total=t.last_step,
            initial=t.step,
            desc=t.recipe.name,
            unit="step",
            disable=not (self._shown and self._terminal),
        )
        self._before = _total(t)
        self._step = t.step
        t.clock.lap()

    def update(self, t: Training, lr: float) -> None:
        """After each step. Every `train.log_every` steps all ranks add up what they saw since the last time."""
        self._bar.n = t.step
        self._bar.update(0)
        if t.step % t.recipe.train.log_every == 0:
            with t.clock.section("logging"):
                self._tell(t, lr)

    def _tell(self, t: Training, lr: float) -> None:
        sums, steps = _total(t), t.step - self._step
        if sums["images"] <= self._before["images"]:  # an epoch has ended, or training was rewound
            self._before = dict.fromkeys(SUMS, 0.0)
        recent = averages(t, {key: sums[key] - self._before[key] for key in SUMS})
        elapsed, seconds = t.clock.lap()
        self._before, self._step = sums, t.step
        if steps <= 0 or elapsed <= 0 or not self._shown:
            return
        speed = steps * t.recipe.data.batch_size / elapsed
        share = seconds["attack"] / elapsed
        left = timedelta(seconds=round((t.last_step - t.step) * elapsed / steps))
        named = {"loss": recent["loss"], "natural": recent["natural_accuracy"], "robust": recent["robust_accuracy"]}
        t.accelerator.log(
            {"speed/images_per_second": speed, "speed/attack_share": share}
            | {f"recent/{key}": value for key, value in recent.items() if value is not None},
            step=t.step,
        )
        losses = "  ".join(
            f"{key} {value:.3f}" if key == "loss" else f"{key} {100 * value:.1f} %"
            for key, value in named.items()
            if value is not None
        )
        text = f"{losses}  lr {lr:.3g}  {speed:.4g} img/s  attack {100 * share:.0f} %"
        if self._terminal:
            self._bar.set_postfix_str(text)
        else:
            epoch = (t.step - 1) // t.data.steps_per_epoch + 1
            self.line(
                f"step {t.step}/{t.last_step}  epoch {epoch}/{t.recipe.train.epochs}  {text}  "
                f"gradient {recent['grad_norm'] or 0.0:.3g}  ETA {left}"
            )

    def epoch(self, row: dict[str, Any]) -> None:
        """Say what an epoch or a validation gave."""
        what = "validation" if row["kind"] == "validation" else "training"
        values = {
            "natural": row.get("natural", row.get("natural_accuracy")),
            row.get("attack", "robust"): row.get("robust", row.get("robust_accuracy")),
            "clean labels fitted": row.get("clean_accuracy"),
            "noisy labels memorised": row.get("noisy_memorised"),
        }
        plain = {key: value["accuracy"] if isinstance(value, dict) else value for key, value in values.items()}
        text = ", ".join(f"{key} {100 * value:.1f} %" for key, value in plain.items() if value is not None)
        self.line(f"epoch {row['epoch']}: {what} {text}")

    def line(self, text: str) -> None:
        """A line above the bar."""
        if self._shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """The bar has done its work."""
        self._bar.close()


# ---- a profile ------------------------------------------------------------------------------------------------------


class Profile:
    """torch's profiler over `num_steps` steps, begun after the first two; 0 for none."""

    def __init__(self, t: Training, num_steps: int) -> None:
        self._first, self._num_steps = t.step + _PROFILE_AFTER, num_steps
        self._profiler: Any = None
        if num_steps and t.last_step < self._first + num_steps:
            t.accelerator.print(
                f"warning: there will be no profile: {t.last_step - t.step} steps are left, and --profile {num_steps} takes "
                f"{num_steps + _PROFILE_AFTER}."
            )

    def update(self, t: Training) -> None:
        """Before each step, and after the last."""
        if not self._num_steps:
            return
        if t.step == self._first:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            t.clock.lap()
            self._profiler = profile(activities=kinds)
            self._profiler.__enter__()
        elif self._profiler is not None and t.step == self._first + self._num_steps:
            elapsed, seconds = t.clock.lap()
            self._profiler.__exit__(None, None, None)
            if t.accelerator.is_main_process:
                self._write(t, elapsed, seconds)
            self._profiler = None

    def _write(self, t: Training, elapsed: float, seconds: dict[str, float]) -> None:
        folder = t.run / "profile"
        make_folder(folder)
        path = folder / f"steps-{self._first + 1}-{t.step}.json"
        self._profiler.export_chrome_trace(str(path))
        rows = [*((name, seconds[name]) for name in SECTIONS), ("other", elapsed - sum(seconds.values()))]
        print(f"profile of steps {self._first + 1} to {t.step} (chrome://tracing opens {path}):")
        for name, value in rows:
            print(f"  {name:<10} {1e3 * value / self._num_steps:9.1f} ms a step  {100 * value / elapsed:5.1f} %")
        print(f"  {'all':<10} {1e3 * elapsed / self._num_steps:9.1f} ms a step", flush=True)
