"""Losses and divergences: values, gradients, range and precision."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nrat_scale.losses import DIVERGENCES, LOSSES
from tests.support.formulas import (
    BY_HAND,
    CASES,
    REPEATABLE,
    assert_close,
    extreme_logits,
    ikl_by_hand,
    kl_by_hand,
    random_logits,
    random_soft_labels,
    softmax,
    tensors,
)

# ---- losses ---------------------------------------------------------------------------------------------------------


def test_every_loss_and_divergence_has_a_second_derivation():
    """A loss without a second derivation in this file fails here."""
    assert set(LOSSES) == set(BY_HAND)
    assert set(DIVERGENCES) == {"kl", "sym_kl", "lse", "ikl"}


@pytest.mark.parametrize("name", LOSSES)
@REPEATABLE
@given(smoothing=st.sampled_from([0.0, 0.1, 0.6]), **CASES)
def test_loss_of_hard_soft_and_smoothed_labels(name, smoothing, seed, num_classes, scale):
    """L(z, y) by definition; a soft label mixes the losses of the labels, smoothing mixes in the uniform label.

    LSE has the soft or smoothed label inside the square instead.
    """
    z, _, y = random_logits(seed, num_classes, scale)
    q = random_soft_labels(seed, len(z), num_classes)
    logits, labels, soft = tensors(z, y, q)
    matrix = np.array([[BY_HAND[name](softmax(row), j) for j in range(num_classes)] for row in z])

    def expected(label: np.ndarray, s: float) -> np.ndarray:
        target = (1 - s) * label + s / num_classes
        if name == "lse":
            return np.array([((softmax(row) - goal) ** 2).sum() for row, goal in zip(z, target, strict=True)])
        return (target * matrix).sum(1)

    hard = matrix[np.arange(len(y)), y]
    assert_close(LOSSES[name](logits, labels), hard)
    assert_close(LOSSES[name](logits, labels, smoothing), expected(np.eye(num_classes)[y], smoothing))
    for s in (0.0, smoothing):
        assert_close(LOSSES[name](logits, soft, s), expected(q, s))
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    assert_close(LOSSES[name](logits, one_hot), hard)


@REPEATABLE
@given(smoothing=st.floats(0, 0.9), **CASES)
def test_smoothing_under_a_symmetric_loss_is_vacuous(smoothing, seed, num_classes, scale):
    """NCE_s = (1 - s) NCE + s / K, and RCE_s is affine in RCE: smoothing NCE+RCE only rescales it."""
    z, _, y = random_logits(seed, num_classes, scale)
    logits, labels = tensors(z, y)
    nce, rce = LOSSES["nce"](logits, labels), LOSSES["rce"](logits, labels)
    assert_close(LOSSES["nce"](logits, labels, smoothing), (1 - smoothing) * nce + smoothing / num_classes)
    constant = -math.log(1e-4) * smoothing * (num_classes - 1) / num_classes
    np.testing.assert_allclose(
        LOSSES["rce"](logits, labels, smoothing), (1 - smoothing) * rce + constant, rtol=0, atol=2e-5
    )


@REPEATABLE
@given(**CASES)
def test_rce_is_9_21_times_the_missing_probability(seed, num_classes, scale):
    """RCE = -log(1e-4) (1 - p_y), except for the clamp of tiny probabilities."""
    z, _, y = random_logits(seed, num_classes, scale)
    p_y = np.array([softmax(row)[j] for row, j in zip(z, y, strict=True)])
    rce = LOSSES["rce"](*tensors(z, y)).numpy()
    np.testing.assert_allclose(rce, 9.2103 * (1 - p_y), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_finite_for_extreme_logits(name):
    """Logits of +-1e4 in float32: no loss and no gradient overflows or becomes NaN."""
    z, _, y = extreme_logits()
    logits = z.clone().requires_grad_()
    for smoothing in (0.0, 0.1):
        losses = LOSSES[name](logits, y, smoothing)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isfinite().all() and gradient.isfinite().all()


# ---- divergences ----------------------------------------------------------------------------------------------------


@REPEATABLE
@given(**CASES)
def test_divergences_by_definition(seed, num_classes, scale):
    """KL, symmetric KL, squared error and IKL (with the image's own prediction as weight) from their formulas."""
    z, z_adv, _ = random_logits(seed, num_classes, scale)
    logits, logits_adv = tensors(z, z_adv)
    pairs = [(softmax(a), softmax(b)) for a, b in zip(z, z_adv, strict=True)]
    assert_close(DIVERGENCES["kl"](logits, logits_adv), [kl_by_hand(p, q) for p, q in pairs])
    assert_close(
        DIVERGENCES["sym_kl"](logits, logits_adv), [(kl_by_hand(p, q) + kl_by_hand(q, p)) / 2 for p, q in pairs]
    )
    assert_close(DIVERGENCES["lse"](logits, logits_adv), [((p - q) ** 2).sum() for p, q in pairs])
    assert_close(
        DIVERGENCES["ikl"](logits, logits_adv), [ikl_by_hand(a, b, softmax(a)) for a, b in zip(z, z_adv, strict=True)]
    )


@REPEATABLE
@given(dtype=st.sampled_from([torch.float32, torch.float64]), **CASES)
def test_divergences_are_not_negative_and_vanish_for_equal_predictions(dtype, seed, num_classes, scale):
    """KL, symKL and LSE measure a distance: 0 for the same prediction, even from shifted logits."""
    z, z_adv, _ = random_logits(seed, num_classes, scale)
    logits, logits_adv = (tensor.to(dtype) for tensor in tensors(z, z_adv))
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    for name in ("kl", "sym_kl", "lse"):
        assert DIVERGENCES[name](logits, logits_adv).min() >= -rounding
        assert DIVERGENCES[name](logits, logits).abs().max() == 0
        assert DIVERGENCES[name](logits, logits + 3).abs().max() < rounding
    torch.testing.assert_close(
        DIVERGENCES["sym_kl"](logits, logits_adv), DIVERGENCES["sym_kl"](logits_adv, logits), rtol=0, atol=0
    )
    assert DIVERGENCES["sym_kl"](logits, logits_adv).min() >= 0


def _gradients(function: Callable[[Tensor, Tensor], Tensor], z: np.ndarray, z_adv: np.ndarray) -> list[np.ndarray]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors(z, z_adv)]
    total = function(*leaves).sum()
    return [gradient.numpy() for gradient in torch.autograd.grad(total, leaves)]


