"""Classification losses C and divergences D, each formula once. To add one, add an entry to `LOSSES` or `DIVERGENCES`.

Losses are computed in float32, or in float64 if the logits are, under any autocast type: in bf16, MART's 1.0001 would
round to 1 and its logarithm diverge.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]


def upcast(logits: Tensor) -> Tensor:
    """`logits` in float32; float64 stays float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


# The terms of classification losses are matrices [B, K]: entry (i, j) is the loss of logits i under label j.


def _ce(logits: Tensor) -> Tensor:
    """Cross-entropy: -log p_j."""
    return -logits.log_softmax(1)


def _nce(logits: Tensor) -> Tensor:
    """Normalised cross-entropy (Ma et al. 2020, eq. 8): -log p_j / sum_k(-log p_k)."""
    ce = _ce(logits)
    return ce / ce.sum(1, keepdim=True)


def _rce(logits: Tensor) -> Tensor:
    """Reverse cross-entropy (Wang et al. 2019): -sum_k p_k log(clamp(onehot_k, 1e-4, 1)), p clamped to [1e-7, 1]."""
    p = logits.softmax(1).clamp(1e-7, 1.0)
    return -math.log(1e-4) * (p.sum(1, keepdim=True) - p)


def _gce(logits: Tensor, q: float = 0.7) -> Tensor:
    """Generalised cross-entropy (Zhang and Sabuncu 2018): (1 - p_j^q) / q."""
    return (1 - (q * logits.log_softmax(1)).exp()) / q


def _mae(logits: Tensor) -> Tensor:
    """Mean absolute error (Ghosh et al. 2017): |onehot - p|_1 = 2 (1 - p_j); the APL authors' code has half of it, 1 - p_j."""
    return 2 * (1 - logits.softmax(1))


def _nfl(logits: Tensor, gamma: float = 0.5) -> Tensor:
    """Normalised focal loss (Ma et al. 2020): -(1 - p_j)^gamma log p_j over its sum over labels.

    As in the authors' code no gradient flows through the powers, neither in the numerator nor in the sum.
    """
    log_p = logits.log_softmax(1)
    focal = -((1 - log_p.detach().exp()) ** gamma) * log_p
    return focal / focal.sum(1, keepdim=True)


def _agce(logits: Tensor, a: float = 0.6, q: float = 0.6) -> Tensor:
    """Asymmetric generalised cross-entropy (Zhou et al. 2021): ((a + 1)^q - (a + p_j)^q) / q, CIFAR-10 constants."""
    return ((a + 1) ** q - (a + logits.softmax(1)) ** q) / q


