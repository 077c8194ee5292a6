"""What is trained: classification losses, divergences, and the families that combine them. Each formula stands once.

    family   inner (the attack maximises)   outer (training minimises)
    natural  -                              C(z, y)
    at       C(z', y)                       C(z', y)
    trades   D(p, p'), p detached           C(z, y) + lam * D(p, p')
    mart     CE(z', y)                      C'(z', y) + lam * KL(p, p') (1 - p_y)

z, z' are natural and adversarial logits [B, K], p and p' their softmax. `OBJECTIVES` names the published combinations.
Everything is computed in at least float32 whatever the autocast type: in bf16 MART's 1.0001 rounds to 1 and its
logarithm explodes. docs/objectives.md has the mathematics and the sources.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrat_scale.errors import UserError, did_you_mean

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


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _select(matrix: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """[B] from [B, K]: the entry of each label, or the mixture that a soft label q means: sum_j q_j L(z, j)."""
    soft = y.ndim == 2
    chosen = (matrix * y.to(matrix.dtype)).sum(1) if soft else matrix.gather(1, y[:, None]).squeeze(1)
    return chosen if smoothing == 0.0 else (1 - smoothing) * chosen + smoothing * matrix.mean(1)


def _loss(name: str) -> Loss:
    def loss(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = _upcast(logits)
        matrix = sum(weight * term(logits) for weight, term in _TERMS[name])
        assert isinstance(matrix, Tensor)
        return _select(matrix, y, smoothing)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"""`{name}` of logits [B, K] and labels y (int64 [B], or probabilities [B, K]): [B].

        With `smoothing` s the label becomes (1 - s) onehot + s / K, and the losses of the labels are mixed."""
    return loss


LOSSES: dict[str, Loss] = {name: _loss(name) for name in _TERMS}


def _plugin_smoothed(logits: Tensor, y: Tensor, smoothing: float, a: float, b: float) -> Tensor:
    """NCE+RCE with the smoothed label *inside* RCE's logarithm: -sum_k p_k log q_k, q = (1 - s) onehot + s / K.

    NCE is linear in the label, so its part equals the mixture. Between label and others RCE's slope is log(q_y / q_k),
    4.511 at s = 0.1 and K = 10 instead of 9.21.
    """
    logits = _upcast(logits)
    num_classes = logits.shape[1]
    label = y.to(logits.dtype) if y.ndim == 2 else nn.functional.one_hot(y, num_classes).to(logits.dtype)
    q = (1 - smoothing) * label + smoothing / num_classes
    p = logits.softmax(1).clamp(1e-7, 1.0)
    rce = -(p * q.clamp(1e-4, 1.0).log()).sum(1)
    return a * _select(_nce(logits), y, smoothing) + b * rce


# ---- divergences between natural and adversarial predictions: [B] --------------------------------------------------


def _kl(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    """KL(p || p') = sum_k p_k (log p_k - log p'_k)."""
    log_p, log_p_adv = _upcast(logits).log_softmax(1), _upcast(logits_adv).log_softmax(1)
    return (log_p.exp() * (log_p - log_p_adv)).sum(1)


def _sym_kl(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    """(KL(p || p') + KL(p' || p)) / 2, NRAT eq. 16."""
    log_p, log_p_adv = _upcast(logits).log_softmax(1), _upcast(logits_adv).log_softmax(1)
    return 0.5 * ((log_p.exp() - log_p_adv.exp()) * (log_p - log_p_adv)).sum(1)


def _lse(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared error of probabilities, sum_k (p_k - p'_k)^2 (SCORE, Pang et al. 2022)."""
    return (_upcast(logits).softmax(1) - _upcast(logits_adv).softmax(1)).square().sum(1)


