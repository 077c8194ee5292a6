"""What is trained: families of objectives, and the published combinations of losses and divergences.

    family   inner (the attack maximises)   outer (training minimises)
    natural  -                              C(z, y)
    at       C(z', y)                       C(z', y)
    trades   D(p, p'), p detached           C(z, y) + lam * D(p, p')
    mart     CE(z', y)                      C'(z', y) + lam * KL(p, p') (1 - p_y)

z, z' are natural and adversarial logits [B, K], p and p' their softmax; C is one of `LOSSES`, D one of `DIVERGENCES`.
`objective.inner` replaces the inner loss by any loss or divergence, and `objective.warm_start` starts C as cross-entropy.
docs/objectives.md has the mathematics and the sources.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean
from nrat_scale.losses import DIVERGENCES, LOSSES, ikl, label_sums, mean_predictions, plugin_smoothed, upcast

FAMILIES = ("natural", "at", "trades", "mart")
# Fields of `ObjectiveSpec` that only a preset sets; they are neither recipe keys nor stored in recipe.yaml.
PRESET_ONLY = ("family", "loss", "divergence", "init", "bn")


@dataclass(frozen=True)
class ObjectiveSpec:
    """One objective as data; `OBJECTIVES` holds the published ones, and a recipe may change their constants.

    Raises:
        UserError: a value is unknown, out of range, or contradicts another.
    """

    name: str  # key of `OBJECTIVES`
    family: str  # one of `FAMILIES`
    loss: str  # C, a key of `LOSSES`
    divergence: str = ""  # D, a key of `DIVERGENCES`, for the family `trades` only
    lam: float = 0.0  # weight of the divergence, or of MART's regulariser
    inner: str = "ce"  # what the attack maximises: a key of `LOSSES` or of `DIVERGENCES`
    smoothing: float = 0.0  # label smoothing s in [0, 1)
    smoothing_mode: str = "off"  # `mixed`: mix the losses of the labels; `plugin`: smooth the label in RCE's logarithm
    init: str = "normal"  # default of `threat.init`
    bn: str = "eval"  # default of `threat.bn`
    a: float = 1.0  # weight of NCE in NCE+RCE
    b: float = 1.0  # weight of RCE in NCE+RCE (Ma et al. use a = 1, b = 10 on MNIST)
    # Over this fraction of training C goes linearly from cross-entropy to itself; no publication has it. A bounded C has
    # almost no gradient once the model names one class, and cross-entropy has its largest there.
    warm_start: float = 0.0

    def __post_init__(self) -> None:
        check_choice("objective.family", self.family, FAMILIES)
        check_choice("objective.loss", self.loss, LOSSES)
        check_choice("objective.inner", self.inner, {**LOSSES, **DIVERGENCES})
        check_choice("objective.smoothing_mode", self.smoothing_mode, ("off", "mixed", "plugin"))
        if self.family == "trades":
            check_choice("objective.divergence", self.divergence, DIVERGENCES)
        elif self.divergence:
            raise UserError(f"objective.divergence is '{self.divergence}', but the family '{self.family}' has none.")
        if self.inner in DIVERGENCES and self.family in ("natural", "at"):
            raise UserError(f"objective.inner '{self.inner}' needs natural logits, which {self.name} lacks: use ce.")
        check_value("objective.smoothing", self.smoothing, 0.0 <= self.smoothing < 1.0, "in [0, 1)")
        if self.smoothing and self.smoothing_mode == "off":
            conflict = f"objective.smoothing is {self.smoothing} but objective.smoothing_mode is 'off'"
            raise UserError(f"{conflict}. Choose mixed or plugin, or set the smoothing to 0.")
        if self.smoothing_mode == "plugin" and self.loss != "nce_rce":
            raise UserError(f"objective.smoothing_mode 'plugin' is for NCE+RCE, not for {self.loss}: use mixed.")
        for name, weight in (("lam", self.lam), ("a", self.a), ("b", self.b)):
            check_value(f"objective.{name}", weight, 0 <= weight < math.inf, "finite and 0 or more")
        check_value("objective.warm_start", self.warm_start, 0.0 <= self.warm_start <= 1.0, "in [0, 1]")

    @property
    def starts_warm(self) -> bool:
        """Whether `warm_start` changes what is trained: not if C is cross-entropy anyway."""
        return self.warm_start > 0 and self.loss != "ce"

    @property
    def title(self) -> str:
        """The preset, and the part of its description that no publication has; for results, cards and reports."""
        return self.name + (f", warm start over {100 * self.warm_start:g} % of training" if self.starts_warm else "")

    def loss_weight(self, progress: float) -> float:
        """The weight of C, the rest being cross-entropy's, after the fraction `progress` of training."""
        return min(1.0, progress / self.warm_start) if self.starts_warm else 1.0


