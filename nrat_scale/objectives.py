"""What is trained: families of objectives, and the published combinations of losses and divergences.

    family   inner (the attack maximises)   outer (training minimises)
    natural  -                              C(z, y)
    at       C(z', y)                       C(z', y)
    trades   D(p, p'), p detached           C(z, y) + lam * D(p, p')
    mart     CE(z', y)                      C'(z', y) + lam * KL(p, p') (1 - p_y)

z, z' are natural and adversarial logits [B, K], p and p' their softmax; C is one of `LOSSES`, D one of `DIVERGENCES`.
`objective.loss`, `objective.divergence` and `objective.inner` replace C, D and the inner loss by any other of the tables;
`objective.warm_start` begins with cross-entropy as C.
docs/objectives.md has the mathematics and the sources.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean
from nrat_scale.label_refinement import LabelRefinement, RefineSpec
from nrat_scale.losses import (
    DIVERGENCES,
    LOSSES,
    ikl,
    ikl_weights,
    label_sums,
    mart_margin,
    mart_regulariser,
    plugin_smoothed,
    upcast,
)

FAMILIES = ("natural", "at", "trades", "mart")
# Fields of `ObjectiveSpec` that only a preset sets; they are neither recipe keys nor stored in recipe.yaml.
PRESET_ONLY = ("family", "init", "bn", "smooths_cutmix", "ema_decay")
# With CutMix the label takes the place of p in the inner loss, as in DM_AT's code.
# Divergence -> the loss of the soft label y that the attack maximises, and that in words.
CUTMIX_INNER = {
    "kl": ("ce", "KL(y || p'), which has the gradient of cross-entropy, instead of KL(p || p')"),
    "lse": ("lse", "||p' - y||^2 instead of ||p' - p||^2"),
}


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
    lam: float = 0.0  # weight of the divergence, or of MART's regulariser; 1 for IKL, whose terms have their own
    inner: str = "ce"  # what the attack maximises: a key of `DIVERGENCES` or else of `LOSSES`
    smoothing: float = 0.0  # label smoothing s in [0, 1)
    # `mixed`: mix the losses of the labels; `plugin`: smooth the label in RCE's logarithm. LSE always smooths its label.
    smoothing_mode: str = "off"
    init: str = "normal"  # default of `threat.init`
    bn: str = "eval"  # default of `threat.bn`
    smooths_cutmix: bool = True  # whether `smoothing` also applies to the soft labels of CutMix
    ikl_alpha: float = 4.0  # weight of IKL's soft cross-entropy
    ikl_beta: float = 20.0  # weight of IKL's weighted MSE
    ikl_temperature: float = 4.0  # of the predictions in IKL's class means
    ikl_gamma: float = 0.0  # GKL's power of the class means in (0, 1]; 0 leaves them as they are, which is IKL
    a: float = 1.0  # weight of NCE in NCE+RCE
    b: float = 1.0  # weight of RCE in NCE+RCE (Ma et al. use a = 1, b = 10 on MNIST)
    # Fraction of training over which C goes linearly from cross-entropy to itself (ours, not published). A bounded C has
    # almost no gradient once the model names one class; that of cross-entropy is largest there.
    warm_start: float = 0.0
    refine: RefineSpec = field(default_factory=RefineSpec)
    ema_decay: float = 0.0  # default of `ema.decay`

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
        if self.smoothing and self.smoothing_mode == "off" and self.loss != "lse":
            conflict = f"objective.smoothing is {self.smoothing} but objective.smoothing_mode is 'off'"
            raise UserError(f"{conflict}. Choose mixed or plugin, or set the smoothing to 0.")
        if self.smoothing_mode == "plugin" and self.loss not in ("nce_rce", "lse"):
            raise UserError(f"objective.smoothing_mode 'plugin' is for NCE+RCE, not for {self.loss}: use mixed.")
        self._check_ikl()
        self.refine.check_objective(self.name, self.family, (self.divergence, self.inner), self.smoothing)
        for name, weight in (("lam", self.lam), ("a", self.a), ("b", self.b)):
            check_value(f"objective.{name}", weight, 0 <= weight < math.inf, "finite and 0 or more")
        if self.lam and self.family in ("natural", "at"):
            unused = f"objective.lam is {self.lam}, but {self.name} has no second term that it would weight"
            raise UserError(f"{unused}. Remove it, or choose another objective.name, such as trades.")
        if (self.a, self.b) != (1.0, 1.0) and "nce_rce" not in (self.loss, self.inner):
            unused = (
                f"objective.a is {self.a} and objective.b {self.b}, but they weight NCE+RCE and the loss is {self.loss}"
            )
            raise UserError(f"{unused}. Remove them, or choose objective.loss=nce_rce.")
        check_value("objective.warm_start", self.warm_start, 0.0 <= self.warm_start <= 1.0, "in [0, 1]")

    @property
    def starts_warm(self) -> bool:
        """Whether `warm_start` changes what is trained: not if C is cross-entropy anyway."""
        return self.warm_start > 0 and self.loss != "ce"

    def loss_weight(self, progress: float) -> float:
        """The weight of C, the rest being cross-entropy's, after the fraction `progress` of training."""
        return min(1.0, progress / self.warm_start) if self.starts_warm else 1.0

    def _check_ikl(self) -> None:
        if self.divergence == "ikl" and self.lam != 1.0:
            way_out = "IKL has objective.ikl_alpha and objective.ikl_beta instead. Remove objective.lam"
            raise UserError(f"objective.lam is {self.lam}, but {way_out}.")
        for name, usual in IKL_DEFAULTS.items():
            value = getattr(self, name)
            if value != usual and "ikl" not in (self.divergence, self.inner):
                what = f"objective.{name} is {value}, but neither objective.divergence nor objective.inner is ikl"
                raise UserError(f"{what}. Choose objective.name trades_ikl or nrat_ikl, or remove the key.")
        for name, weight in (("ikl_alpha", self.ikl_alpha), ("ikl_beta", self.ikl_beta)):
            check_value(f"objective.{name}", weight, 0 <= weight < math.inf, "finite and 0 or more")
        positive = 0 < self.ikl_temperature < math.inf
        check_value("objective.ikl_temperature", self.ikl_temperature, positive, "finite and greater than 0")
        check_value("objective.ikl_gamma", self.ikl_gamma, 0 <= self.ikl_gamma <= 1, "in [0, 1]")

    @property
    def title(self) -> str:
        """The preset's name, with what replaces its own, and the warm start: `nrat + loss=gce + refine=adr, warm start ...`."""
        return objective_title(self.name, self.loss, self.divergence, self.warm_start, self.refine.kind)

    @property
    def weights_text(self) -> str:
        """The weights of the outer loss in words, for instance `lam 6`; empty for families without any."""
        if self.divergence == "ikl":
            power = f", gamma {self.ikl_gamma:g}" if self.ikl_gamma else ""
            return f"alpha {self.ikl_alpha:g}, beta {self.ikl_beta:g}, temperature {self.ikl_temperature:g}{power}"
        return f"lam {self.lam:g}" if self.family in ("trades", "mart") else ""

    @property
    def cutmix_notes(self) -> list[str]:
        """What CutMix's soft labels y change in this objective, in sentences."""
        notes = []
        if self.inner in CUTMIX_INNER:
            what = f"With CutMix the attack maximises {CUTMIX_INNER[self.inner][1]}"
            notes.append(f"{what}. y are the labels trained on, wrong ones included.")
        if self.smoothing and not self.smooths_cutmix:
            notes.append(f"CutMix's labels are not smoothed: objective.smoothing {self.smoothing:g} is not applied.")
        return notes


