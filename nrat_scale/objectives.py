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

from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.losses import DIVERGENCES, LOSSES, ikl, label_sums, mean_predictions, plugin_smoothed, upcast

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
        logits, logits_adv = upcast(logits), upcast(logits_adv)
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
        sums, counts = label_sums(upcast(logits).softmax(1), y)
        self.class_sums.mul_(0.99).add_(reduce(sums))
        self.class_counts.mul_(0.99).add_(reduce(counts))

    def _diverge(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        divergence = DIVERGENCES[self.preset.divergence]
        if self.class_sums is None or self.class_counts is None:
            return divergence(logits, logits_adv, y)
        # In the first steps, before every class was seen, the means of this batch; decided on the device.
        sums, counts = label_sums(upcast(logits.detach()).softmax(1), y)
        seen = (self.class_counts > 0).all()
        sums, counts = torch.where(seen, self.class_sums, sums), torch.where(seen, self.class_counts, counts)
        return ikl(logits, logits_adv, y, mean_predictions(sums, counts))

    def _classify(self, name: str, logits: Tensor, y: Tensor, smooth: bool = True) -> Tensor:
        """C, with this objective's constants."""
        smoothing = self.spec.smoothing if smooth and self.spec.smoothing_mode != "off" else 0.0
        a, b = self.spec.a, self.spec.b
        if name != "nce_rce":
            return LOSSES[name](logits, y, smoothing)
        if smoothing and self.spec.smoothing_mode == "plugin":
            return plugin_smoothed(logits, y, smoothing, a, b)
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
