"""Attacks in low precision: the loss that an attack reaches in bf16 and fp16, relative to float32."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.step import Ours, make_images
from nrat_scale.attacks import ThreatSpec, apply_noise, search, start_noise
from nrat_scale.objectives import OBJECTIVES, build
from nrat_scale.train.attack_model import AttackModel


def precision(work: Path, steps: int) -> None:
    """Print the final loss relative to float32, with all attack steps in low precision and with the first in float32."""
    make_images(work)
    types = low_precision_types()
    print(f"ResNet-18 after {steps} steps of TRADES on images of the benchmark's own; 16 images")
    if "fp16" not in types:
        print("fp16 is skipped: a CPU only emulates it, and training refuses it there")
    heads = [f"{name}{first}" for name in types for first in ("", ", first step fp32")]
    print(f"| objective | inner | start | {' | '.join(heads)} |\n|{'---|' * (3 + len(heads))}")
    for (name, inner), row in low_precision_losses(work, steps).items():
        cells = " | ".join(f"{100 * share:.1f} %" for shares in row.values() for share in shares)
        print(f"| {name} | {inner} | {OBJECTIVES[name].init} | {cells} |", flush=True)


def low_precision_types() -> dict[str, torch.dtype]:
    """The types of `low_precision_losses` on this device."""
    return {"bf16": torch.bfloat16} | ({"fp16": torch.float16} if torch.cuda.is_available() else {})


def low_precision_losses(
    work: Path, steps: int, model: str = "resnet18_cifar", *overrides: str
) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(objective, inner loss) -> type -> final losses of the attack relative to float32: all in low precision; first step
    and natural logits in float32. The model has trained for `steps` steps on the images of `make_images` in `work`.
    """
    ours = Ours(work, model, "trades", 16, "threat.num_steps=2", *overrides)
    for _ in range(steps):
        ours.step()
    part, found = ours.first_part(), {}
    for name, inner in _attacks():
        preset = OBJECTIVES[name]
        threat = ThreatSpec(8 / 255, 2 / 255, 10, preset.init, preset.bn)
        found[name, inner] = _relative_losses(ours.state.base, part.x, part.y, name, inner, threat)
    return found


def _attacks() -> list[tuple[str, str]]:
    """One (objective, inner loss) for each attack that differs in loss, start or BatchNorm mode."""
    found: dict[tuple[str, str, str], tuple[str, str]] = {}
    for name, preset in OBJECTIVES.items():
        if build(name).attacks:
            for inner in [preset.inner, *(("kl", "sym_kl") if preset.family == "trades" else ())]:
                found.setdefault((inner, preset.init, preset.bn), (name, inner))
    return list(found.values())


def _relative_losses(
    model: nn.Module, x: Tensor, y: Tensor, name: str, inner: str, threat: ThreatSpec
) -> dict[str, tuple[float, float]]:
    objective = build(name, inner=inner)
    noise = start_noise(x.shape, threat.init, x, torch.Generator(x.device).manual_seed(0))

    def final(attack: AttackModel, forward: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            natural, exact = first(x), attack.forward(x)
            found = search(forward, x, objective.inner(natural, y), threat, apply_noise(x, noise, threat), first)
            # Always measure in float32, whatever the search ran in.
            return float(objective.inner(exact, y)(attack.forward(found.x_adv)).mean())

    results = {}
    for kind, dtype in low_precision_types().items():
        attack = AttackModel(model, threat.bn, compute=dtype)
        low = _autocast(attack.low_forward, dtype)
        best = final(attack, attack.forward, attack.forward)
        results[kind] = final(attack, low, low) / best, final(attack, low, attack.forward) / best
    return results


def _autocast(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def under_autocast(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype):
            return forward(images)

    return under_autocast
