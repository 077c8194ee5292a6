"""Losses, divergences and MART derived a second time in plain numpy from docs/objectives.md, and logits to try them on."""

import math
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=25)


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "num_classes": st.integers(2, 12),
    "scale": st.sampled_from([0.3, 2.0, 6.0]),
}


def random_logits(
    seed: int, num_classes: int, scale: float, batch: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Natural and adversarial logits float64 [B, K] and labels [B]."""
    generator = np.random.default_rng(seed)
    z = scale * generator.standard_normal((batch, num_classes))
    z_adv = z + scale * 0.5 * generator.standard_normal((batch, num_classes))
    return z, z_adv, generator.integers(0, num_classes, batch)


def random_soft_labels(seed: int, batch: int, num_classes: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).dirichlet(np.ones(num_classes), batch)


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def assert_close(actual: Tensor, expected: object, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=rtol, atol=1e-9)


def rce_by_hand(p: np.ndarray, j: int) -> float:
    total = 0.0
    for k in range(len(p)):
        total -= min(max(p[k], 1e-7), 1.0) * math.log(min(max(1.0 if k == j else 0.0, 1e-4), 1.0))
    return total


def nce_by_hand(p: np.ndarray, j: int) -> float:
    return math.log(p[j]) / sum(math.log(q) for q in p)


def nfl_by_hand(p: np.ndarray, j: int) -> float:
    focal = [-((1 - q) ** 0.5) * math.log(q) for q in p]
    return focal[j] / sum(focal)


BY_HAND: dict[str, Callable[[np.ndarray, int], float]] = {
    "ce": lambda p, j: -math.log(p[j]),
    "nce": nce_by_hand,
    "rce": rce_by_hand,
    "nce_rce": lambda p, j: nce_by_hand(p, j) + rce_by_hand(p, j),
    "gce": lambda p, j: (1 - p[j] ** 0.7) / 0.7,
    "sce": lambda p, j: -0.1 * math.log(p[j]) + rce_by_hand(p, j),
    "nfl_rce": lambda p, j: nfl_by_hand(p, j) + rce_by_hand(p, j),
    "mae": lambda p, j: sum(abs(q - (k == j)) for k, q in enumerate(p)),
    "agce": lambda p, j: (1.6**0.6 - (0.6 + p[j]) ** 0.6) / 0.6,
    "nce_agce": lambda p, j: nce_by_hand(p, j) + 4 * (7**1.5 - (6 + p[j]) ** 1.5) / 1.5,
    "lse": lambda p, j: sum((q - (k == j)) ** 2 for k, q in enumerate(p)),
}


def kl_by_hand(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def ikl_by_hand(z: np.ndarray, z_adv: np.ndarray, w: np.ndarray, alpha: float = 1.0, beta: float = 1.0) -> float:
    """Cui et al. 2024: beta times the double sum over classes, alpha times the cross-entropy of the predictions."""
    total = 0.0
    for j in range(len(z)):
        for k in range(len(z)):
            total += beta * 0.25 * w[j] * w[k] * ((z[j] - z[k]) - (z_adv[j] - z_adv[k])) ** 2
    return total - alpha * float((softmax(z) * np.log(softmax(z_adv))).sum())


def mart_by_hand(z: np.ndarray, z_adv: np.ndarray, j: int, lam: float, *, margin: bool) -> float:
    p, p_adv = softmax(z), softmax(z_adv)
    runner_up = max(p_adv[k] for k in range(len(p)) if k != j)
    outer = BY_HAND["ce" if margin else "nce_rce"](p_adv, j)
    outer -= math.log(1.0001 - runner_up + 1e-12) if margin else 0.0
    kl = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, p_adv, strict=True))
    return outer + lam * kl * (1.0000001 - p[j])


def extreme_logits(batch: int = 24, num_classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z, z_adv = (torch.randn(batch, num_classes, generator=generator).sign() * 1e4 for _ in range(2))
    z[0], z[1] = 0, 1e4
    z[2:8], z_adv[2:8] = -1e4, -1e4
    z[2:8].fill_diagonal_(1e4)
    z_adv[2:5].fill_diagonal_(1e4)  # three images where both predictions are certain and equal
    return z, z_adv, torch.arange(batch) % num_classes
