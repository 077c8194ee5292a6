"""Objectives: presets, families, inner losses, smoothing and class means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.objectives import DIVERGENCES, LOSSES, OBJECTIVES, build
from tests.support.formulas import (
    BY_HAND,
    CASES,
    REPEATABLE,
    assert_close,
    extreme_logits,
    ikl_by_hand,
    kl_by_hand,
    mart_by_hand,
    nce_by_hand,
    random_logits,
    random_soft_labels,
    rce_by_hand,
    softmax,
    tensors,
)

# ---- weights and smoothing of NCE+RCE ---------------------------------------------------------------------------------


@REPEATABLE
@given(a=st.sampled_from([1.0, 0.5]), b=st.sampled_from([1.0, 10.0]), **CASES)
def test_weights_of_nce_and_rce(a, b, seed, num_classes, scale):
    """a NCE + b RCE (the APL authors use 1, 10 on MNIST), also as inner loss and with smoothing."""
    z, _, y = random_logits(seed, num_classes, scale)
    logits, labels = tensors(z, y)
    parts = [
        np.array([part(softmax(row), j) for row, j in zip(z, y, strict=True)]) for part in (nce_by_hand, rce_by_hand)
    ]
    objective = build("pgd_at_apl", a=a, b=b, inner="nce_rce")
    assert_close(objective.per_sample(None, logits, labels), a * parts[0] + b * parts[1])
    assert_close(objective.inner(None, labels)(logits), a * parts[0] + b * parts[1])
    smoothed = build("pgd_at_apl", a=a, b=b, smoothing=0.3).per_sample(None, logits, labels)
    by_name = [LOSSES[name](logits, labels, 0.3) for name in ("nce", "rce")]
    assert_close(smoothed, a * by_name[0] + b * by_name[1])


@REPEATABLE
@given(a=st.sampled_from([1.0, 0.5]), b=st.sampled_from([1.0, 10.0]), soft=st.booleans(), **CASES)
def test_plugin_smoothing_is_inside_the_logarithm(a, b, soft, seed, num_classes, scale):
    """RCE becomes -sum_k p_k log q_k with q the smoothed label; NCE is smoothed as in `mixed`."""
    s = 0.1
    z, _, y = random_logits(seed, num_classes, scale)
    label = random_soft_labels(seed, len(z), num_classes) if soft else np.eye(num_classes)[y]
    q = (1 - s) * label + s / num_classes
    expected = []
    for row, target in zip(z, q, strict=True):
        p = softmax(row)
        nce = sum(weight * nce_by_hand(p, j) for j, weight in enumerate(target))
        expected.append(a * nce - b * float((np.clip(p, 1e-7, 1) * np.log(target)).sum()))
    objective = build("pgd_at_apl", smoothing=s, smoothing_mode="plugin", a=a, b=b)
    assert_close(objective.per_sample(None, torch.from_numpy(z), torch.from_numpy(label if soft else y)), expected)


def test_plugin_slope():
    """At s = 0.1 and K = 10 plugin RCE falls by 4.511 per unit of p_y, mixed RCE by 0.9 * 9.21."""
    z, _, _ = random_logits(3, 10, 1.0, batch=1)
    p, (logits,) = softmax(z[0]), tensors(z)

    def rce(mode: str, label: int) -> float:
        objective = build("pgd_at_apl", smoothing=0.1, smoothing_mode=mode, a=0.0)
        return objective.per_sample(None, logits, torch.tensor([label])).item()

    for mode, slope in (("plugin", 4.511), ("mixed", 0.9 * 9.2103)):
        assert (rce(mode, 0) - rce(mode, 1)) / (p[1] - p[0]) == pytest.approx(slope, abs=1e-3)


# ---- range and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_stay_finite_for_extreme_logits(name):
    """The same for the outer loss (and so for every divergence) and for the inner loss."""
    z, z_adv, y = extreme_logits()
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
        assert objective.class_sums.dtype == torch.float64
        torch.testing.assert_close(objective.class_sums, one_hot.T @ (z.double() / 4).softmax(1), rtol=0, atol=1e-5)
    for low, high in ((losses, exact), (inner, exact_inner)):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=2e-4, atol=2e-5)


# ---- presets --------------------------------------------------------------------------------------------------------


# name: family, C, D, lam, inner, init, bn, smoothing and its mode (docs/objectives.md)
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
    "trades_gce": ("trades", "gce", "kl", 6, "kl", "normal", "eval", 0.0, "off"),
    "trades_sce": ("trades", "sce", "kl", 6, "kl", "normal", "eval", 0.0, "off"),
    "trades_nfl_rce": ("trades", "nfl_rce", "kl", 6, "kl", "normal", "eval", 0.0, "off"),
    "trades_agce": ("trades", "agce", "kl", 6, "kl", "normal", "eval", 0.0, "off"),
    **dict.fromkeys(("adr", "te", "sglr", "noilin"), ("at", "ce", "", None, "ce", "uniform", "eval", 0.0, "off")),
    **dict.fromkeys(
        ("trades_adr", "trades_te", "trades_noilin"), ("trades", "ce", "kl", 6, "kl", "normal", "eval", 0.0, "off")
    ),
    "score": ("trades", "lse", "lse", 4, "lse", "uniform", "batch", 0.1, "mixed"),
    "trades_ikl": ("trades", "ce", "ikl", 1, "kl", "normal", "eval", 0.0, "off"),
    "nrat_ikl": ("trades", "nce_rce", "ikl", 1, "kl", "normal", "eval", 0.0, "off"),
}


@pytest.mark.parametrize("name", TABLE)
def test_preset_is_the_published_one(name):
    """Family, losses, constants and attack defaults of every preset of the page."""
    assert set(TABLE) == set(OBJECTIVES)
    preset = OBJECTIVES[name]
    family, loss, divergence, lam, inner, init, bn, smoothing, mode = TABLE[name]
    assert (preset.family, preset.loss, preset.divergence, preset.inner) == (family, loss, divergence, inner)
    assert (preset.smoothing, preset.smoothing_mode) == (smoothing, mode)
    assert lam is None or preset.lam == lam
    assert init is None or (preset.init, preset.bn) == (init, bn)


def _divergence_by_hand(name: str, z: np.ndarray, z_adv: np.ndarray) -> float:
    """D of one image; IKL with the presets' weights and the class means of the first epoch."""
    p, p_adv = softmax(z), softmax(z_adv)
    if name == "ikl":
        return ikl_by_hand(z, z_adv, np.full(len(p), 1 / len(p)), alpha=4.0, beta=20.0)
    by_hand = {
        "kl": kl_by_hand(p, p_adv),
        "sym_kl": (kl_by_hand(p, p_adv) + kl_by_hand(p_adv, p)) / 2,
        "lse": ((p - p_adv) ** 2).sum(),
    }
    return by_hand[name]


