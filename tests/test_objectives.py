"""Losses, divergences and objectives, each derived a second time in plain numpy from docs/objectives.md."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.core.errors import UserError
from nrat_scale.objectives import DIVERGENCES, FAMILIES, LOSSES, OBJECTIVES, Objective, ObjectiveSpec, build
from nrat_scale.recipe import load_recipe

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=25)
CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "num_classes": st.integers(2, 12),
    "scale": st.sampled_from([0.3, 2.0, 6.0]),
}


def _logits(seed: int, num_classes: int, scale: float, batch: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Natural and adversarial logits float64 [B, K] and labels [B]."""
    generator = np.random.default_rng(seed)
    z = scale * generator.standard_normal((batch, num_classes))
    z_adv = z + scale * 0.5 * generator.standard_normal((batch, num_classes))
    return z, z_adv, generator.integers(0, num_classes, batch)


def _soft_labels(seed: int, batch: int, num_classes: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).dirichlet(np.ones(num_classes), batch)


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def _close(actual: Tensor, expected: object, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=rtol, atol=1e-9)


# ---- second derivations, for one image with probabilities p and label j ----------------------------------------------


def _rce(p: np.ndarray, j: int) -> float:
    total = 0.0
    for k in range(len(p)):
        total -= min(max(p[k], 1e-7), 1.0) * math.log(min(max(1.0 if k == j else 0.0, 1e-4), 1.0))
    return total


def _nce(p: np.ndarray, j: int) -> float:
    return math.log(p[j]) / sum(math.log(q) for q in p)


def _nfl(p: np.ndarray, j: int) -> float:
    focal = [-((1 - q) ** 0.5) * math.log(q) for q in p]
    return focal[j] / sum(focal)


BY_HAND: dict[str, Callable[[np.ndarray, int], float]] = {
    "ce": lambda p, j: -math.log(p[j]),
    "nce": _nce,
    "rce": _rce,
    "nce_rce": lambda p, j: _nce(p, j) + _rce(p, j),
    "gce": lambda p, j: (1 - p[j] ** 0.7) / 0.7,
    "sce": lambda p, j: -0.1 * math.log(p[j]) + _rce(p, j),
    "nfl_rce": lambda p, j: _nfl(p, j) + _rce(p, j),
    "mae": lambda p, j: sum(abs(q - (k == j)) for k, q in enumerate(p)),
    "agce": lambda p, j: (1.6**0.6 - (0.6 + p[j]) ** 0.6) / 0.6,
}


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def _ikl(z: np.ndarray, z_adv: np.ndarray, w: np.ndarray) -> float:
    """Cui et al., eq. 8 with alpha = beta = 1: the double sum over classes, and the cross-entropy of the predictions."""
    total = 0.0
    for j in range(len(z)):
        for k in range(len(z)):
            total += 0.25 * w[j] * w[k] * ((z[j] - z[k]) - (z_adv[j] - z_adv[k])) ** 2
    return total - float((_softmax(z) * np.log(_softmax(z_adv))).sum())


def _mart(z: np.ndarray, z_adv: np.ndarray, j: int, lam: float, *, margin: bool) -> float:
    p, p_adv = _softmax(z), _softmax(z_adv)
    runner_up = max(p_adv[k] for k in range(len(p)) if k != j)
    outer = BY_HAND["ce" if margin else "nce_rce"](p_adv, j)
    outer -= math.log(1.0001 - runner_up + 1e-12) if margin else 0.0
    kl = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, p_adv, strict=True))
    return outer + lam * kl * (1.0000001 - p[j])


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_every_loss_and_divergence_has_a_second_derivation():
    """A loss without a second derivation in this file fails here."""
    assert set(LOSSES) == set(BY_HAND)
    assert set(DIVERGENCES) == {"kl", "sym_kl", "lse", "ikl"}


