"""The training step against the textbook one: speed, forward passes, equality; and what each part of the engine gives."""

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.padding import copy_padding
from bench.textbook import Textbook
from nrat_scale import models
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.train.setup import start
from nrat_scale.train.state import MicroBatch, TrainState
from nrat_scale.train.step import micro_batches, train_step

RECIPE = """
threat: {eps: 8/255, step: 2/255, num_steps: 10}
model: {name: MODEL}
objective: {name: OBJECTIVE}
data:
  batch_size: BATCH
  epoch_samples: 1048576
  real: {shards: SHARDS}
  validation: {size: 16}
optim: {lr: 0.01, schedule: constant}
ema: {decay: 0.995}
guard: {action: none}
train: {log_every: 1000000}
"""
STEPPED = {"nrat": "eval", "trades": "eval", "dm_at": "batch"}  # objective -> BatchNorm mode of the attack


# ---- a run, step by step --------------------------------------------------------------------------------------------


def make_images(folder: Path, n: int = 512) -> Path:
    """Shards of smooth random images, 32 x 32 x 3, whose mean colour depends on the class."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 10
    coarse = generator.integers(0, 160, (n, 8, 8, 3)) + 9 * labels[:, None, None, None]
    images = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    source = LabelledArrays(images, labels, "custom", tuple("0123456789"))
    return write_shards(source, folder / "shards", block_size=128, progress=False)


def write_recipe(work: Path, name: str, model: str, objective: str, batch: int) -> Path:
    """RECIPE over the shards of `make_images`, as a file."""
    text = RECIPE.replace("MODEL", model).replace("OBJECTIVE", objective).replace("BATCH", str(batch))
    path = work / f"{name}.yaml"
    path.write_text(text.replace("SHARDS", str(work / "shards")))
    return path


class Ours:
    """A run of the engine that is stepped by hand."""

    def __init__(self, work: Path, model: str, objective: str, batch: int, *overrides: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        run = work / f"run-{len(list(work.iterdir()))}"
        recipe = load_recipe(write_recipe(work, "run", model, objective, batch), [f"run_dir={run}", *overrides])
        with contextlib.redirect_stdout(io.StringIO()):
            self.state: TrainState = start(recipe)
        self.batches = self.state.data.batches(0, 1 << 14)
        for group in self.state.optimizer.param_groups:
            group["momentum"] = 0.9

    def first_part(self) -> MicroBatch:
        """The first batch, on the device; it does not advance the run."""
        (part,) = micro_batches(self.state, next(self.state.data.batches(0, 1)))
        return part

    def advance(self) -> None:
        """One step; the device may not have finished it when this returns."""
        train_step(self.state, next(self.batches))
        self.state.step += 1

    def step(self) -> None:
        """One step; it is complete on the device when this returns."""
        self.advance()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def textbook(self) -> Textbook:
        """The textbook step over copies of the weights in the default memory format."""
        recipe = self.state.recipe
        return Textbook(_plain_copy(self.state), _plain_copy(self.state), recipe.objective.name)


def _plain_copy(state: TrainState) -> nn.Module:
    model = models.create(state.recipe.model.name, state.recipe.model.kwargs)
    copy_padding(model)  # as public code pads
    model = model.to(state.accelerator.device, next(state.base.parameters()).dtype)
    model.load_state_dict(state.base.state_dict())
    for buffer in ("mean", "std"):
        setattr(model, buffer, getattr(state.base, buffer).clone())
    return model.train()


# ---- what a step computes -------------------------------------------------------------------------------------------


class Flops(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas.

    torch's FlopCounterMode cannot be used: its module tracker fails in `autograd.grad` with respect to a leaf.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def forward_equivalents(model: nn.Module, x: Tensor, action: Callable[[], Any]) -> float:
    """The FLOPs of `action` in forward passes of `model` over x."""
    with Flops() as everything:
        action()
    with Flops() as one, torch.no_grad():
        model(x)
    return everything.total / one.total


def equality(work: Path, model: str, objective: str, batch: int, *overrides: str) -> tuple[int, float, float]:
    """One step in float64: pixels of x_adv that differ from the textbook's, relative difference of the loss, forward passes."""
    ours = Ours(work, model, objective, batch, "precision=fp64", f"threat.bn={STEPPED[objective]}", *overrides)
    part, textbook = ours.first_part(), ours.textbook()
    expected, loss = textbook.step(part.x.contiguous(), part.y, part.noise.contiguous())
    forwards = forward_equivalents(ours.state.base, part.x, ours.step)
    ((_, (done,)),) = ours.state.recent
    assert done.x_adv is not None
    return int((done.x_adv != expected).sum()), abs(float(ours.state.sums[0]) / batch / loss - 1), forwards