def _outer(name: str, z: np.ndarray, z_adv: np.ndarray, y: np.ndarray) -> list[float]:
    """The outer loss of each image, from the table and the second derivations alone."""
    family, loss, divergence, lam, *_, smoothing, _ = TABLE[name]
    result = []
    for row, row_adv, j in zip(z, z_adv, y, strict=True):
        p, p_adv = softmax(row), softmax(row_adv)
        if family == "mart":
            result.append(mart_by_hand(row, row_adv, j, lam, margin=loss == "ce"))
            continue
        seen = p_adv if family == "at" else p
        by_label = [BY_HAND[loss](seen, k) for k in range(len(p))]
        value = (1 - smoothing) * by_label[j] + smoothing * float(np.mean(by_label))
        if loss == "lse":
            value = float(((p - (1 - smoothing) * np.eye(len(p))[j] - smoothing / len(p)) ** 2).sum())
        if family == "trades":
            value += lam * _divergence_by_hand(divergence, row, row_adv)
        result.append(value)
    return result


@pytest.mark.parametrize("name", TABLE)
@settings(deadline=None, derandomize=True, max_examples=10)
@given(**CASES)
def test_outer_loss_of_every_preset(name, seed, num_classes, scale):
    """`per_sample` by definition, and `loss` as its mean."""
    z, z_adv, y = random_logits(seed, num_classes, scale)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    objective = build(name)
    losses = objective.per_sample(logits, logits_adv, labels)
    assert_close(losses, _outer(name, z, z_adv, y))
    assert_close(objective.loss(logits, logits_adv, labels), losses.mean().item())


def test_a_family_uses_only_the_logits_it_needs():
    """`at` runs without natural logits and `natural` without adversarial ones."""
    z, z_adv, y = random_logits(0, 10, 2.0)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    assert build("pgd_at").loss(None, logits_adv, labels).isfinite()
    assert build("natural").loss(logits, None, labels).isfinite()
    assert [build(name).attacks for name in ("natural", "pgd_at", "nrat", "mart")] == [False, True, True, True]


@pytest.mark.parametrize("name", ["trades", "nrat", "mart", "dm_at", "nrat_ikl", "score"])
def test_gradients_flow_through_both_logits(name):
    """In the outer loss neither argument of the divergence is detached."""
    z, z_adv, y = random_logits(0, 10, 2.0)
    leaves = [tensor.requires_grad_() for tensor in tensors(z, z_adv)]
    none = {"ikl_alpha": 0.0, "ikl_beta": 0.0} if name == "nrat_ikl" else {"lam": 0.0}
    objective, without = build(name), build(name, **none)
    labels = torch.from_numpy(y)
    regulariser = objective.loss(leaves[0], leaves[1], labels) - without.loss(leaves[0], leaves[1], labels)
    for gradient in torch.autograd.grad(regulariser, leaves):
        assert gradient.abs().max() > 1e-3


def test_mart_refuses_soft_labels():
    """MART's margin and weight name one class, so that a mixture of labels is an error."""
    z, z_adv, _ = random_logits(0, 10, 2.0)
    soft = torch.from_numpy(random_soft_labels(0, len(z), 10))
    for name in ("mart", "mart_apl"):
        with pytest.raises(UserError, match="hard labels"):
            build(name).loss(*tensors(z, z_adv), soft)