def _ikl(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None, class_means: Tensor | None = None) -> Tensor:
    """Improved KL (Cui et al., NeurIPS 2024), alpha = beta = 1.

    1/4 sum_jk w_j w_k ((z_j - z_k) - (z'_j - z'_k))^2 - sum_k sg(p_k) log p'_k, where w is the mean prediction of the
    image's class (`class_means` [K, K] by label; of this batch where not given; the image's own p without labels), and
    gradients reach both logits through the first term.
    """
    logits, logits_adv = _upcast(logits), _upcast(logits_adv)
    p = logits.detach().softmax(1)
    if y is None:
        weight = p
    else:
        if class_means is None:
            class_means = _means(*label_sums(p, y))
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


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    # Under soft labels a class may have less than one image; a row without any stays zero and is not used.
    return sums / counts[:, None].clamp_min(torch.finfo(sums.dtype).tiny)


Divergence = Callable[..., Tensor]
DIVERGENCES: dict[str, Divergence] = {"kl": _kl, "sym_kl": _sym_kl, "lse": _lse, "ikl": _ikl}

# ---- MART (Wang et al. 2020) ----------------------------------------------------------------------------------------


def _mart_margin(logits_adv: Tensor, y: Tensor) -> Tensor:
    """-log(1.0001 - p'_j + 1e-12), j the most probable class other than y: the second half of MART's BCE."""
    p_adv = logits_adv.softmax(1)
    others = p_adv.scatter(1, y[:, None], -1.0)
    return -(1.0001 - others.amax(1) + 1e-12).log()


