"""The training step on one GPU: textbook rows, ours, and ours with each lever switched, in one process and one table.

Rows are measured in the order of `gpu_rows.CONTENDERS`, the most important first. A row that the time budget does not reach,
that this tree or device does not have, or that fails, says so in words. Every code path but the requirement of a GPU also
runs on a CPU, where tests run it with tiny models; a CPU's figures mean nothing.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_rows import CASES, CONTENDERS, Case, Contender
from bench.padding import copy_padding
from bench.precision import low_precision_losses
from bench.step import STEPPED, Ours, equality, make_images
from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import write_json
from nrat_scale.cost import forward_equivalents
from nrat_scale.objectives import build
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.compile import compile_models
from nrat_scale.train.graphs import use_graphs
from nrat_scale.train.throughput import forward_flops, peak_tflops

_WARMUP_STEPS = 3  # after the first: cuDNN's choices, two plain calls before a graph is captured, the capture
_MOST_STEPS, _LEAST_STEPS, _STEPS_SECONDS = 12, 3, 5.0  # measured steps of a row, and the time after which they end
_MATRIX = 8192  # size of the matrix product that shows what the card reaches
_BOUND = 0.99  # of the loss that the attack reaches in float32
_MOST_FORWARDS = {"nrat": 27, "trades": 27, "dm_at": 26}


# ---- the command ----------------------------------------------------------------------------------------------------


def step_gpu(
    work: Path,
    out: Path,
    seconds: float,
    cases: tuple[Case, ...] = CASES,
    *,
    device: str = "cuda",
    check_steps: int = 25,
) -> None:
    """Print checks and table, and write them to the JSON file `out` after every row.

    Args:
        seconds: budget; rows that do not fit are skipped with a sentence.
        device: for tests only: `cpu` runs everything but compiled rows and graphs there.
        check_steps: training steps before the attacks whose losses are compared.

    Raises:
        UserError: there is no CUDA GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench step --gpu needs a CUDA GPU, and torch finds none. Without --gpu, bench step compares the steps on a CPU."
        )
    deadline = time.monotonic() + seconds
    make_images(work, max(512, 2 * max(case.batch for case in cases)))
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak, ceiling = peak_tflops(card), _product_tflops(device)
    report: dict[str, Any] = {"card": card, "torch": torch.__version__, "peak_tflops": peak, "product_tflops": ceiling}
    print(
        f"{card}, bf16: peak of the datasheet {_number(peak)} TFLOP/s, a product of {_MATRIX} x {_MATRIX} matrices {ceiling:.0f}"
    )
    report["checks"], report["rows"] = _checks(work, cases, check_steps), []
    _head()
    for group in CONTENDERS:
        for case in cases:
            for contender in group:
                row = _row(work, case, contender, device, deadline)
                report["rows"].append(_with_rates(row, peak, ceiling))
                _print(row)
                write_json(out, report)
    print(f"\n{out} has the checks, these rows and the time of every step.")
    failed = [check["check"] for check in report["checks"] if not check["holds"]]
    if failed:
        raise SystemExit(f"These checks do not hold on {card}: {'; '.join(failed)}.")


def _product_tflops(device: str) -> float:
    """What a bf16 product of two square matrices reaches, in TFLOP/s."""
    size = _MATRIX if device == "cuda" else 64
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(step_seconds(lambda: left @ right, device, 10, 0, 1.0)[1])
    return 2 * size**3 / seconds / 1e12


# ---- checks ---------------------------------------------------------------------------------------------------------