@pytest.mark.parametrize("name", [name for name, preset in OBJECTIVES.items() if preset.family != "mart"])
def test_soft_labels_train_everything_else(name):
    """One-hot probabilities mean the same as the label without smoothing; the attack of KL or LSE is then on the label."""
    z, z_adv, y = random_logits(0, 10, 2.0)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    one_hot = torch.nn.functional.one_hot(labels, 10).double()
    objective, hard = build(name), build(name, smoothing=0.0)
    assert_close(objective.per_sample(logits, logits_adv, one_hot), hard.per_sample(logits, logits_adv, labels))
    on_label = {"kl": "ce", "lse": "lse"}.get(objective.spec.inner, objective.spec.inner)
    assert_close(objective.inner(logits, one_hot)(logits_adv), LOSSES[on_label](logits_adv, labels))


def test_smoothing_touches_only_the_classification_loss():
    """Smoothing changes neither lam * D nor the inner loss."""
    z, z_adv, y = random_logits(0, 10, 2.0)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    for name, loss in (("trades", "ce"), ("nrat", "nce_rce")):
        plain, smooth = build(name), build(name, smoothing=0.2)
        change = smooth.per_sample(logits, logits_adv, labels) - plain.per_sample(logits, logits_adv, labels)
        assert_close(change, LOSSES[loss](logits, labels, 0.2) - LOSSES[loss](logits, labels))
    smoothed = build("pgd_at", smoothing=0.2)
    assert_close(smoothed.per_sample(None, logits_adv, labels), LOSSES["ce"](logits_adv, labels, 0.2))
    assert_close(smoothed.inner(None, labels)(logits_adv), LOSSES["ce"](logits_adv, labels))


def test_names_of_inner_losses_are_unambiguous():
    """`objective.inner` is looked up in both tables: `lse`, the only name in both, is the divergence there."""
    assert set(LOSSES) & set(DIVERGENCES) == {"lse"}


@pytest.mark.parametrize("name", sorted({*LOSSES, *DIVERGENCES}))
def test_inner_loss_is_the_named_one_and_detaches_natural_logits(name):
    """The attack maximises the named loss or divergence of each image; no gradient reaches the natural logits."""
    z, z_adv, y = random_logits(0, 10, 2.0)
    logits, logits_adv = (tensor.requires_grad_() for tensor in tensors(z, z_adv))
    objective = build("nrat", inner=name)
    inner = objective.inner(logits, torch.from_numpy(y))(logits_adv)
    if name in DIVERGENCES:
        expected = [_divergence_by_hand(name, a, b) for a, b in zip(z, z_adv, strict=True)]
    else:
        expected = [BY_HAND[name](softmax(b), j) for b, j in zip(z_adv, y, strict=True)]
    assert_close(inner, expected)
    natural, adversarial = torch.autograd.grad(inner.sum(), [logits, logits_adv], allow_unused=True)
    assert natural is None and adversarial.abs().max() > 0
    assert objective.inner_needs_natural == (name in DIVERGENCES)


# ---- class means of IKL ---------------------------------------------------------------------------------------------


def test_ikl_as_inner_loss_uses_the_class_means():
    """The attack's IKL is the outer one, class weights included, also in an objective with another divergence."""
    z, z_adv, _ = random_logits(0, 4, 2.0, batch=16)
    logits, logits_adv, labels = *tensors(z, z_adv), torch.arange(16) % 4
    outer, inner = build("trades_ikl", num_classes=4), build("trades", inner="ikl", num_classes=4)
    for objective in (outer, inner):
        objective.update(logits_adv, labels)
        objective.begin_step([labels], new_epoch=True)
    plain = LOSSES["ce"](logits, labels)
    assert_close(inner.inner(logits, labels)(logits_adv), outer.per_sample(logits, logits_adv, labels) - plain)


@pytest.mark.parametrize("name", ["nrat", "mart", "pgd_at", "natural"])
def test_other_objectives_keep_no_state(name):
    """Only IKL has class means; other objectives save nothing, and `update` does nothing."""
    z, _, y = random_logits(0, 4, 2.0)
    objective = build(name, num_classes=4)
    objective.update(*tensors(z, y))
    objective.update(None, torch.from_numpy(y))
    assert not objective.state_dict() and not build("nrat_ikl").state_dict()


def test_a_class_without_images_keeps_its_mean():
    """An epoch without an image of a class leaves that class's mean as it was, and nothing becomes NaN."""
    z, z_adv, _ = random_logits(0, 4, 2.0)
    logits, logits_adv = tensors(z, z_adv)
    objective = build("nrat_ikl", num_classes=4)
    objective.update(logits, torch.zeros(len(z), dtype=torch.int64))
    objective.update(None, torch.zeros(len(z), dtype=torch.int64))  # a step without natural logits
    labels = torch.tensor([0, 1, 2, 2, 0])
    objective.begin_step([labels], new_epoch=True)
    assert_close(objective.class_means[0], (logits / 4).softmax(1).mean(0))
    assert torch.equal(objective.class_means[1:], torch.full((3, 4), 0.25).double())
    assert objective.per_sample(logits, logits_adv, labels).isfinite().all()
