"""Benchmarks of the training step: against the textbook one, in each precision, over processes."""

import contextlib
import io
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nrat_scale import models
from nrat_scale.attacks import ThreatSpec, apply_noise, search, start_noise
from nrat_scale.objectives import OBJECTIVES, build
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.setup import start
from nrat_scale.train.state import TrainState
from nrat_scale.train.step import attacked, micro_batches, train_step

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
STEPPED = {"nrat": "eval", "trades": "eval", "dm_at": "batch"}  # objective -> BatchNorm while attacking
# Dense peak of the datasheet in 10^12 operations a second, by precision; torch calls the device so.
PEAKS = {"H100": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}, "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}}


# ---- the textbook step ----------------------------------------------------------------------------------------------


class Textbook:
    """The step as public code has it: one model, switched to and fro, a loop over parameters for the EMA, `.item()`."""

    def __init__(self, model: nn.Module, ema: nn.Module, objective: str) -> None:
        self.model, self.ema, self.objective = model, ema, objective
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def attack(self, x: Tensor, noise: Tensor) -> Tensor:
        """TRADES' attack on KL(p || p'): natural prediction once, then ten steps."""
        kept = [b.clone() for b in self.model.buffers()]
        self.model.train(self.objective == "dm_at")
        with torch.no_grad():
            natural = F.softmax(self.model(x), dim=1)
        eps, step = 8 / 255, 2 / 255
        x_adv = (x + eps * noise).clamp(0, 1) if self.objective == "dm_at" else x + 0.001 * noise
        for _ in range(10):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.kl_div(F.log_softmax(self.model(x_adv), dim=1), natural, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + step * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)  # DM_AT leaves the running statistics alone while attacking
        self.model.train()
        return x_adv

    def outer(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        """The loss that is trained on."""
        log_p, log_p_adv = F.log_softmax(logits, 1), F.log_softmax(logits_adv, 1)
        kl = F.kl_div(log_p_adv, log_p.exp(), reduction="batchmean")
        if self.objective == "trades":
            return F.cross_entropy(logits, y) + 6 * kl
        if self.objective == "dm_at":
            return F.cross_entropy(logits, y, label_smoothing=0.1) + 5 * kl
        one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        nce = (-log_p.gather(1, y[:, None]).squeeze(1) / -log_p.sum(1)).mean()
        rce = -(log_p.exp().clamp(1e-7, 1) * one_hot.clamp(1e-4, 1).log()).sum(1).mean()
        return nce + rce + 6 * (kl + F.kl_div(log_p, log_p_adv.exp(), reduction="batchmean")) / 2

    def step(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, float]:
        """One step; the adversarial images and the loss."""
        x_adv = self.attack(x, noise)
        self.optimizer.zero_grad()
        loss = self.outer(self.model(x), self.model(x_adv), y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.mul_(0.995).add_(value, alpha=0.005)
            for buffer, source in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                buffer.copy_(source)
        return x_adv, loss.item()


# ---- ours -----------------------------------------------------------------------------------------------------------


def make_images(folder: Path, n: int = 512) -> Path:
    """Shards of smooth random images, 32 x 32 x 3, whose mean colour tells the class."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 10
    coarse = generator.integers(0, 160, (n, 8, 8, 3)) + 9 * labels[:, None, None, None]
    images = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    names = tuple("0123456789")
    return write_shards(
        LabelledArrays(images, labels, "custom", names), folder / "shards", block_size=128, progress=False
    )


class Ours:
    """A run of the engine, stepped by hand."""

    def __init__(self, work: Path, model: str, objective: str, batch: int, *overrides: str, name: str = "run") -> None:
        path = work / f"{name}.yaml"
        text = RECIPE.replace("MODEL", model).replace("OBJECTIVE", objective).replace("BATCH", str(batch))
        path.write_text(text.replace("SHARDS", str(work / "shards")))
        AcceleratorState._reset_state(reset_partial_state=True)
        run = work / f"{name}-{len(list(work.iterdir()))}"
        with contextlib.redirect_stdout(io.StringIO()):
            self.t: TrainState = start(load_recipe(path, [f"run_dir={run}", *overrides]))
        self.batches = self.t.data.batches(0, 1 << 14)
        for group in self.t.optimizer.param_groups:
            group["momentum"] = 0.9

    def step(self) -> None:
        """One step, complete on the device."""
        train_step(self.t, next(self.batches))
        self.t.step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def textbook(self) -> Textbook:
        """The textbook step over a copy of the weights, in the usual memory format."""
        models_ = [_plain_copy(self.t, self.t.recipe.model.name) for _ in range(2)]
        return Textbook(models_[0], models_[1], self.t.recipe.objective.name)


def _plain_copy(state: TrainState, name: str) -> nn.Module:
    model = models.create(name, {}).to(state.accelerator.device, next(state.base.parameters()).dtype)
    model.load_state_dict(state.base.state_dict())
    for buffer in ("mean", "std"):
        setattr(model, buffer, getattr(state.base, buffer).clone())
    return model.train()


class Flops(TorchDispatchMode):
    """Floating-point operations by torch's own formulas (FlopCounterMode cannot be used: its module tracker refuses
    `autograd.grad` of a leaf, which every attack is)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def forward_equivalents(model: nn.Module, x: Tensor, action: Callable[[], Any]) -> float:
    """What `action` computes, in forward passes of `model` over x."""
    with Flops() as one, torch.no_grad():
        model(x)
    with Flops() as everything:
        action()
    return everything.total / one.total


def equality(work: Path, model: str, objective: str, batch: int) -> tuple[int, float]:
    """One step in float64: pixels of x_adv that differ from the textbook's, and the relative difference of the loss."""
    ours = Ours(work, model, objective, batch, "precision=fp64", f"threat.bn={STEPPED[objective]}")
    first = next(ours.t.data.batches(0, 1))
    (part,) = micro_batches(ours.t, first)
    textbook = ours.textbook()
    x = part.x.contiguous()
    natural = None
    if ours.t.recipe.threat.bn == "batch":
        with torch.no_grad():
            natural = ours.t.attack_model.forward(part.x)
    x_adv = attacked(ours.t, part, natural).x_adv
    expected, loss = textbook.step(x, part.y, part.noise.contiguous())
    ours.step()
    assert x_adv is not None
    return int((x_adv != expected).sum()), abs(float(ours.t.sums[0]) / batch / loss - 1)


# ---- step -----------------------------------------------------------------------------------------------------------


def alternate(rounds: int, actions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each action, in turns; the first turn is not counted."""
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


def step(work: Path, names: list[str], rounds: int, batches: dict[str, int]) -> None:
    """Ours against the textbook step, for each model and objective; then what each part gives."""
    make_images(work)
    print(
        "| model | objective | batch | textbook, s | ours, s | textbook / ours | forwards: textbook | ours | x_adv | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        for objective in STEPPED:
            _compare(work, name, objective, batches[name], rounds)
    for name in names:
        _parts(work, name, batches[name], rounds)
    if torch.cuda.is_available():
        _on_gpu(work, names)


def _compare(work: Path, name: str, objective: str, batch: int, rounds: int) -> None:
    differing, loss = equality(work, name, objective, min(batch, 4))
    ours = Ours(work, name, objective, batch, f"threat.bn={STEPPED[objective]}")
    (part,) = micro_batches(ours.t, next(ours.t.data.batches(0, 1)))
    book, given = ours.textbook(), (part.x.contiguous(), part.y, part.noise.contiguous())
    counts = [forward_equivalents(book.model, given[0], action) for action in (lambda: book.step(*given), ours.step)]
    seconds = alternate(rounds, {"book": lambda: book.step(*given), "ours": ours.step})
    ratios = [a / b for a, b in zip(seconds["book"], seconds["ours"], strict=True)]
    medians = [statistics.median(seconds[key]) for key in ("book", "ours")]
    print(
        f"| {name} | {objective} | {batch} | {medians[0]:.2f} | {medians[1]:.2f} | {spread(ratios)} | {counts[0]:.2f} | "
        f"{counts[1]:.2f} | {'equal' if differing == 0 else f'{differing} pixels differ'} | {loss:.0e} |",
        flush=True,
    )


def _parts(work: Path, name: str, batch: int, rounds: int) -> None:
    """NRAT's step with each part of the engine alone, and the optimizer and the EMA by themselves."""
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
        ratios = [a / b for a, b in zip(seconds["none"], seconds[label], strict=True)]
        print(f"  {label:<22} {spread(ratios)}")
    model = runs["both"].t.base
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sgd = {
        kind: torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=5e-4, **{kind: True})
        for kind in ("foreach", "fused")
    }
    sgd["loop"] = torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=5e-4, foreach=False, fused=False)
    seconds = alternate(rounds, {kind: optimizer.step for kind, optimizer in sgd.items()})
    for kind in ("foreach", "fused"):
        ratios = [a / b for a, b in zip(seconds["loop"], seconds[kind], strict=True)]
        print(f"  SGD {kind:<18} {spread(ratios)} of the loop's, {1e3 * statistics.median(seconds[kind]):.1f} ms")
    averages, values = ([p.detach().clone() for p in model.parameters()] for _ in range(2))

    def loop() -> None:
        for average, value in zip(averages, values, strict=True):
            average.mul_(0.995).add_(value, alpha=0.005)

    weight = torch.tensor(0.005)
    seconds = alternate(
        rounds, {"loop": loop, "foreach": lambda: torch._foreach_lerp_(averages, values, [weight] * len(values))}
    )
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["foreach"], strict=True)]
    print(
        f"  EMA foreach            {spread(ratios)} of the loop's, {1e3 * statistics.median(seconds['foreach']):.1f} ms",
        flush=True,
    )


