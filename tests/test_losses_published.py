"""Every loss and divergence against its publication in float64: value and gradients to 1e-9, written from the papers.

The references below name one probability at a time, and what the authors' code detaches is a constant in them, so that they
share neither formula nor code with `nrat_scale.losses`.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nrat_scale.losses import DIVERGENCES, LOSSES, ikl
from tests.support.formulas import random_logits, tensors

Reference = Callable[[Tensor, int], Tensor]  # logits [K] of one image and its label -> scalar


def _p(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def _rce(z: Tensor, y: int) -> Tensor:
    """Wang et al. 2019, eq. 6, with log 0 = -4 log 10 and the clamp of p in the APL authors' code."""
    p = _p(z).clamp(1e-7, 1.0)
    return -sum(p[k] * math.log(1e-4) for k in range(len(z)) if k != y)


def _nfl(z: Tensor, y: int) -> Tensor:
    """Ma et al. 2020, Table 1, gamma 0.5; their code takes every (1 - p_k)^gamma as a constant."""
    p = _p(z)
    focal = [(1 - p[k]).item() ** 0.5 * -p[k].log() for k in range(len(z))]
    return focal[y] / sum(focal)


def _nce(z: Tensor, y: int) -> Tensor:
    """Ma et al. 2020, eq. 8."""
    p = _p(z)
    return -p[y].log() / sum(-p[k].log() for k in range(len(z)))


PUBLISHED: dict[str, Reference] = {
    "ce": lambda z, y: -_p(z)[y].log(),
    "nce": _nce,
    "rce": _rce,
    "nce_rce": lambda z, y: _nce(z, y) + _rce(z, y),
    "gce": lambda z, y: (1 - _p(z)[y] ** 0.7) / 0.7,  # Zhang and Sabuncu 2018, eq. 6
    "sce": lambda z, y: 0.1 * -_p(z)[y].log() + _rce(z, y),  # Wang et al. 2019, eq. 8, alpha 0.1, beta 1
    "nfl_rce": lambda z, y: _nfl(z, y) + _rce(z, y),
    "mae": lambda z, y: (
        (1 - _p(z)[y]) + sum(_p(z)[k] for k in range(len(z)) if k != y)
    ),  # Ghosh et al. 2017: |e_y - p|_1
    "agce": lambda z, y: (1.6**0.6 - (0.6 + _p(z)[y]) ** 0.6) / 0.6,  # Zhou et al. 2021, a = q = 0.6
    # Zhou et al. 2021, weights 1 and 4, a = 6, q = 1.5
    "nce_agce": lambda z, y: _p(z)[y].log() / _p(z).log().sum() + 4 * (7**1.5 - (6 + _p(z)[y]) ** 1.5) / 1.5,
    "lse": lambda z, y: sum((_p(z)[k] - float(k == y)) ** 2 for k in range(len(z))),  # Pang et al. 2022
}


def _check(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    one, two = (torch.autograd.grad(value.sum(), leaves, materialize_grads=True) for value in (ours, theirs))
    for gradient, expected in zip(one, two, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_every_loss_has_a_published_reference() -> None:
    """A loss without one fails here."""
    assert set(PUBLISHED) == set(LOSSES)


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_published_ones(name: str, scale: float) -> None:
    """On flat and on nearly one-hot predictions of 2, 7 and 10 classes."""
    for num_classes in (2, 7, 10):
        z, _, y = random_logits(num_classes, num_classes, scale, batch=12)
        (logits,) = tensors(z)
        logits.requires_grad_()
        ours = LOSSES[name](logits, torch.from_numpy(y))
        _check(ours, torch.stack([PUBLISHED[name](row, int(j)) for row, j in zip(logits, y, strict=True)]), [logits])


def test_the_focal_factor_has_no_gradient() -> None:
    """Differentiated through its powers, NFL has the same value and another gradient."""
    z, _, y = random_logits(0, 10, 0.3, batch=12)
    logits, labels = tensors(z, y)
    logits.requires_grad_()
    p = logits.softmax(1)
    focal = -((1 - p) ** 0.5) * p.log()
    through = focal.gather(1, labels[:, None]).squeeze(1) / focal.sum(1)
    ours = LOSSES["nfl_rce"](logits, labels) - LOSSES["rce"](logits, labels)
    torch.testing.assert_close(ours, through, rtol=0, atol=1e-9)
    gradient, other = (torch.autograd.grad(value.sum(), logits)[0] for value in (ours, through))
    assert (gradient - other).norm() > 0.05 * other.norm()


def _dkl_loss(logits_nat: Tensor, logits_adv: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """Cui et al. 2024, eq. 5 and 6: w_jk = w_j w_k, Delta n_jk = o_j - o_k; no gradient enters w and the soft label."""
    total = torch.zeros(len(logits_nat), dtype=torch.float64)
    for i, (z, z_adv) in enumerate(zip(logits_nat, logits_adv, strict=True)):
        for j in range(len(z)):
            for k in range(len(z)):
                delta = (z[j] - z[k]) - (z_adv[j] - z_adv[k])
                total[i] = total[i] + beta / 4 * (weight[i, j] * weight[i, k]).item() * delta**2
            total[i] = total[i] - alpha * _p(z)[j].item() * _p(z_adv)[j].log()
    return total


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (4.0, 20.0), (3.0, 10.0), (0.0, 1.0), (1.0, 0.0)])
def test_ikl_and_its_gradients_are_the_published_ones(scale: float, alpha: float, beta: float) -> None:
    """Weighted MSE times beta and soft cross-entropy times alpha, with gradients to both logits, from given class means."""
    z, z_adv, y = random_logits(5, 5, scale, batch=6)
    logits, logits_adv = (tensor.requires_grad_() for tensor in tensors(z, z_adv))
    means = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(5), 5))
    ours = ikl(logits, logits_adv, torch.from_numpy(y), means, alpha=alpha, beta=beta)
    _check(ours, _dkl_loss(logits, logits_adv, means[torch.from_numpy(y)], alpha, beta), [logits, logits_adv])


@pytest.mark.parametrize("name", ["kl", "sym_kl", "lse"])
def test_divergence_and_its_gradients_are_the_published_ones(name: str) -> None:
    """KL (Zhang et al. 2019), symmetric KL (NRAT, eq. 16) and squared error (Pang et al. 2022), gradients to both logits."""
    z, z_adv, _ = random_logits(6, 6, 2.0, batch=8)
    logits, logits_adv = (tensor.requires_grad_() for tensor in tensors(z, z_adv))
    published = {
        "kl": lambda p, q: sum(p[k] * (p[k] / q[k]).log() for k in range(6)),
        "sym_kl": lambda p, q: sum((p[k] - q[k]) * (p[k] / q[k]).log() for k in range(6)) / 2,
        "lse": lambda p, q: sum((q[k] - p[k]) ** 2 for k in range(6)),
    }[name]
    theirs = torch.stack([published(_p(a), _p(b)) for a, b in zip(logits, logits_adv, strict=True)])
    _check(DIVERGENCES[name](logits, logits_adv), theirs, [logits, logits_adv])
