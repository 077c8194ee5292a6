"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690) on one block of images, exactly as its package runs when called directly."""

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
# How far its own projections (float32, several roundings) leave the ball: nothing that a prediction could hang on.
_BALL_SLACK = 1e-6


def autoattack_package() -> str:
    """The official `autoattack` where it is installed, else `pyautoattack`, its release on PyPI."""
    return "autoattack" if importlib.util.find_spec("autoattack") else "pyautoattack"


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatSpec,
    seed: int,
    *,
    components: Sequence[str] = STANDARD,
    running: Callable[[str], None] = lambda name: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Tensor:
    """The adversarial images x_adv, shaped like `x`, that AutoAttack finds on this block; where it finds none, `x`.

    Its random draws depend on `seed` and the block as a whole. Every component has the settings of the standard version.

    Args:
        model: maps [0, 1] images to logits [B, K]; with fewer than ten classes all others are targets.
        x, y: images [B, C, H, W] in [0, 1] and labels [B], on the device of the model.
        components: in this order, each over what the ones before left.
        running: is told the name of each component.
        warn: is told what AutoAttack's own checks complain of.

    Raises:
        AssertionError: what it found is outside the ball.
    """
    package = autoattack_package()
    module = importlib.import_module(package)
    space_model, encode, decode = in_space(model, threat.space)
    options: dict[str, Any] = {
        "eps": threat.eps,
        "norm": AUTOATTACK_NORMS[threat.norm],
        "seed": seed,
        "device": x.device,
    }
    if package == "autoattack":
        options["verbose"] = False
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), _listening(running, warn), torch.no_grad():
        attack = module.AutoAttack(space_model, version="standard", **options)
        attack.attacks_to_run = list(components)
        targets = min(9, space_model(encode(x[:1])).shape[1] - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        size = {"bs" if package == "autoattack" else "batch_size": len(x)}
        result = attack.run_standard_evaluation(encode(x), y, **size)
    x_adv = decode(result[0] if isinstance(result, tuple) else result)
    around = threat.space == "pixel"
    inside = inside_ball(x_adv, x, threat.eps + _BALL_SLACK, around=around, norm=threat.norm)
    assert bool(inside), f"AutoAttack left its ball of radius {threat.eps}"
    return x_adv


@contextmanager
def _listening(running: Callable[[str], None], warn: Callable[[str], None]) -> Iterator[None]:
    """Take what AutoAttack logs instead of letting it print."""
    logger = logging.getLogger("auto-attack")

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("running "):
                running(message.removeprefix("running "))
            elif record.levelno >= logging.WARNING:
                warn(message)

    handler, level, propagate = _Handler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
