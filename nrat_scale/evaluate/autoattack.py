"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690) on one block, with the outcome of a direct call of its package."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.attacks import AUTOATTACK_NORMS, ThreatSpec, in_space, inside_ball
from nrat_scale.core.errors import UserError, printable
from nrat_scale.evaluate.package_warnings import heard

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# Component -> classes that it needs: the DLR loss divides by z_1 - z_3 of the sorted logits, the targeted one uses z_4.
LEAST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}
COMPONENTS = tuple(LEAST_CLASSES)
# Slack for float32 rounding in AutoAttack's projections; too small to change a prediction.
_BALL_SLACK = 1e-6


@dataclass
class AutoAttackLog:
    """What AutoAttack reports about one block."""

    running: Callable[[str], None] = lambda name: None  # receives the name of each component as it starts
    warnings: list[str] = field(default_factory=list)  # of the package's own checks, without the prefix "Warning: "
    broken_by: np.ndarray | None = None  # int8 [B]: number of the component that broke each image, -1 for none


def autoattack_package() -> str:
    """`autoattack`, the official package, if it is installed, else `pyautoattack`, its release on PyPI."""
    spec = importlib.util.find_spec("autoattack")
    # A mere folder of that name in the working directory has no origin.
    return "autoattack" if spec is not None and spec.origin is not None else "pyautoattack"


def autoattack_version() -> str:
    """The version of that package; `unknown` for a copy on the path that pip did not install."""
    try:
        return version(autoattack_package())
    except PackageNotFoundError:
        return "unknown"


def undefined_components(components: Sequence[str], classes: int) -> dict[str, str]:
    """Component -> why it is not defined for this number of classes; defined ones are absent.

    Raises:
        UserError: none is defined.
    """
    undefined = {
        name: f"{name} needs {LEAST_CLASSES[name]} classes, and the model has {classes}"
        for name in components
        if LEAST_CLASSES[name] > classes
    }
    if undefined and len(undefined) == len(set(components)):
        raise UserError(
            f"No part of this attack can run: {'; '.join(undefined.values())}. Choose others, such as aa:square."
        )
    return undefined


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatSpec,
    seed: int,
    components: Sequence[str],
    log: AutoAttackLog | None = None,
) -> Tensor:
    """The adversarial images x_adv that AutoAttack finds on this block, shaped like `x`; `x` itself for robust images.

    The result depends on `seed` and on the whole block. Each component has the settings of the standard version and runs on
    the images that the previous ones did not break, in one batch. Each seeds itself, so that calling the package once per
    component, which tells what each one broke, gives the outcome of one call with all of them.

    Args:
        model: maps [0, 1] images to logits [B, K]; with fewer than ten classes all other classes are targets.
        x, y: images [B, C, H, W] in [0, 1] and labels [B], on the device of the model.
        components: those that K classes do not define (`undefined_components`) are left out.
        log: receives the package's warnings and the component that broke each image.

    Raises:
        UserError: no component is defined, or the installed `autoattack` is another package.
        AssertionError: an adversarial image is outside the ball.
    """
    log = AutoAttackLog() if log is None else log
    module = _import_package()
    space_model, encode, decode = in_space(model, threat.space)
    start = encode(x)
    found, broken_by = start.clone(), torch.full((len(x),), -1, dtype=torch.int8)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad(), heard(module, log.warnings):
        logits = space_model(start)
        undefined = undefined_components(components, logits.shape[1])
        run = _runner(module, _floating(space_model), x.device, threat, seed, logits.shape[1])
        alive = logits.argmax(1).eq(y)
        for number, name in enumerate(components):
            rows = alive.nonzero().flatten()
            if name in undefined or not len(rows):
                continue
            log.running(name)
            attacked = run(name, start[rows], y[rows])
            broken = rows[(attacked != start[rows]).flatten(1).any(1)]
            found[rows] = attacked
            broken_by[broken.cpu()] = number
            alive[broken] = False
    log.broken_by = broken_by.numpy()
    x_adv = decode(found)
    around = threat.space == "pixel"
    inside = inside_ball(x_adv, x, threat.eps + _BALL_SLACK, around=around, norm=threat.norm)
    assert bool(inside), f"AutoAttack left its ball of radius {threat.eps}"
    return x_adv


def _import_package() -> ModuleType:
    name = autoattack_package()
    module = importlib.import_module(name)
    if not hasattr(module, "AutoAttack"):
        where = printable(getattr(module, "__file__", name))
        raise UserError(f"{where} is not the package autoattack: it has no class AutoAttack. Rename it, or remove it.")
    return module


def _runner(
    module: ModuleType,
    model: Callable[[Tensor], Tensor],
    device: torch.device,
    threat: ThreatSpec,
    seed: int,
    classes: int,
) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A function that runs one component on images and labels, in one batch."""
    official = module.__name__ == "autoattack"
    options: dict[str, Any] = {"norm": AUTOATTACK_NORMS[threat.norm], "seed": seed, "device": device}
    options |= {"verbose": False} if official else {}
    attack = module.AutoAttack(model, eps=threat.eps, version="standard", **options)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)

    def run(component: str, x: Tensor, y: Tensor) -> Tensor:
        attack.attacks_to_run = [component]
        result = attack.run_standard_evaluation(x, y, **{"bs" if official else "batch_size": len(x)})
        found: Tensor = result[0] if isinstance(result, tuple) else result
        return found

    return run


def _floating(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model with floating-point outputs, which Square needs even of a model that returns integers."""

    def forward(x: Tensor) -> Tensor:
        logits = model(x)
        return logits if logits.is_floating_point() else logits.float()

    return forward
