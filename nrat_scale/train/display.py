"""What a run tells while it trains: rows of metrics.jsonl, one bar or plain lines, TensorBoard, a profile.

metrics.jsonl has no times in it, so that an interrupted run ends with the same bytes; speeds are shown and sent to the
trackers.
"""

import sys
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from nrat_scale.train.metrics import averages, total_sums
from nrat_scale.train.state import SUMS, TrainState

# ---- on the screen --------------------------------------------------------------------------------------------------


class Progress:
    """One bar on rank 0, or a line every `train.log_every` steps where nobody watches a terminal."""

    def __init__(self, state: TrainState) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = state.accelerator.is_main_process
        self._bar = tqdm(
            total=state.last_step,
            initial=state.step,
            desc=state.recipe.name,
            unit="step",
            disable=not (self._shown and self._terminal),
        )
        self._before = total_sums(state)
        self._step = state.step
        state.clock.lap()

    def update(self, state: TrainState, lr: float) -> None:
        """After each step. Every `train.log_every` steps all ranks add up what they saw since the last time."""
        self._bar.n = state.step
        self._bar.update(0)
        if state.step % state.recipe.train.log_every == 0:
            with state.clock.section("logging"):
                self._tell(state, lr)

    def _tell(self, state: TrainState, lr: float) -> None:
        sums, steps = total_sums(state), state.step - self._step
        if sums["images"] <= self._before["images"]:  # an epoch has ended, or training was rewound
            self._before = dict.fromkeys(SUMS, 0.0)
        recent = averages(state, {key: sums[key] - self._before[key] for key in SUMS})
        elapsed, seconds = state.clock.lap()
        self._before, self._step = sums, state.step
        if steps <= 0 or elapsed <= 0 or not self._shown:
            return
        speed = steps * state.recipe.data.batch_size / elapsed
        share = seconds["attack"] / elapsed
        left = timedelta(seconds=round((state.last_step - state.step) * elapsed / steps))
        named = {"loss": recent["loss"], "natural": recent["natural_accuracy"], "robust": recent["robust_accuracy"]}
        state.accelerator.log(
            {"speed/images_per_second": speed, "speed/attack_share": share}
            | {f"recent/{key}": value for key, value in recent.items() if value is not None},
            step=state.step,
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
            epoch = (state.step - 1) // state.data.steps_per_epoch + 1
            self.line(
                f"step {state.step}/{state.last_step}  epoch {epoch}/{state.recipe.train.epochs}  {text}  "
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