def _mart_regulariser(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """KL(p || p') * (1.0000001 - p_y), with log(p' + 1e-12) inside the KL."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    kl = (p * (log_p - (logits_adv.softmax(1) + 1e-12).log())).sum(1)
    return kl * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


# ---- presets --------------------------------------------------------------------------------------------------------

FAMILIES = ("natural", "at", "trades", "mart")
INNERS = ("ce", "kl", "sym_kl", "nce_rce")
SMOOTHING_MODES = ("off", "mixed", "plugin")


@dataclass(frozen=True)
class Preset:
    """One published objective as plain data. `init` and `bn` belong to its attack; recipe keys override every field
    but family, loss and divergence."""

    family: str
    loss: str
    divergence: str = ""
    lam: float = 0.0
    inner: str = "ce"
    smoothing: float = 0.0
    smoothing_mode: str = "off"
    init: str = "normal"
    bn: str = "eval"


OBJECTIVES: dict[str, Preset] = {
    "natural": Preset("natural", "ce"),
    "pgd_at": Preset("at", "ce", init="uniform"),
    "pgd_at_apl": Preset("at", "nce_rce", init="uniform"),
    "trades": Preset("trades", "ce", "kl", 6.0, "kl"),
    "trades_apl": Preset("trades", "nce_rce", "kl", 6.0, "kl"),
    "nrat": Preset("trades", "nce_rce", "sym_kl", 6.0, "kl"),
    "mart": Preset("mart", "ce", lam=5.0),
    "mart_apl": Preset("mart", "nce_rce", lam=5.0),
    "dm_at": Preset("trades", "ce", "kl", 5.0, "kl", 0.1, "mixed", "uniform", "batch"),
    "trades_gce": Preset("trades", "gce", "kl", 6.0, "kl"),
    "trades_sce": Preset("trades", "sce", "kl", 6.0, "kl"),
    "trades_ikl": Preset("trades", "ce", "ikl", 6.0, "kl"),
    "nrat_ikl": Preset("trades", "nce_rce", "ikl", 6.0, "kl"),
    "score": Preset("trades", "ce", "lse", 4.0, "kl"),
}


@dataclass(frozen=True)
class ObjectiveSpec:
    """Which objective, and its constants (defaults come from the preset called `name`).

    Attributes:
        name: key of `OBJECTIVES`.
        lam: weight of the divergence.
        inner: what the attack maximises, one of `INNERS`.
        smoothing: label smoothing s in [0, 1).
        smoothing_mode: `off`; `mixed`: losses of the labels are mixed; `plugin`: smoothed label inside RCE's logarithm.
        a, b: weights of NCE and RCE in NCE+RCE (Ma et al. use 1, 10 on MNIST).
    """

    name: str = "nrat"
    lam: float = 6.0
    inner: str = "kl"
    smoothing: float = 0.0
    smoothing_mode: str = "off"
    a: float = 1.0
    b: float = 1.0


class Objective(nn.Module):
    """One objective, ready to train with. Make it with `build`.

    It holds parameters of no kind; `*_ikl` objectives keep the mean prediction of each class as a buffer, which belongs
    in checkpoints and is averaged over ranks by `update`.
    """

    class_sums: Tensor | None
    class_counts: Tensor | None

    def __init__(self, preset: Preset, spec: ObjectiveSpec, num_classes: int | None = None) -> None:
        super().__init__()
        self.preset, self.spec = preset, spec
        self.family = preset.family
        keeps_means = preset.divergence == "ikl" and num_classes is not None
        self.register_buffer("class_sums", torch.zeros(num_classes or 0, num_classes or 0) if keeps_means else None)
        self.register_buffer("class_counts", torch.zeros(num_classes or 0) if keeps_means else None)

    def extra_repr(self) -> str:
        return f"{self.spec}, family={self.family}"

    @property
    def attacks(self) -> bool:
        """Whether training needs adversarial images at all."""
        return self.family != "natural"

    def inner(self, logits: Tensor | None, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The attack's objective: a function of adversarial logits [B, K] -> [B], to be maximised.

        Args:
            logits: natural logits [B, K] (used detached), computed as the attack runs the model; `ce` and `nce_rce` do
                not need them.
            y: int64 [B] or probabilities [B, K].
        """
        name = self.spec.inner
        if name in ("ce", "nce_rce"):
            return lambda logits_adv: self._classify(name, logits_adv, y, smooth=False)
        assert logits is not None, f"inner loss {name} needs natural logits"
        natural = logits.detach()
        return lambda logits_adv: DIVERGENCES[name](natural, logits_adv)

    @property
    def inner_needs_natural(self) -> bool:
        """Whether `inner` uses the natural logits."""
        return self.spec.inner not in ("ce", "nce_rce")

    def per_sample(self, logits: Tensor | None, logits_adv: Tensor | None, y: Tensor) -> Tensor:
        """The outer loss of each image [B]; gradients flow through both logits.

        Args:
            logits: natural logits [B, K]; None for the `at` family.
            logits_adv: adversarial logits [B, K]; None for the `natural` family.
            y: int64 [B]; probabilities [B, K] too, except for MART.
        """
        if self.family == "natural":
            assert logits is not None
            return self._classify(self.preset.loss, logits, y)
        assert logits_adv is not None
        if self.family == "at":
            return self._classify(self.preset.loss, logits_adv, y)
        assert logits is not None
        if self.family == "trades":
            return self._classify(self.preset.loss, logits, y) + self.spec.lam * self._diverge(logits, logits_adv, y)
        if y.ndim != 1:
            raise UserError(
                "MART needs hard labels (its margin and weight name one class); soft labels cannot be used."
            )
        logits, logits_adv = _upcast(logits), _upcast(logits_adv)
        outer = self._classify(self.preset.loss, logits_adv, y)
        if self.preset.loss == "ce":
            outer = outer + _mart_margin(logits_adv, y)
        return outer + self.spec.lam * _mart_regulariser(logits, logits_adv, y)

    def loss(
        self, logits: Tensor | None, logits_adv: Tensor | None, y: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The mean of `per_sample`, or its mean under `weights` [B] (sum w l / sum w): a scalar."""
        losses = self.per_sample(logits, logits_adv, y)
        return losses.mean() if weights is None else (weights * losses).sum() / weights.sum()

    @torch.no_grad()
    def update(self, logits: Tensor | None, y: Tensor, reduce: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        """Let a training step's natural predictions into the class means, where the objective keeps any.

        `reduce` sums a tensor over ranks. The means are exponential, with a memory of about 100 steps.
        """
        if self.class_sums is None or self.class_counts is None or logits is None:
            return
        sums, counts = label_sums(_upcast(logits).softmax(1), y)
        self.class_sums.mul_(0.99).add_(reduce(sums))
        self.class_counts.mul_(0.99).add_(reduce(counts))

    def _diverge(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        divergence = DIVERGENCES[self.preset.divergence]
        if self.class_sums is None or self.class_counts is None:
            return divergence(logits, logits_adv, y)
        # In the first steps, before every class was seen, the means of this batch; decided on the device.
        sums, counts = label_sums(_upcast(logits.detach()).softmax(1), y)
        seen = (self.class_counts > 0).all()
        sums, counts = torch.where(seen, self.class_sums, sums), torch.where(seen, self.class_counts, counts)
        return _ikl(logits, logits_adv, y, _means(sums, counts))

    def _classify(self, name: str, logits: Tensor, y: Tensor, smooth: bool = True) -> Tensor:
        """C, with this objective's constants."""
        smoothing = self.spec.smoothing if smooth and self.spec.smoothing_mode != "off" else 0.0
        a, b = self.spec.a, self.spec.b
        if name != "nce_rce":
            return LOSSES[name](logits, y, smoothing)
        if smoothing and self.spec.smoothing_mode == "plugin":
            return _plugin_smoothed(logits, y, smoothing, a, b)
        if a == b == 1.0:
            return LOSSES["nce_rce"](logits, y, smoothing)
        return a * LOSSES["nce"](logits, y, smoothing) + b * LOSSES["rce"](logits, y, smoothing)


def build(
    name: str,
    lam: float | None = None,
    smoothing: float | None = None,
    smoothing_mode: str | None = None,
    inner: str | None = None,
    a: float = 1.0,
    b: float = 1.0,
    num_classes: int | None = None,
) -> Objective:
    """The objective called `name`; None means the preset's constant.

    Args:
        name: key of `OBJECTIVES`.
        lam, inner, smoothing, smoothing_mode, a, b: see `ObjectiveSpec`. Smoothing without a mode is `mixed`.
        num_classes: lets `*_ikl` objectives keep class means across steps; without it they use those of the batch.

    Raises:
        UserError: an unknown name or a value out of range.
    """
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective '{name}'. {did_you_mean(name, OBJECTIVES)}")
    preset = OBJECTIVES[name]
    if smoothing_mode is None:
        smoothing_mode = "mixed" if smoothing and preset.smoothing_mode == "off" else preset.smoothing_mode
    spec = ObjectiveSpec(
        name,
        preset.lam if lam is None else lam,
        preset.inner if inner is None else inner,
        preset.smoothing if smoothing is None else smoothing,
        smoothing_mode,
        a,
        b,
    )
    if spec.inner not in INNERS:
        raise UserError(f"objective.inner is '{spec.inner}'. {did_you_mean(spec.inner, INNERS)}")
    if spec.inner in ("kl", "sym_kl") and preset.family in ("at", "natural"):
        raise UserError(
            f"objective.inner '{spec.inner}' needs natural predictions, which {name} does not have: use ce."
        )
    if not 0.0 <= spec.smoothing < 1.0:
        raise UserError(f"objective.smoothing is {spec.smoothing}; it must be in [0, 1).")
    if spec.smoothing_mode not in SMOOTHING_MODES:
        raise UserError(
            f"objective.smoothing_mode is '{spec.smoothing_mode}'. {did_you_mean(spec.smoothing_mode, SMOOTHING_MODES)}"
        )
    if spec.smoothing_mode == "plugin" and preset.loss not in ("nce_rce",):
        raise UserError(
            f"objective.smoothing_mode 'plugin' is for NCE+RCE; {name} trains with {preset.loss}: use mixed."
        )
    if not (math.isfinite(spec.lam) and spec.lam >= 0):
        raise UserError(f"objective.lam is {spec.lam}; it must be 0 or more.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in (a, b)):
        raise UserError(f"objective.a and objective.b are {a} and {b}; they must be 0 or more.")
    return Objective(preset, spec, num_classes)