IKL_DEFAULTS = {
    name: getattr(ObjectiveSpec, name) for name in ("ikl_alpha", "ikl_beta", "ikl_temperature", "ikl_gamma")
}
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
        ObjectiveSpec("dm_at", "trades", "ce", "kl", 5.0, "kl", 0.1, "mixed", "uniform", "batch", False),
        ObjectiveSpec("trades_gce", "trades", "gce", "kl", 6.0, "kl"),
        ObjectiveSpec("trades_sce", "trades", "sce", "kl", 6.0, "kl"),
        ObjectiveSpec("trades_ikl", "trades", "ce", "ikl", 1.0, "kl"),
        ObjectiveSpec("nrat_ikl", "trades", "nce_rce", "ikl", 1.0, "kl"),
        ObjectiveSpec("trades_nfl_rce", "trades", "nfl_rce", "kl", 6.0, "kl"),
        ObjectiveSpec("trades_agce", "trades", "agce", "kl", 6.0, "kl"),
        ObjectiveSpec("adr", "at", "ce", init="uniform", refine=RefineSpec("adr"), ema_decay=0.995),
        ObjectiveSpec("trades_adr", "trades", "ce", "kl", 6.0, "kl", refine=RefineSpec("adr"), ema_decay=0.995),
        ObjectiveSpec("te", "at", "ce", init="uniform", refine=RefineSpec("te")),
        ObjectiveSpec("trades_te", "trades", "ce", "kl", 6.0, "kl", refine=RefineSpec("te")),
        ObjectiveSpec("sglr", "at", "ce", init="uniform", refine=RefineSpec("sglr")),
        ObjectiveSpec("noilin", "at", "ce", init="uniform", refine=RefineSpec("noilin")),
        ObjectiveSpec("trades_noilin", "trades", "ce", "kl", 6.0, "kl", refine=RefineSpec("noilin", noilin_most=0.4)),
        ObjectiveSpec("score", "trades", "lse", "lse", 4.0, "lse", 0.1, "mixed", "uniform", "batch", False),
    )
}