@pytest.mark.parametrize("name", LOSSES)
@REPEATABLE
@given(smoothing=st.sampled_from([0.0, 0.1, 0.6]), **CASES)
def test_loss_of_hard_soft_and_smoothed_labels(name, smoothing, seed, num_classes, scale):
    """L(z, y) by definition; a soft label mixes the losses of the labels, smoothing mixes in the uniform label."""
    z, _, y = _logits(seed, num_classes, scale)
    q = _soft_labels(seed, len(z), num_classes)
    logits, labels, soft = _tensors(z, y, q)
    matrix = np.array([[BY_HAND[name](_softmax(row), j) for j in range(num_classes)] for row in z])
    hard = matrix[np.arange(len(y)), y]
    _close(LOSSES[name](logits, labels), hard)
    _close(LOSSES[name](logits, labels, smoothing), (1 - smoothing) * hard + smoothing * matrix.mean(1))
    mixture = (q * matrix).sum(1)
    _close(LOSSES[name](logits, soft), mixture)
    _close(LOSSES[name](logits, soft, smoothing), (1 - smoothing) * mixture + smoothing * matrix.mean(1))
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    _close(LOSSES[name](logits, one_hot), hard)


@REPEATABLE
@given(smoothing=st.floats(0, 0.9), **CASES)
def test_smoothing_under_a_symmetric_loss_is_vacuous(smoothing, seed, num_classes, scale):
    """NCE_s = (1 - s) NCE + s / K, and RCE_s is affine in RCE: smoothing NCE+RCE only rescales it."""
    z, _, y = _logits(seed, num_classes, scale)
    logits, labels = _tensors(z, y)
    nce, rce = LOSSES["nce"](logits, labels), LOSSES["rce"](logits, labels)
    _close(LOSSES["nce"](logits, labels, smoothing), (1 - smoothing) * nce + smoothing / num_classes)
    constant = -math.log(1e-4) * smoothing * (num_classes - 1) / num_classes
    np.testing.assert_allclose(
        LOSSES["rce"](logits, labels, smoothing), (1 - smoothing) * rce + constant, rtol=0, atol=2e-5
    )


@REPEATABLE
@given(**CASES)
def test_rce_is_9_21_times_the_missing_probability(seed, num_classes, scale):
    """RCE = -log(1e-4) (1 - p_y), except for the clamp of tiny probabilities."""
    z, _, y = _logits(seed, num_classes, scale)
    p_y = np.array([_softmax(row)[j] for row, j in zip(z, y, strict=True)])
    rce = LOSSES["rce"](*_tensors(z, y)).numpy()
    np.testing.assert_allclose(rce, 9.2103 * (1 - p_y), rtol=0, atol=1e-4)


@REPEATABLE
@given(a=st.sampled_from([1.0, 0.5]), b=st.sampled_from([1.0, 10.0]), **CASES)
def test_weights_of_nce_and_rce(a, b, seed, num_classes, scale):
    """a NCE + b RCE (the APL authors use 1, 10 on MNIST), also as inner loss and with smoothing."""
    z, _, y = _logits(seed, num_classes, scale)
    logits, labels = _tensors(z, y)
    parts = [np.array([part(_softmax(row), j) for row, j in zip(z, y, strict=True)]) for part in (_nce, _rce)]
    objective = build("pgd_at_apl", a=a, b=b, inner="nce_rce")
    _close(objective.per_sample(None, logits, labels), a * parts[0] + b * parts[1])
    _close(objective.inner(None, labels)(logits), a * parts[0] + b * parts[1])
    smoothed = build("pgd_at_apl", a=a, b=b, smoothing=0.3).per_sample(None, logits, labels)
    by_name = [LOSSES[name](logits, labels, 0.3) for name in ("nce", "rce")]
    _close(smoothed, a * by_name[0] + b * by_name[1])


