"""Which images a model still classifies rightly under an attack, and accuracy with its interval.

Training's validation and the final evaluation both call `correct_under`. Accuracy is a mean over images, never of batch
means. Random starts are drawn by image id, so results do not depend on how images are split into batches or over
processes; AutoAttack runs on fixed blocks of images in id order.
"""

import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nrat_scale.attacks import ThreatSpec, apply_noise, in_space, pgd, start_noise
from nrat_scale.data import to_float
from nrat_scale.errors import UserError
from nrat_scale.objectives import LOSSES
from nrat_scale.seeds import torch_generator

ATTACK = re.compile(r"(natural|fgsm|aa|pgd([1-9][0-9]*)|cw([1-9][0-9]*))")
_Z95 = 1.959963984540054


class Interrupted(Exception):
    """An evaluation was given up because somebody asked for it."""


# ---- per-image outcomes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What is evaluated: images uint8 [n, C, H, W], labels int64 [n], ids int64 [n] that seed each image's noise."""

    pixels: Tensor
    labels: Tensor
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: np.ndarray) -> "Images":
        """The images in `rows` [m]."""
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return Images(self.pixels[index], self.labels[index], self.ids[rows])


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The CW loss of each image [B]: max over k != y of z_k, minus z_y; above 0 the image is misclassified."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


_INNERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pgd": LOSSES["ce"], "fgsm": LOSSES["ce"], "cw": margin}