def preset(name: str, divergence: str = "") -> ObjectiveSpec:
    """`OBJECTIVES[name]`; raises `UserError` for an unknown name.

    If `divergence` replaces the preset's own, and one of the two is IKL, the constants are those that the new one needs:
    lam 1 for IKL, TRADES's lam without it.
    """
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective '{name}' (objective.name). {did_you_mean(name, OBJECTIVES)}")
    spec = OBJECTIVES[name]
    if not divergence or spec.family != "trades" or (divergence == "ikl") == (spec.divergence == "ikl"):
        return spec
    lam = 1.0 if divergence == "ikl" else OBJECTIVES["trades"].lam
    return dataclasses.replace(spec, divergence=divergence, lam=lam)


def objective_title(name: str, loss: str, divergence: str, warm_start: float = 0.0, refine: str = "") -> str:
    """`name`, with what is not that of this preset: `nrat + loss=ce + divergence=kl + refine=adr`; empty ones are not named.

    A warm start follows, unless it has no effect.
    """
    usual = OBJECTIVES.get(name)
    pairs = [("refine", refine, usual.refine.kind if usual is not None else "none")]
    if usual is not None:
        pairs = [("loss", loss, usual.loss), ("divergence", divergence, usual.divergence), *pairs]
    title = " + ".join([name, *(f"{key}={given}" for key, given, own in pairs if given not in ("", own))])
    warm = warm_start > 0 and (loss or (usual.loss if usual is not None else "")) != "ce"
    return title + (f", warm start over {100 * warm_start:g} % of training" if warm else "")