@REPEATABLE
@given(a=st.sampled_from([1.0, 0.5]), b=st.sampled_from([1.0, 10.0]), soft=st.booleans(), **CASES)
def test_plugin_smoothing_is_inside_the_logarithm(a, b, soft, seed, num_classes, scale):
    """RCE becomes -sum_k p_k log q_k with q the smoothed label; NCE is smoothed as in `mixed`."""
    s = 0.1
    z, _, y = _logits(seed, num_classes, scale)
    label = _soft_labels(seed, len(z), num_classes) if soft else np.eye(num_classes)[y]
    q = (1 - s) * label + s / num_classes
    expected = []
    for row, target in zip(z, q, strict=True):
        p = _softmax(row)
        nce = sum(weight * _nce(p, j) for j, weight in enumerate(target))
        expected.append(a * nce - b * float((np.clip(p, 1e-7, 1) * np.log(target)).sum()))
    objective = build("pgd_at_apl", smoothing=s, smoothing_mode="plugin", a=a, b=b)
    _close(objective.per_sample(None, torch.from_numpy(z), torch.from_numpy(label if soft else y)), expected)


def test_plugin_slope():
    """At s = 0.1 and K = 10 plugin RCE falls by 4.511 per unit of p_y, mixed RCE by 0.9 * 9.21."""
    z, _, _ = _logits(3, 10, 1.0, batch=1)
    p, (logits,) = _softmax(z[0]), _tensors(z)

    def rce(mode: str, label: int) -> float:
        objective = build("pgd_at_apl", smoothing=0.1, smoothing_mode=mode, a=0.0)
        return objective.per_sample(None, logits, torch.tensor([label])).item()

    for mode, slope in (("plugin", 4.511), ("mixed", 0.9 * 9.2103)):
        assert (rce(mode, 0) - rce(mode, 1)) / (p[1] - p[0]) == pytest.approx(slope, abs=1e-3)


# ---- divergences ----------------------------------------------------------------------------------------------------


@REPEATABLE
@given(**CASES)
def test_divergences_by_definition(seed, num_classes, scale):
    """KL, symmetric KL, squared error and IKL (with the image's own prediction as weight) from their formulas."""
    z, z_adv, _ = _logits(seed, num_classes, scale)
    logits, logits_adv = _tensors(z, z_adv)
    pairs = [(_softmax(a), _softmax(b)) for a, b in zip(z, z_adv, strict=True)]
    _close(DIVERGENCES["kl"](logits, logits_adv), [_kl(p, q) for p, q in pairs])
    _close(DIVERGENCES["sym_kl"](logits, logits_adv), [(_kl(p, q) + _kl(q, p)) / 2 for p, q in pairs])
    _close(DIVERGENCES["lse"](logits, logits_adv), [((p - q) ** 2).sum() for p, q in pairs])
    _close(DIVERGENCES["ikl"](logits, logits_adv), [_ikl(a, b, _softmax(a)) for a, b in zip(z, z_adv, strict=True)])


@REPEATABLE
@given(dtype=st.sampled_from([torch.float32, torch.float64]), **CASES)
def test_divergences_are_not_negative_and_vanish_for_equal_predictions(dtype, seed, num_classes, scale):
    """KL, symKL and LSE measure a distance: 0 for the same prediction, even from shifted logits."""
    z, z_adv, _ = _logits(seed, num_classes, scale)
    logits, logits_adv = (tensor.to(dtype) for tensor in _tensors(z, z_adv))
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
    leaves = [tensor.clone().requires_grad_() for tensor in _tensors(z, z_adv)]
    total = function(*leaves).sum()
    return [gradient.numpy() for gradient in torch.autograd.grad(total, leaves)]


@REPEATABLE
@given(**CASES)
def test_ikl_has_the_gradients_of_kl_and_a_symmetric_mse(seed, num_classes, scale):
    """Decoupling theorem (Cui et al. 2024): weighted MSE has KL's gradient in z, cross-entropy KL's gradient in z'.

    IKL lets the weighted MSE reach z' as well, where by symmetry its gradient is minus that in z.
    """
    z, z_adv, _ = _logits(seed, num_classes, scale)
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
    z, z_adv, y = _logits(seed, num_classes, scale)
    q = _soft_labels(seed, len(z), num_classes) if soft else np.eye(num_classes)[y]
    p = np.array([_softmax(row) for row in z])
    counts = q.sum(0)
    means = np.array([(q[:, c] @ p) / counts[c] if counts[c] else np.zeros(num_classes) for c in range(num_classes)])
    weights = q @ means
    np.testing.assert_allclose(weights.sum(1), 1)
    labels = torch.from_numpy(q if soft else y)
    expected = [_ikl(a, b, w) for a, b, w in zip(z, z_adv, weights, strict=True)]
    _close(DIVERGENCES["ikl"](*_tensors(z, z_adv), labels), expected)


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