OBJECTIVES: dict[str, ObjectiveSpec] = {
    spec.name: spec
    for spec in (
        ObjectiveSpec("natural", "natural", "ce"),
        ObjectiveSpec("pgd_at", "at", "ce", init="uniform"),
        ObjectiveSpec("pgd_at_apl", "at", "nce_rce", init="uniform"),
        ObjectiveSpec("trades", "trades", "ce", "kl", 6.0, "kl"),
        ObjectiveSpec("trades_apl", "trades", "nce_rce", "kl", 6.0, "kl"),
        ObjectiveSpec("nrat", "trades", "nce_rce", "sym_kl", 6.0, "kl"),
        ObjectiveSpec("mart", "mart", "ce", lam=5.0),
        ObjectiveSpec("mart_apl", "mart", "nce_rce", lam=5.0),
        ObjectiveSpec("dm_at", "trades", "ce", "kl", 5.0, "kl", 0.1, "mixed", "uniform", "batch"),
        ObjectiveSpec("trades_gce", "trades", "gce", "kl", 6.0, "kl"),
        ObjectiveSpec("trades_sce", "trades", "sce", "kl", 6.0, "kl"),
        ObjectiveSpec("trades_ikl", "trades", "ce", "ikl", 6.0, "kl"),
        ObjectiveSpec("nrat_ikl", "trades", "nce_rce", "ikl", 6.0, "kl"),
        ObjectiveSpec("score", "trades", "ce", "lse", 4.0, "kl"),
    )
}