def _checks(work: Path, cases: tuple[Case, ...], steps: int) -> list[dict[str, Any]]:
    """The float64 equality and the forward passes for each model and objective, and the bound in low precision."""
    found: list[dict[str, Any]] = []
    for case in {case.model: case for case in cases}.values():
        for objective in STEPPED:
            differing, loss, forwards = equality(work, case.model, objective, min(case.batch, 4), *case.overrides)
            holds = differing == 0 and loss < 1e-9 and forwards <= _MOST_FORWARDS[objective]
            name = f"{case.model}, {objective}, float64 step against the textbook"
            numbers = {"pixels": differing, "loss": loss, "forwards": forwards}
            found.append({"check": name, "holds": holds, **numbers})
            text = f"{differing} pixels differ, loss {loss:.0e}, {forwards:.2f} forwards"
            print(f"{'holds' if holds else 'FAILS'}: {name}: {text}", flush=True)
    case = cases[-1]
    for (objective, inner), shares in low_precision_losses(work, steps, case.model, *case.overrides).items():
        precise = build(objective, inner=inner).inner_needs_natural  # such an attack begins in float32
        for dtype, (low, started) in shares.items():
            share = started if precise else low
            name = (
                f"{case.model}, {objective}, {inner}, {dtype} attack{' with first step in float32' if precise else ''}"
            )
            found.append({"check": name, "holds": share >= _BOUND, "share_of_float32_loss": share})
            print(f"{'holds' if share >= _BOUND else 'FAILS'}: {name}: {100 * share:.1f} % of the loss", flush=True)
    return found


# ---- rows -----------------------------------------------------------------------------------------------------------


def _row(work: Path, case: Case, contender: Contender, device: str, deadline: float) -> dict[str, Any]:
    """Measure one row; `skipped` says why there is none."""
    row: dict[str, Any] = {"model": case.model, "batch": case.batch, "contender": contender.name}
    reason = _unavailable(case, contender)
    left = deadline - time.monotonic()
    if not reason and left < contender.seconds:
        reason = (
            f"not measured: {max(left, 0):.0f} s of the budget are left (--seconds); a second run finds compiled code"
        )
    if reason:
        return {**row, "skipped": reason}
    try:
        with _settings(device):
            row |= _measure(work, case, contender, device)
    except (UserError, RuntimeError) as error:  # out of memory, or what a compiler or a capture cannot do
        row["skipped"] = f"failed: {first_line(error)}"
    gc.collect()
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def _unavailable(case: Case, contender: Contender) -> str:
    if contender.padding_copy and contender.channels_last and not case.model.startswith("wrn"):
        return "the same as ours, eager: this model has no WideBlock"
    return ""


def _measure(work: Path, case: Case, contender: Contender, device: str) -> dict[str, Any]:
    begun, name = time.perf_counter(), contender.name
    if contender.textbook:
        action, operations = _textbook(work, case, contender)
        begun = time.perf_counter()
    else:
        ours = _ours(work, case, contender, device)
        action, operations = ours.advance, _operations(ours)
        if contender.flip_cudnn_benchmark:
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
            name += " on" if torch.backends.cudnn.benchmark else " off"
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, steps = step_seconds(action, device, _MOST_STEPS, _WARMUP_STEPS, _STEPS_SECONDS, begun)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    facts = {
        "start_to_first_step_seconds": first,
        "step_seconds": steps,
        "flops_per_image": operations,
        "memory": memory,
    }
    return {"contender": name, **facts}


def _ours(work: Path, case: Case, contender: Contender, device: str) -> Ours:
    """A run with the levers of `contender`."""
    switches: dict[str, bool | str] = {
        "channels_last": contender.channels_last,
        "fold_batchnorm": contender.fold,
        "compile": contender.compile,
    }
    # On a CPU there are no graphs: `auto` is off there, and true is refused.
    switches["graphs"] = contender.graphs if device == "cuda" else "auto"
    overrides = [f"train.{key}={str(value).lower()}" for key, value in switches.items()]
    ours = Ours(work, case.model, "nrat", case.batch, "precision=bf16", *case.overrides, *overrides)
    attack = ours.state.attack_model
    if contender.padding_copy:
        for module in (ours.state.base, attack.module, attack.low):
            copy_padding(module)
    if not contender.compute_weights:
        _cast_in_every_forward(attack)
    compile_models(ours.state)
    use_graphs(ours.state)
    if ours.state.graphs is not None:
        ours.state.graphs.update.enabled &= contender.graphed_update
    return ours


def _cast_in_every_forward(attack: AttackModel) -> None:
    """Let attacks under autocast use the float32 weights."""
    attack.low, attack._cast = attack.module, []
    attack.use_eager()


