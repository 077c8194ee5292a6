"""Classification losses and divergences, each formula once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# ---- classification losses: a matrix [B, K] whose entry (i, j) is the loss of logits i under label j ----------------

_LOG_ZERO = math.log(1e-4)  # RCE clamps the one-hot label at 1e-4 before its logarithm (Wang et al. 2019)


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
    return -_LOG_ZERO * (p.sum(1, keepdim=True) - p)


def _gce(logits: Tensor, q: float = 0.7) -> Tensor:
    """Generalised cross-entropy (Zhang and Sabuncu 2018): (1 - p_j^q) / q."""
    return (1 - (q * logits.log_softmax(1)).exp()) / q


def _mae(logits: Tensor) -> Tensor:
    """Mean absolute error (Ghosh et al. 2017): |onehot - p|_1 = 2 (1 - p_j)."""
    return 2 * (1 - logits.softmax(1))


def _nfl(logits: Tensor, gamma: float = 0.5) -> Tensor:
    """Normalised focal loss (Ma et al. 2020): -(1 - p_j)^gamma log p_j over its sum over labels."""
    log_p = logits.log_softmax(1)
    # The floor keeps the power's gradient finite where p_j rounds to 1; the logarithm is 0 there.
    focal = -((1 - log_p.exp()).clamp_min(torch.finfo(logits.dtype).tiny) ** gamma) * log_p
    return focal / focal.sum(1, keepdim=True)


def _agce(logits: Tensor, a: float = 0.6, q: float = 0.6) -> Tensor:
    """Asymmetric generalised cross-entropy (Zhou et al. 2021): ((a + 1)^q - (a + p_j)^q) / q, CIFAR-10 constants."""
    return ((a + 1) ** q - (a + logits.softmax(1)) ** q) / q


# name -> [(weight, label matrix)]: sums such as NCE+RCE are sums of terms.
_TERMS: dict[str, list[tuple[float, Callable[[Tensor], Tensor]]]] = {
    "ce": [(1.0, _ce)],
    "nce": [(1.0, _nce)],
    "rce": [(1.0, _rce)],
    "nce_rce": [(1.0, _nce), (1.0, _rce)],
    "gce": [(1.0, _gce)],
    "sce": [(0.1, _ce), (1.0, _rce)],
    "nfl_rce": [(1.0, _nfl), (1.0, _rce)],
    "mae": [(1.0, _mae)],
    "agce": [(1.0, _agce)],
}

Loss = Callable[..., Tensor]


def upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _select(matrix: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """[B] from [B, K]: the entry of each label, or the mixture that a soft label q means: sum_j q_j L(z, j)."""
    soft = y.ndim == 2
    chosen = (matrix * y.to(matrix.dtype)).sum(1) if soft else matrix.gather(1, y[:, None]).squeeze(1)
    return chosen if smoothing == 0.0 else (1 - smoothing) * chosen + smoothing * matrix.mean(1)


def _loss(name: str) -> Loss:
    def loss(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = upcast(logits)
        matrix = sum(weight * term(logits) for weight, term in _TERMS[name])
        assert isinstance(matrix, Tensor)
        return _select(matrix, y, smoothing)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"""`{name}` of logits [B, K] and labels y (int64 [B], or probabilities [B, K]): [B].

        With `smoothing` s the label becomes (1 - s) onehot + s / K, and the losses of the labels are mixed."""
    return loss


LOSSES: dict[str, Loss] = {name: _loss(name) for name in _TERMS}


def plugin_smoothed(logits: Tensor, y: Tensor, smoothing: float, a: float, b: float) -> Tensor:
    """NCE+RCE with the smoothed label *inside* RCE's logarithm: -sum_k p_k log q_k, q = (1 - s) onehot + s / K.

    NCE is linear in the label, so its part equals the mixture. Between label and others RCE's slope is log(q_y / q_k),
    4.511 at s = 0.1 and K = 10 instead of 9.21.
    """
    logits = upcast(logits)
    num_classes = logits.shape[1]
    label = y.to(logits.dtype) if y.ndim == 2 else nn.functional.one_hot(y, num_classes).to(logits.dtype)
    q = (1 - smoothing) * label + smoothing / num_classes
    p = logits.softmax(1).clamp(1e-7, 1.0)
    rce = -(p * q.clamp(1e-4, 1.0).log()).sum(1)
    return a * _select(_nce(logits), y, smoothing) + b * rce


# ---- divergences between natural and adversarial predictions: [B] --------------------------------------------------


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


def ikl(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None, class_means: Tensor | None = None) -> Tensor:
    """Improved KL (Cui et al., NeurIPS 2024), alpha = beta = 1.

    1/4 sum_jk w_j w_k ((z_j - z_k) - (z'_j - z'_k))^2 - sum_k sg(p_k) log p'_k, where w is the mean prediction of the
    image's class (`class_means` [K, K] by label; of this batch where not given; the image's own p without labels), and
    gradients reach both logits through the first term.
    """
    logits, logits_adv = upcast(logits), upcast(logits_adv)
    p = logits.detach().softmax(1)
    if y is None:
        weight = p
    else:
        if class_means is None:
            class_means = mean_predictions(*label_sums(p, y))
        means = class_means.to(p.dtype)
        weight = (y.to(p.dtype)[:, :, None] * means).sum(1) if y.ndim == 2 else means[y]
    difference = logits - logits_adv
    # sum_jk w_j w_k (d_j - d_k)^2 = 2 sum_j w_j * sum_j w_j (d_j - mean of d under w)^2: nothing cancels.
    total = weight.sum(1, keepdim=True)
    centred = difference - (weight * difference).sum(1, keepdim=True) / total
    spread = 2 * total.squeeze(1) * (weight * centred.square()).sum(1)
    return 0.25 * spread - (p * logits_adv.log_softmax(1)).sum(1)


def label_sums(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [K, K] and counts [K] of the predictions p [B, K] of the images of each label."""
    label = y.to(p.dtype) if y.ndim == 2 else nn.functional.one_hot(y, p.shape[1]).to(p.dtype)
    with torch.autocast(p.device.type, enabled=False):
        return label.T @ p, label.sum(0)


def mean_predictions(sums: Tensor, counts: Tensor) -> Tensor:
    # Under soft labels a class may have less than one image; a row without any stays zero and is not used.
    return sums / counts[:, None].clamp_min(torch.finfo(sums.dtype).tiny)


Divergence = Callable[..., Tensor]
DIVERGENCES: dict[str, Divergence] = {"kl": _kl, "sym_kl": _sym_kl, "lse": _lse, "ikl": ikl}