def preset(name: str) -> ObjectiveSpec:
    """`OBJECTIVES[name]`; raises `UserError` for an unknown name."""
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective '{name}' (objective.name). {did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def _mart_margin(logits_adv: Tensor, y: Tensor) -> Tensor:
    """-log(1.0001 - p'_j + 1e-12), j the most probable class other than y: second half of MART's BCE (Wang et al. 2020)."""
    p_adv = logits_adv.softmax(1)
    others = p_adv.scatter(1, y[:, None], -1.0)
    return -(1.0001 - others.amax(1) + 1e-12).log()


def _mart_regulariser(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """KL(p || p') * (1.0000001 - p_y), with log(p' + 1e-12) inside the KL."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    kl = (p * (log_p - (logits_adv.softmax(1) + 1e-12).log())).sum(1)
    return kl * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


class Objective(nn.Module):
    """The inner and outer loss that an `ObjectiveSpec` describes.

    It has no parameters. IKL keeps the mean prediction of each class in buffers; they belong in checkpoints, and `update`
    sums them over ranks.

    Args:
        spec: what to compute.
        num_classes: K, for IKL's class means across steps; None uses the means of each batch.
    """

    class_sums: Tensor | None
    class_counts: Tensor | None

    def __init__(self, spec: ObjectiveSpec, num_classes: int | None = None) -> None:
        super().__init__()
        self.spec, self.family = spec, spec.family
        k = num_classes if "ikl" in (spec.divergence, spec.inner) else None
        self.register_buffer("class_sums", None if k is None else torch.zeros(k, k))
        self.register_buffer("class_counts", None if k is None else torch.zeros(k))

    @property
    def attacks(self) -> bool:
        """Whether training needs adversarial images."""
        return self.family != "natural"

    @property
    def inner_needs_natural(self) -> bool:
        """Whether `inner` uses the natural logits."""
        return self.spec.inner in DIVERGENCES

    def inner(self, logits: Tensor | None, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The attack's objective: a function of adversarial logits [B, K] -> [B], to be maximised.

        Args:
            logits: natural logits [B, K], from the model in the attack's mode; used detached, and only if
                `inner_needs_natural`.
            y: int64 [B] or probabilities [B, K].
        """
        if not self.inner_needs_natural:
            return lambda logits_adv: self._classify(self.spec.inner, logits_adv, y, smoothing=0.0)
        assert logits is not None, f"inner loss {self.spec.inner} needs natural logits"
        natural = logits.detach()
        return lambda logits_adv: self._diverge(self.spec.inner, natural, logits_adv, y)

    def per_sample(self, logits: Tensor | None, logits_adv: Tensor | None, y: Tensor, progress: float = 1.0) -> Tensor:
        """The outer loss of each image [B]; gradients flow through both logits.

        Args:
            logits: natural logits [B, K]; None for the `at` family.
            logits_adv: adversarial logits [B, K]; None for the `natural` family.
            y: int64 [B], or probabilities [B, K] except for MART.
            progress: the fraction of training that is done, for `objective.warm_start`.
        """
        spec = self.spec
        classified = logits if self.family in ("natural", "trades") else logits_adv
        assert classified is not None
        outer, weight = self._classify(spec.loss, classified, y, spec.smoothing), spec.loss_weight(progress)
        if weight < 1:
            outer = weight * outer + (1 - weight) * self._classify("ce", classified, y, spec.smoothing)
        if self.family in ("natural", "at"):
            return outer
        assert logits is not None and logits_adv is not None
        if self.family == "trades":
            return outer + spec.lam * self._diverge(spec.divergence, logits, logits_adv, y)
        if y.ndim != 1:
            raise UserError("MART needs hard labels, because its margin and weight name one class.")
        logits, logits_adv = upcast(logits), upcast(logits_adv)
        if spec.loss == "ce":
            outer = outer + _mart_margin(logits_adv, y)
        return outer + spec.lam * _mart_regulariser(logits, logits_adv, y)

    def loss(self, logits: Tensor | None, logits_adv: Tensor | None, y: Tensor, progress: float = 1.0) -> Tensor:
        """The mean of `per_sample`: a scalar."""
        return self.per_sample(logits, logits_adv, y, progress).mean()

    @torch.no_grad()
    def update(self, logits: Tensor | None, y: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """Update the class means with the natural predictions of a training step; without class means, do nothing.

        The means are exponential, with a memory of about 100 steps. `reduce` sums a tensor over ranks.
        """
        if self.class_sums is None or self.class_counts is None or logits is None:
            return
        sums, counts = label_sums(upcast(logits).softmax(1), y)
        self.class_sums.mul_(0.99).add_(reduce(sums))
        self.class_counts.mul_(0.99).add_(reduce(counts))

    def _diverge(self, name: str, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        """D, for IKL with the class means if this objective keeps them."""
        if name != "ikl" or self.class_sums is None or self.class_counts is None:
            return DIVERGENCES[name](logits, logits_adv, y)
        # Until every class has been seen, use the means of this batch. torch.where avoids a CPU-GPU sync.
        sums, counts = label_sums(upcast(logits.detach()).softmax(1), y)
        seen = (self.class_counts > 0).all()
        sums, counts = torch.where(seen, self.class_sums, sums), torch.where(seen, self.class_counts, counts)
        return ikl(logits, logits_adv, y, mean_predictions(sums, counts))

    def _classify(self, name: str, logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
        """C, with the constants of this objective."""
        a, b = self.spec.a, self.spec.b
        if name == "nce_rce" and smoothing and self.spec.smoothing_mode == "plugin":
            return plugin_smoothed(logits, y, smoothing, a, b)
        if name == "nce_rce" and (a, b) != (1.0, 1.0):
            return a * LOSSES["nce"](logits, y, smoothing) + b * LOSSES["rce"](logits, y, smoothing)
        return LOSSES[name](logits, y, smoothing)


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
    """The objective called `name`; None keeps the preset's constant.

    Args:
        name: key of `OBJECTIVES`.
        lam, inner, smoothing, smoothing_mode, a, b: see `ObjectiveSpec`. Smoothing without a mode is `mixed`.
        num_classes: see `Objective`.

    Raises:
        UserError: an unknown name or a value out of range.
    """
    spec = preset(name)
    if smoothing and smoothing_mode is None and spec.smoothing_mode == "off":
        smoothing_mode = "mixed"
    given = {"lam": lam, "smoothing": smoothing, "smoothing_mode": smoothing_mode, "inner": inner, "a": a, "b": b}
    changes = {key: value for key, value in given.items() if value is not None}
    return Objective(dataclasses.replace(spec, **changes), num_classes)  # type: ignore[arg-type]