# ---- how long it takes ----------------------------------------------------------------------------------------------


def alternate(rounds: int, actions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each action, in turns; the first turn is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def spread(ratios: Iterable[float]) -> str:
    """Median and range."""
    values = sorted(ratios)
    return f"{statistics.median(values):.3f} [{values[0]:.3f}, {values[-1]:.3f}]"


def _speedup(seconds: dict[str, list[float]], name: str, baseline: str) -> str:
    """Median and range of baseline / name, turn by turn."""
    return spread(a / b for a, b in zip(seconds[baseline], seconds[name], strict=True))


def step(work: Path, names: list[str], rounds: int, batches: dict[str, int]) -> None:
    """Print ours against the textbook step for each model and objective, then what each part of the engine gives."""
    make_images(work)
    print(
        "| model | objective | batch | textbook, s | ours, s | textbook / ours | forwards: textbook | ours | x_adv | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        for objective in STEPPED:
            _compare(work, name, objective, batches[name], rounds)
    for name in names:
        model = _memory_layouts(work, name, batches[name], rounds)
        _optimizers(model, rounds)
        _averages(model, rounds)


def _compare(work: Path, name: str, objective: str, batch: int, rounds: int) -> None:
    differing, loss, _ = equality(work, name, objective, min(batch, 4))
    ours = Ours(work, name, objective, batch, f"threat.bn={STEPPED[objective]}")
    part, book = ours.first_part(), ours.textbook()
    given = (part.x.contiguous(), part.y, part.noise.contiguous())
    counts = [forward_equivalents(book.model, given[0], action) for action in (lambda: book.step(*given), ours.step)]
    seconds = alternate(rounds, {"book": lambda: book.step(*given), "ours": ours.step})
    medians = [statistics.median(seconds[key]) for key in ("book", "ours")]
    print(
        f"| {name} | {objective} | {batch} | {medians[0]:.2f} | {medians[1]:.2f} | {_speedup(seconds, 'ours', 'book')} | "
        f"{counts[0]:.2f} | {counts[1]:.2f} | {'equal' if differing == 0 else f'{differing} pixels differ'} | {loss:.0e} |",
        flush=True,
    )


def _memory_layouts(work: Path, name: str, batch: int, rounds: int) -> nn.Module:
    """NRAT's step with each part of the engine alone; returns the model."""
    variants = {
        "none": ("train.channels_last=false", "train.fold_batchnorm=false"),
        "channels-last memory": ("train.fold_batchnorm=false",),
        "BatchNorm folded": ("train.channels_last=false",),
        "both": (),
    }
    runs = {label: Ours(work, name, "nrat", batch, *overrides) for label, overrides in variants.items()}
    seconds = alternate(rounds, {label: run.step for label, run in runs.items()})
    print(f"\n{name}, NRAT, batch {batch}: speed of a step relative to ours without the part")
    for label in list(variants)[1:]:
        print(f"  {label:<22} {_speedup(seconds, label, 'none')}")
    return runs["both"].state.base


def _optimizers(model: nn.Module, rounds: int) -> None:
    """SGD's implementations against the loop over parameters."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    flags = {"loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    sgd = {
        kind: torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=5e-4, **flag) for kind, flag in flags.items()
    }
    seconds = alternate(rounds, {kind: optimizer.step for kind, optimizer in sgd.items()})
    for kind in ("foreach", "fused"):
        milliseconds = 1e3 * statistics.median(seconds[kind])
        print(f"  SGD {kind:<18} {_speedup(seconds, kind, 'loop')} of the loop's speed, {milliseconds:.1f} ms")


def _averages(model: nn.Module, rounds: int) -> None:
    """The EMA's update against a loop over parameters."""
    averages, values = ([p.detach().clone() for p in model.parameters()] for _ in range(2))
    weights = [torch.tensor(0.005)] * len(values)

    def loop() -> None:
        for average, value in zip(averages, values, strict=True):
            average.mul_(0.995).add_(value, alpha=0.005)

    seconds = alternate(rounds, {"loop": loop, "foreach": lambda: torch._foreach_lerp_(averages, values, weights)})
    milliseconds = 1e3 * statistics.median(seconds["foreach"])
    print(f"  EMA foreach            {_speedup(seconds, 'foreach', 'loop')} of the loop's speed, {milliseconds:.1f} ms")