def _textbook(work: Path, case: Case, contender: Contender) -> tuple[Callable[[], Any], int]:
    """The textbook step over one batch, and the operations that an image needs."""
    ours = Ours(work, case.model, "nrat", case.batch, *case.overrides)
    part, book = ours.first_part(), ours.textbook()
    book.autocast = contender.autocast
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format
    book.model.to(memory_format=layout)
    x, noise = (images.contiguous(memory_format=layout) for images in (part.x, part.noise))
    return lambda: book.step(x, part.y, noise), _operations(ours)


def _operations(ours: Ours) -> int:
    """Floating-point operations of a step for each image."""
    state = ours.state
    # Of the attack's module, whose call is not compiled: another batch size would compile `state.base` once more.
    forward = forward_flops(state.attack_model.module, state.data.shards.image_shape)
    return round(forward * forward_equivalents(state.recipe))


@contextlib.contextmanager
def _settings(device: str) -> Iterator[None]:
    """torch's defaults for float32 and cuDNN within a row, and whatever was set before afterwards."""
    matmul = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)


# ---- time -----------------------------------------------------------------------------------------------------------


def step_seconds(
    action: Callable[[], Any], device: str, most: int, warmup: int, budget: float, begun: float | None = None
) -> tuple[float, list[float]]:
    """(seconds from `begun` to the end of the first call, seconds of each of up to `most` later calls).

    On a GPU a call lasts from the end of the one before it to its own end on the device, so that the host may run ahead as in
    training. The calls end after `budget` seconds, but not before `_LEAST_STEPS`.
    """
    begun = time.perf_counter() if begun is None else begun
    marks = _Marks(device)
    action()
    marks.wait()
    first = time.perf_counter() - begun
    for _ in range(warmup):
        action()
    marks.wait()
    start = time.perf_counter()
    marks.set()
    for number in range(most):
        if number >= _LEAST_STEPS and time.perf_counter() - start > budget:
            break
        action()
        marks.set()
        if number < _LEAST_STEPS:
            marks.wait()  # so that the budget sees the device's time
    return first, marks.differences()


class _Marks:
    """Points in time: CUDA events, or the clock of the host."""

    def __init__(self, device: str) -> None:
        self.cuda, self.points = device == "cuda", list[Any]()

    def set(self) -> None:
        """Mark the end of what was launched so far."""
        if not self.cuda:
            self.points.append(time.perf_counter())
            return
        self.points.append(torch.cuda.Event(enable_timing=True))
        self.points[-1].record()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def differences(self) -> list[float]:
        """Seconds between the marks."""
        self.wait()
        pairs = zip(self.points, self.points[1:], strict=False)
        if self.cuda:
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


# ---- the table ------------------------------------------------------------------------------------------------------


def _with_rates(row: dict[str, Any], peak: float | None, ceiling: float) -> dict[str, Any]:
    """Add what follows from the times."""
    if "step_seconds" in row:
        seconds = statistics.median(row["step_seconds"])
        tflops = row["batch"] * row["flops_per_image"] / seconds / 1e12
        row |= {"median_seconds": seconds, "images_per_second": row["batch"] / seconds, "tflops": tflops}
        row |= {"share_of_peak": tflops / peak if peak else None, "share_of_product": tflops / ceiling}
    return row


def _head() -> None:
    columns = (
        "model",
        "batch",
        "contender",
        "ms",
        "images/s",
        "TFLOP/s",
        "of bf16 peak",
        "of product",
        "GiB",
        "first step, s",
    )
    print(f"\n| {' | '.join(columns)} |\n|---|---:|---|{'---:|' * 7}", flush=True)


def _print(row: dict[str, Any]) -> None:
    start = f"| {row['model']} | {row['batch']} | {row['contender']} |"
    if "skipped" in row:
        print(f"{start} {row['skipped']} |" + " |" * 6, flush=True)
        return
    gib = row["memory"] / 2**30 if row["memory"] is not None else None
    cells = [
        f"{1e3 * row['median_seconds']:,.1f}", f"{row['images_per_second']:,.0f}", f"{row['tflops']:,.1f}",
        _percent(row["share_of_peak"]), _percent(row["share_of_product"]), _number(gib, 1),
        f"{row['start_to_first_step_seconds']:.1f}",
    ]  # fmt: skip
    print(f"{start} {' | '.join(cells)} |", flush=True)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None, digits: int = 0) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"
