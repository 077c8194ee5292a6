"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690) on one block, with the outcome of a direct call of its package."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.attacks import AUTOATTACK_NORMS, ThreatSpec, in_space, inside_ball

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
COMPONENTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# Slack for float32 rounding in AutoAttack's projections; too small to change a prediction.
_BALL_SLACK = 1e-6


def autoattack_package() -> str:
    """`autoattack`, the official package, if it is installed, else `pyautoattack`, its release on PyPI."""
    return "autoattack" if importlib.util.find_spec("autoattack") else "pyautoattack"


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatSpec, seed: int, components: Sequence[str]
) -> Tensor:
    """The adversarial images x_adv that AutoAttack finds on this block, shaped like `x`; `x` itself for robust images.

    The result depends on `seed` and on the whole block. Each component has the settings of the standard version.

    Args:
        model: maps [0, 1] images to logits [B, K]; with fewer than ten classes all other classes are targets.
        x, y: images [B, C, H, W] in [0, 1] and labels [B], on the device of the model.
        components: run in this order, each on the images that the previous ones did not break.

    Raises:
        AssertionError: an adversarial image is outside the ball.
    """
    package = autoattack_package()
    module = importlib.import_module(package)
    space_model, encode, decode = in_space(model, threat.space)
    official = package == "autoattack"
    options: dict[str, Any] = {"norm": AUTOATTACK_NORMS[threat.norm], "seed": seed, "device": x.device}
    options |= {"verbose": False} if official else {}
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        attack = module.AutoAttack(space_model, eps=threat.eps, version="standard", **options)
        attack.attacks_to_run = list(components)
        targets = min(9, space_model(encode(x[:1])).shape[1] - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        result = attack.run_standard_evaluation(encode(x), y, **{"bs" if official else "batch_size": len(x)})
    x_adv = decode(result[0] if isinstance(result, tuple) else result)
    around = threat.space == "pixel"
    inside = inside_ball(x_adv, x, threat.eps + _BALL_SLACK, around=around, norm=threat.norm)
    assert bool(inside), f"AutoAttack left its ball of radius {threat.eps}"
    return x_adv


@contextmanager
def autoattack_log(running: Callable[[str], None] = lambda name: None) -> Iterator[list[str]]:
    """Collect AutoAttack's warnings in the returned list, and print nothing of its log.

    Args:
        running: receives the name of each component as it starts.
    """
    logger, warnings = logging.getLogger("auto-attack"), list[str]()
    level = logger.level

    def take(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("running "):
            running(message.removeprefix("running "))
        elif record.levelno >= logging.WARNING:
            warnings.append(message)
        return False  # do not print it

    logger.addFilter(take)
    logger.setLevel(logging.DEBUG)
    try:
        yield warnings
    finally:
        logger.removeFilter(take)
        logger.setLevel(level)