def _on_gpu(work: Path, names: list[str]) -> None:
    """Images a second, and the share of the datasheet's peak, of NRAT in each precision."""
    device = torch.cuda.get_device_name()
    peaks = next((peak for name, peak in PEAKS.items() if name in device), {})
    for name in names:
        for precision in ("bf16", "fp16", "fp32"):
            ours = Ours(work, name, "nrat", 512, f"precision={precision}")
            (part,) = micro_batches(ours.t, next(ours.t.data.batches(0, 1)))
            with Flops() as counter:
                ours.step()
            seconds = statistics.median(alternate(10, {"ours": ours.step})["ours"])
            rate = counter.total / seconds / 1e12
            share = f", {100 * rate / peaks[precision]:.0f} % of the datasheet's peak" if precision in peaks else ""
            print(f"{device}, {name}, {precision}: {len(part.x) / seconds:.0f} images/s{share}", flush=True)


# ---- precision ------------------------------------------------------------------------------------------------------


def precision(work: Path, steps: int) -> None:
    """The attack's final loss in bf16 and fp16 relative to float32, all steps low or the first in float32."""
    shards = make_images(work)
    ours = Ours(work, "resnet18_cifar", "trades", 16, "threat.num_steps=2")
    for _ in range(steps):
        ours.step()
    (part,) = micro_batches(ours.t, next(ours.batches))
    x, y = part.x, part.y
    print(
        f"ResNet-18 after {steps} steps of TRADES on {shards.name} of {ours.t.data.shards.image_shape}; {len(x)} images"
    )
    if not x.is_cuda:
        print("fp16 is left out: a CPU only emulates it, and training refuses it there")
    types = {"bf16": torch.bfloat16} | ({"fp16": torch.float16} if x.is_cuda else {})
    heads = [f"{name}{first}" for name in types for first in ("", ", first step fp32")]
    print(f"| objective | inner | start | {' | '.join(heads)} |\n|{'---|' * (3 + len(heads))}")
    done = set()
    for name, preset in OBJECTIVES.items():
        objective = build(name)
        for inner in dict.fromkeys([preset.inner, "kl", "sym_kl"] if preset.family == "trades" else [preset.inner]):
            key = (inner, preset.init, preset.bn, preset.family == "natural")
            if key in done or not objective.attacks:
                continue
            done.add(key)
            threat = ThreatSpec(8 / 255, 2 / 255, 10, preset.init, preset.bn)
            row = _precisions(ours.t.base, x, y, name, inner, threat, types.values())
            print(
                f"| {name} | {inner} | {preset.init} | " + " | ".join(f"{100 * value:.1f} %" for value in row) + " |",
                flush=True,
            )