@REPEATABLE
@given(**CASES)
def test_ikl_has_the_gradients_of_kl_and_a_symmetric_mse(seed, num_classes, scale):
    """Decoupling theorem (Cui et al. 2024): weighted MSE has KL's gradient in z, cross-entropy KL's gradient in z'.

    IKL lets the weighted MSE reach z' as well, where by symmetry its gradient is minus that in z.
    """
    z, z_adv, _ = random_logits(seed, num_classes, scale)
    kl_nat, kl_adv = _gradients(DIVERGENCES["kl"], z, z_adv)
    ikl_nat, ikl_adv = _gradients(DIVERGENCES["ikl"], z, z_adv)
    np.testing.assert_allclose(ikl_nat, kl_nat, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ikl_adv, kl_adv - kl_nat, rtol=1e-8, atol=1e-10)

    def decoupled(a: Tensor, b: Tensor) -> Tensor:
        return DIVERGENCES["ikl"](a, b) - _weighted_mse(a, b) + _weighted_mse(a, b.detach())

    for gradient, expected in zip(_gradients(decoupled, z, z_adv), (kl_nat, kl_adv), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10)


def _weighted_mse(logits: Tensor, logits_adv: Tensor) -> Tensor:
    weight, d = logits.detach().softmax(1), logits - logits_adv
    pairs = (d[:, :, None] - d[:, None, :]).square()
    return 0.25 * (weight[:, :, None] * weight[:, None, :] * pairs).sum((1, 2))


@REPEATABLE
@given(soft=st.booleans(), **CASES)
def test_ikl_weights_are_the_mean_prediction_of_the_class(soft, seed, num_classes, scale):
    """With labels w is the class mean over the batch, for soft labels the mixture of means; gradients do not enter w."""
    z, z_adv, y = random_logits(seed, num_classes, scale)
    q = random_soft_labels(seed, len(z), num_classes) if soft else np.eye(num_classes)[y]
    p = np.array([softmax(row) for row in z])
    counts = q.sum(0)
    means = np.array([(q[:, c] @ p) / counts[c] if counts[c] else np.zeros(num_classes) for c in range(num_classes)])
    weights = q @ means
    np.testing.assert_allclose(weights.sum(1), 1)
    labels = torch.from_numpy(q if soft else y)
    expected = [ikl_by_hand(a, b, w) for a, b, w in zip(z, z_adv, weights, strict=True)]
    assert_close(DIVERGENCES["ikl"](*tensors(z, z_adv), labels), expected)


def test_ikl_does_not_cancel_in_float32():
    """For nearly one-hot predictions of large logits the variance is far smaller than the squared mean."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, generator=generator, dtype=torch.float64) * 5 + 1000
    logits_adv = torch.randn(64, 10, generator=generator, dtype=torch.float64) * 5
    logits, logits_adv = logits.float().double(), logits_adv.float().double()
    exact = DIVERGENCES["ikl"](logits, logits_adv)
    torch.testing.assert_close(
        DIVERGENCES["ikl"](logits.float(), logits_adv.float()).double(), exact, rtol=1e-3, atol=1e-3
    )