def correct_under(
    attack: str,
    model: nn.Module,
    images: Images,
    threat: ThreatSpec,
    *,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Which images the model still classifies rightly under `attack`: bool [n].

    Args:
        attack: `natural`; `fgsm`; `pgdN` (cross-entropy) or `cwN` (margin), N steps from a uniform start; `aa`
            (AutoAttack standard).
        model: in evaluation mode, on the device to use; maps [0, 1] images to logits.
        threat: eps, step length and space.
        seed: of the random starts.
        batch_size: images at a time; for `aa` the size of its blocks, which its result depends on.
        stopped: asked before each block; once it is true the rest is given up.

    Raises:
        Interrupted: `stopped` said so.
        UserError: an unknown attack.
        FloatingPointError: logits or gradients are not finite.
    """
    match = ATTACK.fullmatch(attack)
    if match is None:
        raise UserError(f"Unknown attack '{attack}'. Known: natural, fgsm, pgdN, cwN (N steps, such as pgd20), aa.")
    assert not model.training, "a model is evaluated in evaluation mode"
    natural = _predict_right(model, images, batch_size)
    if attack == "natural":
        return natural
    # A misclassified image is broken already and need not be attacked. AutoAttack skips those by itself; it gets whole
    # blocks, so that calling it directly on the same blocks gives the same images.
    rows = np.arange(len(images)) if attack == "aa" else np.flatnonzero(natural)
    outcome = natural.copy()
    blocks = range(0, len(rows), batch_size)
    with tqdm(total=len(rows), desc=attack, unit="img", disable=not progress, leave=False) as bar:
        for start in blocks:
            if stopped():
                raise Interrupted
            block = rows[start : start + batch_size]
            outcome[block] = _survivors(match, model, images.take(block), threat, seed, bar)
            bar.update(len(block))
    return outcome


def _survivors(
    match: re.Match[str], model: nn.Module, images: Images, threat: ThreatSpec, seed: int, bar: Any
) -> np.ndarray:
    device = _device(model)
    x, y = to_float(images.pixels.to(device)), images.labels.to(device)
    if match[1] == "aa":
        x_adv = _autoattack(model, x, y, threat, seed, bar)
    else:
        kind = re.sub(r"[0-9]", "", match[1])
        steps = int(match[2] or match[3] or 1)
        init, step = ("zero", threat.eps) if kind == "fgsm" else ("uniform", threat.step)
        spec = replace(threat, num_steps=steps, step=step, init=init, bn="eval")
        x_adv = pgd(
            model, x, lambda logits: _INNERS[kind](logits, y), spec, start=_start(model, x, images.ids, spec, seed)
        )
    return _argmax(model, x_adv).eq(y).cpu().numpy()


def _start(model: nn.Module, x: Tensor, ids: np.ndarray, threat: ThreatSpec, seed: int) -> Tensor:
    """The random start of each image, drawn by its id (on the CPU, so that it is the same on every device)."""
    cpu = torch.zeros(())
    noise = torch.stack(
        [start_noise(x.shape[1:], threat.init, cpu, torch_generator("cpu", seed, "evaluate", int(i))) for i in ids]
    )
    _, encode, _ = in_space(model, threat.space)
    return apply_noise(encode(x), noise.to(x), threat)


@torch.no_grad()
def _argmax(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    if not bool(logits.isfinite().all()):
        # argmax of NaN is class 0: it would pass for a prediction.
        raise FloatingPointError("The model's logits are not finite, so its accuracy means nothing.")
    return logits.argmax(1)


def _predict_right(model: nn.Module, images: Images, batch_size: int) -> np.ndarray:
    device = _device(model)
    parts = [_argmax(model, to_float(pixels.to(device))).cpu() for pixels in images.pixels.split(max(batch_size, 1))]
    return np.asarray(torch.cat(parts).eq(images.labels).numpy()) if parts else np.zeros(0, bool)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---- AutoAttack -----------------------------------------------------------------------------------------------------


def autoattack_package() -> str:
    """The official `autoattack` where it is installed, else `pyautoattack`, its release on PyPI."""
    return "autoattack" if importlib.util.find_spec("autoattack") else "pyautoattack"


def _autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatSpec, seed: int, bar: Any) -> Tensor:
    """AutoAttack standard (Croce and Hein 2020) on one block: x_adv, shaped like `x`, in pixels."""
    package = autoattack_package()
    module = importlib.import_module(package)
    space_model, encode, decode = in_space(model, threat.space)
    options: dict[str, Any] = {
        "eps": threat.eps,
        "norm": "Linf",
        "seed": seed,
        "device": x.device,
        "version": "standard",
    }
    if package == "autoattack":
        options["verbose"] = False
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), _shown(bar), torch.no_grad():
        attack = module.AutoAttack(space_model, **options)
        targets = min(9, space_model(encode(x[:1])).shape[1] - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        size = {"bs" if package == "autoattack" else "batch_size": len(x)}
        result = attack.run_standard_evaluation(encode(x), y, **size)
    x_adv = decode(result[0] if isinstance(result, tuple) else result)
    if threat.space == "pixel":
        _check_ball(x_adv, x, threat.eps)
    return x_adv


def _check_ball(x_adv: Tensor, x: Tensor, eps: float) -> None:
    distance = float((x_adv.float() - x.float()).abs().max())
    inside = bool(((x_adv >= 0) & (x_adv <= 1)).all()) and distance <= eps + 1e-6
    assert inside, f"AutoAttack left its ball: distance {distance}, eps {eps}"


@contextmanager
def _shown(bar: Any) -> Iterator[None]:
    """Show on the progress bar which of AutoAttack's four attacks is running; its logger stays silent otherwise."""
    logger = logging.getLogger("auto-attack")

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("running "):
                bar.set_postfix_str(message.removeprefix("running "))
            elif record.levelno >= logging.WARNING:
                bar.write(f"AutoAttack: {message}")

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


# ---- numbers --------------------------------------------------------------------------------------------------------


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the proportion correct / n (Wilson 1927), as fractions."""
    assert n > 0
    p, z2 = correct / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_record(outcome: np.ndarray) -> dict[str, Any]:
    """Counts, accuracy and interval of per-image outcomes bool [n]."""
    correct, n = int(outcome.sum()), len(outcome)
    low, high = wilson(correct, n)
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high}