def _precisions(
    model: nn.Module, x: Tensor, y: Tensor, name: str, inner: str, threat: ThreatSpec, types: Iterable[torch.dtype]
) -> list[float]:
    twin = AttackModel(model, threat.bn)
    objective = build(name, inner=inner)
    noise = start_noise(x.shape, threat.init, x, torch.Generator(x.device).manual_seed(0))

    def low(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, dtype):
                return twin.forward(images)

        return forward

    def final(forward: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            natural, exact = first(x), twin.forward(x)
            found = search(forward, x, objective.inner(natural, y), threat, apply_noise(x, noise, threat), first)
            # What was reached is looked at in float32, whatever it was searched in.
            return float(objective.inner(exact, y)(twin.forward(found.x_adv)).mean())

    best = final(twin.forward, twin.forward)
    results = []
    for dtype in types:
        results += [final(low(dtype), low(dtype)) / best, final(low(dtype), twin.forward) / best]
    return results


# ---- processes and start-up -----------------------------------------------------------------------------------------


def processes(work: Path, rounds: int) -> None:
    """One process against two, one thread each and the same images for each process; then start-up and waiting."""
    make_images(work)
    path = work / "processes.yaml"
    text = (
        RECIPE.replace("MODEL", "resnet18_cifar").replace("OBJECTIVE", "nrat").replace("SHARDS", str(work / "shards"))
    )
    path.write_text(text.replace("BATCH", "8"))
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for count in (1, 2):
            rates[count].append(_rate(path, work / f"run{number}-{count}", count))
    ratios = [two / (2 * one) for one, two in zip(rates[1], rates[2], strict=True)]
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    print(f"images/s: one process {one:.2f}, two {two:.2f}; two / (2 x one) = {spread(ratios)}")
    starts = [_startup(path, work / f"start{number}") for number in range(rounds)]
    print(f"from the command to the end of the first step, batch 8: {statistics.median(starts):.1f} s")
    out = _launch(path, work / "profiled", 1, "data.batch_size=16", "train.max_steps=6", flags=["--profile", "4"])
    print(out[out.index("profile of") :].split("\nbest")[0].strip())


def _launch(path: Path, run: Path, count: int, *overrides: str, flags: Iterable[str] = ()) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "-m", "nrat_scale.train"]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:count])  # training uses one thread for each
    done = subprocess.run(
        ["taskset", "-c", cores, *command, str(path), f"run_dir={run}", "train.validation_attack=pgd1", *overrides, *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{count} process(es)" in done.stdout, "the launcher must really have started them"
    return done.stdout


def _startup(path: Path, run: Path) -> float:
    command = [sys.executable, "-m", "nrat_scale.train", str(path), f"run_dir={run}", "data.batch_size=8"]
    begun = time.perf_counter()
    overrides = ["train.max_steps=1", "train.log_every=1", "train.validation_attack=pgd1"]
    with subprocess.Popen([*command, *overrides], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        seconds = time.perf_counter() - begun
        process.communicate()
    assert process.returncode == 0
    return seconds


def _rate(path: Path, run: Path, count: int) -> float:
    out = _launch(path, run, count, f"data.batch_size={8 * count}", "train.max_steps=6", "train.log_every=2")
    return float(re.findall(r"([0-9.]+) img/s", out)[-1])
