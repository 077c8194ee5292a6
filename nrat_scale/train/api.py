"""`train` for Python: a function that returns, leaves the process as it was, and needs no command line."""

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nrat_scale.core.distributed import own_accelerate_state
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import RecipeSpec, load_recipe
from nrat_scale.train import loop
from nrat_scale.train.signals import Stopped, StopSignals


@dataclass(frozen=True)
class Training:
    """What `train` returns."""

    run: Path  # the run directory
    recipe: RecipeSpec
    step: int  # optimizer steps done
    complete: bool  # whether the whole schedule is done, and not only `train.max_steps`
    best: dict[str, Any] | None  # the validation row of metrics.jsonl of the best checkpoint; None before the first

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; `nrat_scale.metrics(run)` has them as a table."""
        return RunFolder(self.run).read_metrics()


def train(
    recipe: str | Path | RecipeSpec,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    profile: int = 0,
) -> Training:
    """Train a recipe, or resume it; the same call resumes an interrupted run.

    A signal, such as the interrupt of a notebook, saves the run after the step and is then delivered as usual
    (`KeyboardInterrupt` for SIGINT); a second one ends it at once. Signal handlers, torch's threads and random numbers, and
    Accelerate's state are afterwards as before.

    Args:
        recipe: a YAML file, or a recipe that `load_recipe` has read.
        overrides: of a YAML file: `["train.epochs=2"]` or `{"train.epochs": 2}`.
        profile: number of steps for torch's profiler.

    Raises:
        UserError: see `load_recipe` and `nrat_scale.train.loop.train`.
        FloatingPointError: a step was not finite.
    """
    if isinstance(recipe, RecipeSpec):
        if overrides:
            raise UserError("Overrides are for a YAML file: give its path, or a recipe without overrides.")
        spec = recipe
    else:
        spec = load_recipe(recipe, overrides)
    try:
        with _settings_of_torch(), own_accelerate_state():
            run = RunFolder(loop.train(spec, profile, StopSignals(exits=False)))
    except Stopped as stop:
        print(f"{stop}; the run is saved in {spec.run_dir}. The same call resumes it.", flush=True)
        signal.raise_signal(stop.status - 128)  # to the handler that was there before
        raise
    best, last = ({}, {}) if not run.checkpoints.is_dir() else map(_pointer, (run, run), ("best", "last"))
    rows = run.read_metrics()
    named = [row for row in rows if row.get("kind") == "validation" and row.get("step") == best.get("step")]
    step = int(last.get("step", 0))
    complete = any(row.get("kind") == "train" and row.get("epoch") == spec.train.epochs for row in rows)
    return Training(run.path, spec, step, complete, named[-1] if named else None)


def _pointer(run: RunFolder, name: str) -> dict[str, Any]:
    path = run.pointer(name)
    return read_json(path, "pointer to a checkpoint") if path.is_file() else {}


_SETTINGS = (  # of torch, for the whole process
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.utils.deterministic, "fill_uninitialized_memory"),
)


@contextlib.contextmanager
def _settings_of_torch() -> Iterator[None]:
    """Restore what training sets for the whole process: threads, arithmetic, denormal numbers, the state of generators."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    tiny = torch.full((1,), torch.finfo(torch.float32).tiny)
    flushes = bool((tiny / 2 == 0).all())
    deterministic, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name in _SETTINGS]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)
        torch.set_float32_matmul_precision(matmul)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)
        for owner, name, value in before:
            setattr(owner, name, value)