def _select(matrix: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """[B] from [B, K]: the entry of each label; sum_j q_j L(z, j) for a soft or smoothed label q."""
    chosen = (matrix * y.to(matrix.dtype)).sum(1) if y.ndim == 2 else matrix.gather(1, y[:, None]).squeeze(1)
    return chosen if smoothing == 0.0 else (1 - smoothing) * chosen + smoothing * matrix.mean(1)


def _weighted(*terms: tuple[float, Callable[[Tensor], Tensor]]) -> Loss:
    """The loss that is a weighted sum of label matrices.

    It maps logits [B, K] and labels y (int64 [B], or probabilities [B, K]) to [B]. With `smoothing` s the label becomes
    (1 - s) onehot + s / K, and the losses of the labels are mixed.
    """

    def loss(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = upcast(logits)
        matrix = sum(weight * term(logits) for weight, term in terms)
        assert isinstance(matrix, Tensor)
        return _select(matrix, y, smoothing)

    return loss


def label_probabilities(y: Tensor, like: Tensor) -> Tensor:
    """Labels as probabilities [B, K], with the shape and dtype of `like`."""
    return (y if y.ndim == 2 else nn.functional.one_hot(y, like.shape[1])).to(like.dtype)


def _smoothed(y: Tensor, like: Tensor, smoothing: float) -> Tensor:
    """The smoothed label q = (1 - s) y + s / K, [B, K]."""
    return (1 - smoothing) * label_probabilities(y, like) + smoothing / like.shape[1]


def _squared_error(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """SCORE's natural term (Pang et al. 2022): sum_k (p_k - q_k)^2 with the smoothed label q inside the square."""
    logits = upcast(logits)
    return (logits.softmax(1) - _smoothed(y, logits, smoothing)).square().sum(1)


# name -> f(logits [B, K], y, smoothing = 0) -> [B]
LOSSES: dict[str, Loss] = {
    "ce": _weighted((1.0, _ce)),
    "nce": _weighted((1.0, _nce)),
    "rce": _weighted((1.0, _rce)),
    "nce_rce": _weighted((1.0, _nce), (1.0, _rce)),
    "gce": _weighted((1.0, _gce)),
    "sce": _weighted((0.1, _ce), (1.0, _rce)),
    "nfl_rce": _weighted((1.0, _nfl), (1.0, _rce)),
    "mae": _weighted((1.0, _mae)),
    "agce": _weighted((1.0, _agce)),
    "nce_agce": _weighted((1.0, _nce), (4.0, partial(_agce, a=6.0, q=1.5))),  # CIFAR-10 constants, as those of agce
    "lse": _squared_error,
}


def plugin_smoothed(logits: Tensor, y: Tensor, smoothing: float, a: float, b: float) -> Tensor:
    """a NCE + b RCE with the smoothed label *inside* RCE's logarithm: -sum_k p_k log q_k, q = (1 - s) onehot + s / K.

    NCE is linear in the label, so its smoothed value is the mixture. The slope of RCE between the label and another
    class is log(q_y / q_k): 4.511 at s = 0.1 and K = 10, instead of 9.21.
    """
    logits = upcast(logits)
    q = _smoothed(y, logits, smoothing)
    p = logits.softmax(1).clamp(1e-7, 1.0)
    rce = -(p * q.clamp(1e-4, 1.0).log()).sum(1)
    return a * _select(_nce(logits), y, smoothing) + b * rce


def _kl(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    """KL(p || p') = sum_k p_k (log p_k - log p'_k)."""
    log_p, log_p_adv = upcast(logits).log_softmax(1), upcast(logits_adv).log_softmax(1)
    return (log_p.exp() * (log_p - log_p_adv)).sum(1)


def _sym_kl(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    """(KL(p || p') + KL(p' || p)) / 2, NRAT eq. 16."""
    log_p, log_p_adv = upcast(logits).log_softmax(1), upcast(logits_adv).log_softmax(1)
    return 0.5 * ((log_p.exp() - log_p_adv.exp()) * (log_p - log_p_adv)).sum(1)


def _lse(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared error of probabilities, sum_k (p_k - p'_k)^2 (SCORE, Pang et al. 2022)."""
    return (upcast(logits).softmax(1) - upcast(logits_adv).softmax(1)).square().sum(1)


def ikl(
    logits: Tensor,
    logits_adv: Tensor,
    y: Tensor | None = None,
    class_means: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    mass: Tensor | None = None,
) -> Tensor:
    """Improved KL [B] (Cui et al., NeurIPS 2024), alpha * soft cross-entropy + beta * weighted MSE.

    alpha * -sum_k sg(p_k) log p'_k + beta / 4 * sum_jk w_j w_k ((z_j - z_k) - (z'_j - z'_k))^2; gradients reach both logits
    through the second term. w is the mean prediction of the image's class.

    Args:
        y: labels; without them w is the image's own p.
        class_means: [K, K], mean predictions by label; by default those of this batch.
        gamma: GKL's power (Cui et al., TPAMI 2026; `ikl_weights`); 0 leaves w as it is.
        mass: with `gamma`, what the MSE is divided by: the mean of (sum_k w_k)^2, by default over this batch, as in the
            authors' code.
    """
    logits, logits_adv = upcast(logits), upcast(logits_adv)
    weight = p = logits.detach().softmax(1)
    if y is not None:
        weight = ikl_weights(y, mean_predictions(*label_sums(p, y)) if class_means is None else class_means, gamma)
    elif gamma:
        weight = weight**gamma
    weight = weight.to(p.dtype)
    difference = logits - logits_adv
    # sum_jk w_j w_k (d_j - d_k)^2 = 2 sum_j w_j * sum_j w_j (d_j - mean of d under w)^2: no cancellation in float32.
    total = weight.sum(1, keepdim=True)
    centred = difference - (weight * difference).sum(1, keepdim=True) / total
    spread = 2 * total.squeeze(1) * (weight * centred.square()).sum(1)
    if gamma:
        spread = spread / (total.square().mean() if mass is None else mass.to(p.dtype))
    return beta * 0.25 * spread - alpha * (p * logits_adv.log_softmax(1)).sum(1)


def ikl_weights(y: Tensor, class_means: Tensor, gamma: float = 0.0) -> Tensor:
    """The weights w [B, K] of IKL: the class means of the labels `y`, to the power `gamma` unless it is 0."""
    with torch.autocast(y.device.type, enabled=False):
        weight = y.to(class_means.dtype) @ class_means if y.ndim == 2 else class_means[y]
    return weight**gamma if gamma else weight


def label_sums(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each label, the sum [K, K] of the predictions p [B, K] of its images, and their number [K]."""
    label = label_probabilities(y, p)
    with torch.autocast(p.device.type, enabled=False):
        return label.T @ p, label.sum(0)


def mean_predictions(sums: Tensor, counts: Tensor) -> Tensor:
    """[K, K] by label, from `label_sums`; the row of a label without images is zero."""
    # Not clamp_min(1): with soft labels a class may count less than 1.
    return sums / counts[:, None].clamp_min(torch.finfo(sums.dtype).tiny)


def mart_margin(logits_adv: Tensor, y: Tensor) -> Tensor:
    """-log(1.0001 - p'_j + 1e-12), j the most probable class other than y: second half of MART's BCE (Wang et al. 2020)."""
    p_adv = logits_adv.softmax(1)
    others = p_adv.scatter(1, y[:, None], -1.0)
    return -(1.0001 - others.amax(1) + 1e-12).log()


def mart_regulariser(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """KL(p || p') * (1.0000001 - p_y), with log(p' + 1e-12) inside the KL."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    kl = (p * (log_p - (logits_adv.softmax(1) + 1e-12).log())).sum(1)
    return kl * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


# name -> f(natural logits [B, K], adversarial logits [B, K], y) -> [B]; also the attack's objective (`objective.inner`)
DIVERGENCES: dict[str, Loss] = {"kl": _kl, "sym_kl": _sym_kl, "lse": _lse, "ikl": ikl}
PUBLISHED = frozenset({*LOSSES, *DIVERGENCES})  # the entries above, without those that users add
