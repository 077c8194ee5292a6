"""What is trained: families of objectives, which combine losses and divergences.

    family   inner (the attack maximises)   outer (training minimises)
    natural  -                              C(z, y)
    at       C(z', y)                       C(z', y)
    trades   D(p, p'), p detached           C(z, y) + lam * D(p, p')
    mart     CE(z', y)                      C'(z', y) + lam * KL(p, p') (1 - p_y)

z, z' are natural and adversarial logits [B, K], p and p' their softmax; C is one of `LOSSES`, D one of `DIVERGENCES`.
`objective.loss`, `objective.divergence` and `objective.inner` replace C, D and the inner loss by any other of the tables;
`objective.warm_start` begins with cross-entropy as C.
`nrat_scale.presets` has the published combinations; docs/objectives.md has the mathematics and the sources.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
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
from nrat_scale.presets import CUTMIX_INNER, FAMILIES, OBJECTIVES, ObjectiveSpec, preset

__all__ = ["DIVERGENCES", "FAMILIES", "LOSSES", "OBJECTIVES", "Objective", "ObjectiveSpec", "build", "preset"]


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