class Objective(nn.Module):
    """The inner and outer loss that an `ObjectiveSpec` describes.

    It has no parameters. IKL keeps in buffers, which belong in checkpoints, the mean prediction of each class over the
    previous epoch, and the sums of this one; `update` sums them over ranks.

    Args:
        spec: what to compute.
        num_classes: K, for IKL's class means; None leaves them at 1 / K, as in the first epoch.
        num_images: N, the images that `refinement` numbers.
    """

    class_means: Tensor | None  # float64 [K, K] by label
    class_sums: Tensor | None  # float64 [K, K], of this epoch so far

    def __init__(self, spec: ObjectiveSpec, num_classes: int | None = None, num_images: int | None = None) -> None:
        super().__init__()
        self.spec, self.family = spec, spec.family
        self.refinement = LabelRefinement(spec.refine, num_classes, num_images)
        k = num_classes if "ikl" in (spec.divergence, spec.inner) else None
        self.register_buffer("class_means", None if k is None else torch.full((k, k), 1 / k, dtype=torch.float64))
        self.register_buffer("class_sums", None if k is None else torch.zeros(k, k, dtype=torch.float64))
        self._mass: Tensor | None = None  # of this step's global batch, for GKL

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
            y: int64 [B], or the soft labels of CutMix, probabilities [B, K], which replace p in KL and LSE.
        """
        if y.ndim == 2 and self.spec.inner in CUTMIX_INNER:
            name = CUTMIX_INNER[self.spec.inner][0]
            return lambda logits_adv: self._classify(name, logits_adv, y, smoothing=0.0)
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
            outer = outer + mart_margin(logits_adv, y)
        return outer + spec.lam * mart_regulariser(logits, logits_adv, y)

    def loss(
        self,
        logits: Tensor | None,
        logits_adv: Tensor | None,
        y: Tensor,
        progress: float = 1.0,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The mean over the images of `per_sample`, times `weights` [B] if given: a scalar.

        The weight of an image multiplies its whole outer loss, regulariser included, in every family; its attack maximises
        the inner loss of this image alone, which a weight would not change. The sum is divided by B and not by the sum of
        the weights, so that the mean over micro-batches and ranks is that over the global batch.
        """
        losses = self.per_sample(logits, logits_adv, y, progress)
        return (losses if weights is None else losses * weights.to(losses.dtype)).mean()

    @torch.no_grad()
    def begin_step(
        self, labels: Sequence[Tensor], reduce: Callable[[Tensor], Tensor] = lambda sums: sums, new_epoch: bool = False
    ) -> None:
        """Prepare IKL for a step: roll the class means over in a new epoch, and normalise GKL over the global batch.

        Args:
            labels: of this rank's micro-batches.
            reduce: sums a tensor over ranks.
            new_epoch: whether this is the first step of an epoch but the first.
        """
        if self.class_means is None or self.class_sums is None:
            return
        if new_epoch:
            total = self.class_sums.sum(1, keepdim=True)
            # A class without an image in the last epoch keeps its mean.
            self.class_means.copy_(torch.where(total > 0, self.class_sums / total, self.class_means))
            self.class_sums.zero_()
        if self.spec.ikl_gamma:
            totals = torch.cat([ikl_weights(y, self.class_means, self.spec.ikl_gamma).sum(1) for y in labels])
            mass, images = reduce(torch.stack([totals.square().sum(), torch.ones_like(totals).sum()]))
            self._mass = mass / images

    @torch.no_grad()
    def update(
        self,
        logits: Tensor | None,
        y: Tensor,
        reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
        weights: Tensor | None = None,
    ) -> None:
        """Add the natural predictions of a micro-batch to the sums of the class means; without class means, do nothing.

        `reduce` sums a tensor over ranks. `weights` [B] of the images count in the class means.
        """
        if self.class_sums is None or logits is None:
            return
        p = (upcast(logits) / self.spec.ikl_temperature).softmax(1)
        p = p if weights is None else p * weights[:, None]
        self.class_sums += reduce(label_sums(p.double(), y)[0])

    def _diverge(self, name: str, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        """D, for IKL with the class means and constants of this objective."""
        if name != "ikl":
            return DIVERGENCES[name](logits, logits_adv, y)
        spec, means, k = self.spec, self.class_means, logits.shape[1]
        if means is None:
            means = torch.full((k, k), 1 / k, dtype=torch.float64, device=logits.device)
        constants = {"alpha": spec.ikl_alpha, "beta": spec.ikl_beta, "gamma": spec.ikl_gamma}
        return ikl(logits, logits_adv, y, means, **constants, mass=self._mass)

    def _classify(self, name: str, logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
        """C, with the constants of this objective."""
        if y.ndim == 2 and not self.spec.smooths_cutmix:
            smoothing = 0.0
            if name == "ce":  # KL(y || p), which only differs by a constant
                label = y.to(upcast(logits).dtype)
                return LOSSES["ce"](logits, label) + torch.special.xlogy(label, label).sum(1)
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
    **changes: str | float | RefineSpec,
) -> Objective:
    """The objective called `name`; None keeps the preset's constant.

    Args:
        name: key of `OBJECTIVES`.
        lam, inner, smoothing, smoothing_mode, a, b: see `ObjectiveSpec`. Smoothing without a mode is `mixed`.
        num_classes: see `Objective`.
        changes: other fields of `ObjectiveSpec`, for instance `loss`, `divergence` or `ikl_alpha`.

    Raises:
        UserError: an unknown name or a value out of range.
    """
    spec = preset(name, str(changes.get("divergence", "")))
    if smoothing and smoothing_mode is None and spec.smoothing_mode == "off":
        smoothing_mode = "mixed"
    given = {"lam": lam, "smoothing": smoothing, "smoothing_mode": smoothing_mode, "inner": inner, "a": a, "b": b}
    changes |= {key: value for key, value in given.items() if value is not None}
    return Objective(dataclasses.replace(spec, **changes), num_classes)  # type: ignore[arg-type]
