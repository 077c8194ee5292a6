"""Attacks in low precision: the loss that an attack reaches in bf16 and fp16, relative to float32."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.step import Ours, make_images
from nrat_scale.attacks import ThreatSpec, apply_noise, search, start_noise
from nrat_scale.objectives import OBJECTIVES, build
from nrat_scale.train.attack_model import AttackModel


def precision(work: Path, steps: int) -> None:
    """Print the final loss relative to float32, with all attack steps in low precision and with the first in float32."""
    shards = make_images(work)
    ours = Ours(work, "resnet18_cifar", "trades", 16, "threat.num_steps=2", "threat.step=4/255")
    for _ in range(steps):
        ours.step()
    part, shape = ours.first_part(), ours.state.data.shards.image_shape
    x, y = part.x, part.y
    print(f"ResNet-18 after {steps} steps of TRADES on {shards.name} of {shape}; {len(x)} images")
    types = {"bf16": torch.bfloat16} | ({"fp16": torch.float16} if x.is_cuda else {})
    if not x.is_cuda:
        print("fp16 is skipped: a CPU only emulates it, and training refuses it there")
    heads = [f"{name}{first}" for name in types for first in ("", ", first step fp32")]
    print(f"| objective | inner | start | {' | '.join(heads)} |\n|{'---|' * (3 + len(heads))}")
    for name, inner in _attacks():
        preset = OBJECTIVES[name]
        threat = ThreatSpec(8 / 255, 2 / 255, 10, preset.init, preset.bn)
        row = _relative_losses(ours.state.base, x, y, name, inner, threat, types.values())
        cells = " | ".join(f"{100 * value:.1f} %" for value in row)
        print(f"| {name} | {inner} | {preset.init} | {cells} |", flush=True)


def _attacks() -> list[tuple[str, str]]:
    """One (objective, inner loss) for each attack that differs in loss, start or BatchNorm mode."""
    found: dict[tuple[str, str, str], tuple[str, str]] = {}
    for name, preset in OBJECTIVES.items():
        if build(name).attacks:
            for inner in [preset.inner, *(("kl", "sym_kl") if preset.family == "trades" else ())]:
                found.setdefault((inner, preset.init, preset.bn), (name, inner))
    return list(found.values())


def _relative_losses(
    model: nn.Module, x: Tensor, y: Tensor, name: str, inner: str, threat: ThreatSpec, types: Iterable[torch.dtype]
) -> list[float]:
    attack_model = AttackModel(model, threat.bn)
    objective = build(name, inner=inner)
    noise = start_noise(x.shape, threat.init, x, torch.Generator(x.device).manual_seed(0))

    def low(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, dtype):
                return attack_model.forward(images)

        return forward

    def final(forward: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            natural, exact = first(x), attack_model.forward(x)
            found = search(forward, x, objective.inner(natural, y), threat, apply_noise(x, noise, threat), first)
            # Always measure in float32, whatever the search ran in.
            return float(objective.inner(exact, y)(attack_model.forward(found.x_adv)).mean())

    best = final(attack_model.forward, attack_model.forward)
    results = []
    for dtype in types:
        results += [final(low(dtype), low(dtype)) / best, final(low(dtype), attack_model.forward) / best]
    return results