# ---- range and precision --------------------------------------------------------------------------------------------


def _extreme(batch: int = 24, num_classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z, z_adv = (torch.randn(batch, num_classes, generator=generator).sign() * 1e4 for _ in range(2))
    z[0], z[1] = 0, 1e4
    z[2:8], z_adv[2:8] = -1e4, -1e4
    z[2:8].fill_diagonal_(1e4)
    z_adv[2:5].fill_diagonal_(1e4)  # three images where both predictions are certain and equal
    return z, z_adv, torch.arange(batch) % num_classes


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_finite_for_extreme_logits(name):
    """Logits of +-1e4 in float32: no loss and no gradient overflows or becomes NaN."""
    z, _, y = _extreme()
    logits = z.clone().requires_grad_()
    for smoothing in (0.0, 0.1):
        losses = LOSSES[name](logits, y, smoothing)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_stay_finite_for_extreme_logits(name):
    """The same for the outer loss (and so for every divergence) and for the inner loss."""
    z, z_adv, y = _extreme()
    objective = build(name)
    leaves = [z.clone().requires_grad_(), z_adv.clone().requires_grad_()]
    losses = objective.per_sample(leaves[0], leaves[1], y)
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    inner = objective.inner(leaves[0], y)(leaves[1])
    assert torch.autograd.grad(inner.sum(), leaves[1])[0].isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_at_least_float32_whatever_the_logits(name, dtype, autocast):
    """Everything is computed in float32 or better: in bf16 MART's 1.0001 rounds to 1 and its logarithm explodes."""
    generator = torch.Generator().manual_seed(2)
    z = (4 * torch.randn(32, 10, generator=generator)).to(dtype)
    z_adv = (4 * torch.randn(32, 10, generator=generator)).to(dtype)
    y = torch.arange(32) % 10
    z_adv[0, :], z_adv[0, 3] = -30, 30  # certain of a wrong class: 1 - p'_j vanishes
    objective = build(name, num_classes=10)
    exact = objective.per_sample(z.double(), z_adv.double(), y)
    exact_inner = objective.inner(z.double(), y)(z_adv.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        objective.update(z, y)
        losses = build(name).per_sample(z, z_adv, y)
        inner = build(name).inner(z, y)(z_adv)
    if objective.class_sums is not None:
        one_hot = torch.nn.functional.one_hot(y, 10).double()
        assert objective.class_sums.dtype == torch.float32
        torch.testing.assert_close(objective.class_sums.double(), one_hot.T @ z.double().softmax(1), rtol=0, atol=1e-5)
    for low, high in ((losses, exact), (inner, exact_inner)):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=2e-4, atol=2e-5)


# ---- presets --------------------------------------------------------------------------------------------------------

# name: family, C, D, lam, inner, init, bn, smoothing and its mode (section 2, sections 4 and 6 of docs/objectives.md)
TABLE = {
    "natural": ("natural", "ce", "", None, "ce", None, None, 0.0, "off"),
    "pgd_at": ("at", "ce", "", None, "ce", "uniform", "eval", 0.0, "off"),
    "pgd_at_apl": ("at", "nce_rce", "", None, "ce", "uniform", "eval", 0.0, "off"),
    "trades": ("trades", "ce", "kl", 6, "kl", "normal", "eval", 0.0, "off"),
    "trades_apl": ("trades", "nce_rce", "kl", 6, "kl", "normal", "eval", 0.0, "off"),
    "nrat": ("trades", "nce_rce", "sym_kl", 6, "kl", "normal", "eval", 0.0, "off"),
    "mart": ("mart", "ce", "", 5, "ce", "normal", "eval", 0.0, "off"),
    "mart_apl": ("mart", "nce_rce", "", 5, "ce", "normal", "eval", 0.0, "off"),
    "dm_at": ("trades", "ce", "kl", 5, "kl", "uniform", "batch", 0.1, "mixed"),
}


@pytest.mark.parametrize("name", TABLE)
def test_preset_is_the_published_one(name):
    """Family, losses, constants and attack defaults of every preset of the page."""
    preset = OBJECTIVES[name]
    family, loss, divergence, lam, inner, init, bn, smoothing, mode = TABLE[name]
    assert (preset.family, preset.loss, preset.divergence, preset.inner) == (family, loss, divergence, inner)
    assert (preset.smoothing, preset.smoothing_mode) == (smoothing, mode)
    assert lam is None or preset.lam == lam
    assert init is None or (preset.init, preset.bn) == (init, bn)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_presets_are_named_after_their_key_and_frozen(name):
    """A preset is an `ObjectiveSpec`; its constructor has checked family, loss, divergence and inner loss."""
    preset = OBJECTIVES[name]
    assert preset.name == name and preset.family in FAMILIES
    assert preset.init in ("normal", "uniform") and preset.bn in ("eval", "batch")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.lam = 1.0


def _outer(name: str, z: np.ndarray, z_adv: np.ndarray, y: np.ndarray) -> list[float]:
    """The outer loss of each image, from the table and the second derivations alone."""
    family, loss, divergence, lam, *_, smoothing, _ = TABLE[name]
    result = []
    for row, row_adv, j in zip(z, z_adv, y, strict=True):
        p, p_adv = _softmax(row), _softmax(row_adv)
        if family == "mart":
            result.append(_mart(row, row_adv, j, lam, margin=loss == "ce"))
            continue
        seen = p_adv if family == "at" else p
        by_label = [BY_HAND[loss](seen, k) for k in range(len(p))]
        value = (1 - smoothing) * by_label[j] + smoothing * float(np.mean(by_label))
        if family == "trades":
            kl = _kl(p, p_adv)
            value += lam * ((kl + _kl(p_adv, p)) / 2 if divergence == "sym_kl" else kl)
        result.append(value)
    return result


@pytest.mark.parametrize("name", TABLE)
@settings(deadline=None, derandomize=True, max_examples=10)
@given(**CASES)
def test_outer_loss_of_every_preset(name, seed, num_classes, scale):
    """`per_sample` by definition, `loss` its mean, or its mean under weights (sum w l / sum w)."""
    z, z_adv, y = _logits(seed, num_classes, scale)
    logits, logits_adv, labels = _tensors(z, z_adv, y)
    objective = build(name)
    losses = objective.per_sample(logits, logits_adv, labels)
    _close(losses, _outer(name, z, z_adv, y))
    _close(objective.loss(logits, logits_adv, labels), losses.mean().item())
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    expected = sum(w * v for w, v in zip(weights.tolist(), losses.tolist(), strict=True)) / 4.5
    _close(objective.loss(logits, logits_adv, labels, weights), expected)


def test_a_family_uses_only_the_logits_it_needs():
    """`at` runs without natural logits and `natural` without adversarial ones."""
    z, z_adv, y = _logits(0, 10, 2.0)
    logits, logits_adv, labels = _tensors(z, z_adv, y)
    assert build("pgd_at").loss(None, logits_adv, labels).isfinite()
    assert build("natural").loss(logits, None, labels).isfinite()
    assert [build(name).attacks for name in ("natural", "pgd_at", "nrat", "mart")] == [False, True, True, True]


@pytest.mark.parametrize("name", ["trades", "nrat", "mart", "dm_at", "nrat_ikl", "score"])
def test_gradients_flow_through_both_logits(name):
    """In the outer loss neither argument of the divergence is detached."""
    z, z_adv, y = _logits(0, 10, 2.0)
    leaves = [tensor.requires_grad_() for tensor in _tensors(z, z_adv)]
    objective, without = build(name), build(name, lam=0.0)
    labels = torch.from_numpy(y)
    regulariser = objective.loss(leaves[0], leaves[1], labels) - without.loss(leaves[0], leaves[1], labels)
    for gradient in torch.autograd.grad(regulariser, leaves):
        assert gradient.abs().max() > 1e-3


def test_mart_refuses_soft_labels():
    """MART's margin and weight name one class, so that a mixture of labels is an error."""
    z, z_adv, _ = _logits(0, 10, 2.0)
    soft = torch.from_numpy(_soft_labels(0, len(z), 10))
    for name in ("mart", "mart_apl"):
        with pytest.raises(UserError, match="hard labels"):
            build(name).loss(*_tensors(z, z_adv), soft)


@pytest.mark.parametrize("name", [name for name, preset in OBJECTIVES.items() if preset.family != "mart"])
def test_soft_labels_train_everything_else(name):
    """One-hot probabilities mean the same as the label, in the outer loss and in the attack."""
    z, z_adv, y = _logits(0, 10, 2.0)
    logits, logits_adv, labels = _tensors(z, z_adv, y)
    one_hot = torch.nn.functional.one_hot(labels, 10).double()
    objective = build(name)
    _close(objective.per_sample(logits, logits_adv, one_hot), objective.per_sample(logits, logits_adv, labels))
    _close(objective.inner(logits, one_hot)(logits_adv), objective.inner(logits, labels)(logits_adv))


def test_smoothing_touches_only_the_classification_loss():
    """Smoothing changes neither lam * D nor the inner loss."""
    z, z_adv, y = _logits(0, 10, 2.0)
    logits, logits_adv, labels = _tensors(z, z_adv, y)
    for name, loss in (("trades", "ce"), ("nrat", "nce_rce")):
        plain, smooth = build(name), build(name, smoothing=0.2)
        change = smooth.per_sample(logits, logits_adv, labels) - plain.per_sample(logits, logits_adv, labels)
        _close(change, LOSSES[loss](logits, labels, 0.2) - LOSSES[loss](logits, labels))
    smoothed = build("pgd_at", smoothing=0.2)
    _close(smoothed.per_sample(None, logits_adv, labels), LOSSES["ce"](logits_adv, labels, 0.2))
    _close(smoothed.inner(None, labels)(logits_adv), LOSSES["ce"](logits_adv, labels))


def test_names_of_inner_losses_are_unambiguous():
    """`objective.inner` is looked up in both tables, so that no name may be in both."""
    assert not set(LOSSES) & set(DIVERGENCES)


@pytest.mark.parametrize("name", [*LOSSES, *DIVERGENCES])
def test_inner_loss_is_the_named_one_and_detaches_natural_logits(name):
    """The attack maximises the named loss or divergence of each image; no gradient reaches the natural logits."""
    z, z_adv, y = _logits(0, 10, 2.0)
    logits, logits_adv = (tensor.requires_grad_() for tensor in _tensors(z, z_adv))
    objective = build("nrat", inner=name)
    inner = objective.inner(logits, torch.from_numpy(y))(logits_adv)
    if name in LOSSES:
        expected = [BY_HAND[name](_softmax(b), j) for b, j in zip(z_adv, y, strict=True)]
    elif name == "ikl":
        expected = DIVERGENCES["ikl"](logits, logits_adv, torch.from_numpy(y)).detach().numpy()
    else:
        by_hand = {
            "kl": _kl,
            "sym_kl": lambda p, q: (_kl(p, q) + _kl(q, p)) / 2,
            "lse": lambda p, q: ((p - q) ** 2).sum(),
        }
        expected = [by_hand[name](_softmax(a), _softmax(b)) for a, b in zip(z, z_adv, strict=True)]
    _close(inner, expected)
    natural, adversarial = torch.autograd.grad(inner.sum(), [logits, logits_adv], allow_unused=True)
    assert natural is None and adversarial.abs().max() > 0
    assert objective.inner_needs_natural == (name in DIVERGENCES)


# ---- additions from outside -----------------------------------------------------------------------------------------


def _total_variation(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    return 0.5 * (logits.softmax(1) - logits_adv.softmax(1)).abs().sum(1)


def _margin(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def test_an_added_divergence_is_an_outer_and_an_inner_loss(monkeypatch):
    """One entry in `DIVERGENCES` is enough for both, also in a recipe."""
    monkeypatch.setitem(DIVERGENCES, "tv", _total_variation)
    monkeypatch.setitem(OBJECTIVES, "tv_at", ObjectiveSpec("tv_at", "trades", "ce", "tv", lam=2.0, inner="tv"))
    z, z_adv, y = _logits(0, 10, 2.0)
    logits, logits_adv, labels = _tensors(z, z_adv, y)
    objective, distance = build("tv_at"), _total_variation(logits, logits_adv)
    _close(objective.inner(logits, labels)(logits_adv), distance)
    _close(objective.per_sample(logits, logits_adv, labels), LOSSES["ce"](logits, labels) + 2 * distance)
    recipe = load_recipe("recipes/quickstart.yaml", ["objective.name=mart", "objective.inner=tv"])
    _close(Objective(recipe.objective).inner(logits, labels)(logits_adv), distance)


def test_an_added_loss_trains(monkeypatch, make_net):
    """One entry in `LOSSES` serves as classification loss and as inner loss: a training step lowers it."""
    monkeypatch.setitem(LOSSES, "margin", _margin)
    monkeypatch.setitem(OBJECTIVES, "margin_at", ObjectiveSpec("margin_at", "at", "margin", inner="margin"))
    objective, net = build("margin_at"), make_net()
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(8) % 5
    x_adv = pgd(net, x, objective.inner(None, y), ThreatSpec(0.1, 0.05, 3, init="zero"))
    assert _margin(net.eval()(x_adv), y).mean() > _margin(net(x), y).mean()
    before = objective.loss(None, net(x_adv), y)
    before.backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    assert objective.loss(None, net(x_adv), y) < before


# ---- what cannot be built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nratt"}, "Did you mean 'nrat'"),
        ({"name": "no such thing"}, "Known: dm_at, "),
        ({"name": "nrat", "inner": "symkl"}, "Did you mean 'sym_kl'"),
        ({"name": "pgd_at", "inner": "kl"}, "use ce"),
        ({"name": "natural", "inner": "lse"}, "use ce"),
        ({"name": "nrat", "smoothing": 1.0}, r"must be in \[0, 1\)"),
        ({"name": "nrat", "smoothing": -0.1}, r"must be in \[0, 1\)"),
        ({"name": "nrat", "smoothing": math.nan}, r"must be in \[0, 1\)"),
        ({"name": "nrat", "smoothing_mode": "plug"}, "Did you mean 'plugin'"),
        ({"name": "nrat", "smoothing": 0.1, "smoothing_mode": "off"}, "Choose mixed or plugin"),
        ({"name": "trades", "smoothing": 0.1, "smoothing_mode": "plugin"}, "use mixed"),
        ({"name": "nrat", "lam": -1.0}, "0 or more"),
        ({"name": "nrat", "lam": math.nan}, "0 or more"),
        ({"name": "nrat", "lam": math.inf}, "0 or more"),
        ({"name": "nrat", "a": -1.0}, "0 or more"),
        ({"name": "nrat", "b": math.nan}, "0 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    """Unknown names and impossible constants raise a sentence that names the way out."""
    with pytest.raises(UserError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "trade", "ce"), "objective.family is 'trade'. Did you mean 'trades'"),
        (("x", "at", "cee"), "objective.loss is 'cee'. Did you mean 'ce'"),
        (("x", "trades", "ce"), "objective.divergence is ''. Known: ikl, kl"),
        (("x", "at", "ce", "kl"), "objective.divergence is 'kl', but the family 'at' has none"),
    ],
)
def test_a_spec_checks_itself(arguments, message):
    """A new preset with a mistyped name fails when it is defined."""
    with pytest.raises(UserError, match=message):
        ObjectiveSpec(*arguments)


def test_constants_default_to_the_preset_and_can_be_replaced():
    """None means the preset's constant, and smoothing without a mode is `mixed`."""
    assert (build("dm_at").spec.lam, build("dm_at").spec.smoothing_mode) == (5.0, "mixed")
    spec = build("nrat", lam=3.0, smoothing=0.1, inner="sym_kl").spec
    assert (spec.lam, spec.smoothing, spec.smoothing_mode, spec.inner) == (3.0, 0.1, "mixed", "sym_kl")
    assert build("nrat", lam=0.0).spec.lam == 0.0
    assert build("nrat").spec.smoothing_mode == "off"


# ---- class means of IKL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trades_ikl", "nrat_ikl"])
def test_class_means_are_buffers_that_update_and_are_used(name):
    """Means are exponential (0.99 per step), are saved, and weigh IKL after every class was seen."""
    z, z_adv, y = _logits(0, 4, 2.0, batch=16)
    y = np.arange(16) % 4
    logits, logits_adv, labels = _tensors(z, z_adv, y)
    objective = build(name, num_classes=4)
    assert set(objective.state_dict()) == {"class_sums", "class_counts"}
    assert not list(objective.parameters())
    # Before any update, the means of this batch, as for an objective without buffers.
    _close(objective.per_sample(logits, logits_adv, labels), build(name).per_sample(logits, logits_adv, labels))
    one_hot = np.eye(4)[y]
    first, second = (np.array([_softmax(row) for row in rows]) for rows in (z, z_adv))
    objective.update(logits, labels)
    objective.update(logits_adv, labels, lambda value: 2 * value)  # as if a second rank had seen the same
    sums = 0.99 * one_hot.T @ first + 2 * one_hot.T @ second
    counts = (0.99 + 2) * one_hot.sum(0)
    np.testing.assert_allclose(objective.class_sums, sums, rtol=1e-5)
    np.testing.assert_allclose(objective.class_counts, counts, rtol=1e-5)
    means = (sums / counts[:, None])[y]
    divergence = [_ikl(a, b, w) for a, b, w in zip(z, z_adv, means, strict=True)]
    difference = objective.per_sample(logits, logits_adv, labels) - build(name, lam=0.0).per_sample(
        logits, logits_adv, labels
    )
    _close(difference, 6 * np.array(divergence), rtol=1e-5)
    restored = build(name, num_classes=4)
    restored.load_state_dict(objective.state_dict())
    _close(restored.loss(logits, logits_adv, labels), objective.loss(logits, logits_adv, labels).item())


def test_ikl_as_inner_loss_uses_the_class_means():
    """The attack's IKL has the same class weights as the outer one, also in an objective with another divergence."""
    z, z_adv, _ = _logits(0, 4, 2.0, batch=16)
    logits, logits_adv, labels = *_tensors(z, z_adv), torch.arange(16) % 4
    outer, inner = build("trades_ikl", num_classes=4), build("trades", inner="ikl", num_classes=4)
    for objective in (outer, inner):
        objective.update(logits_adv, labels)
    plain = build("trades_ikl", lam=0.0).per_sample(logits, logits_adv, labels)
    _close(6 * inner.inner(logits, labels)(logits_adv), outer.per_sample(logits, logits_adv, labels) - plain, rtol=1e-7)


@pytest.mark.parametrize("name", ["nrat", "mart", "pgd_at", "natural"])
def test_other_objectives_keep_no_state(name):
    """Only IKL has class means; other objectives save nothing, and `update` does nothing."""
    z, _, y = _logits(0, 4, 2.0)
    objective = build(name, num_classes=4)
    objective.update(*_tensors(z, y))
    objective.update(None, torch.from_numpy(y))
    assert not objective.state_dict() and not build("nrat_ikl").state_dict()


def test_unseen_classes_keep_the_means_of_the_batch():
    """Until every class has been seen IKL uses the means of the batch, and nothing becomes NaN."""
    z, z_adv, _ = _logits(0, 4, 2.0)
    logits, logits_adv = _tensors(z, z_adv)
    objective = build("nrat_ikl", num_classes=4)
    objective.update(logits, torch.zeros(len(z), dtype=torch.int64))
    objective.update(None, torch.zeros(len(z), dtype=torch.int64))  # a step without natural logits
    labels = torch.tensor([0, 1, 2, 2, 0])
    _close(objective.per_sample(logits, logits_adv, labels), build("nrat_ikl").per_sample(logits, logits_adv, labels))
