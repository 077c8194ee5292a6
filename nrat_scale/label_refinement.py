"""Label refinement: methods that train on other labels than the given ones (`objective.refine`). Each formula is here once.

    kind    label of the losses                                  extra loss                 state in checkpoints
    adr     q = l softmax(z_t / T) + (1 - l) y, t the EMA                                   none but the EMA
    te      y                                                    w / K ||p' - h / |h| ||^2  h <- m h + (1 - m) p
    sglr    h <- m h + (1 - m) (n p + (1 - n) p')                                           h, at first y
    scores  y                                                                               h <- h + s log p, at first y
    noilin  y, to another class with probability r                                          r, last accuracies

h is one row of probabilities per training image, on every rank the same; p and p' are predictions of x and x'.
docs/objectives.md has the sources and their constants.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.losses import label_probabilities, upcast

# Kind -> the families of objectives that it is defined for: ADR and NoiLIn only exchange labels, but ADR's are soft, and MART
# needs hard ones; TE and SGLR name the adversarial prediction that they use.
KINDS: dict[str, tuple[str, ...]] = {
    "none": ("natural", "at", "trades", "mart"),
    "adr": ("natural", "at", "trades"),
    "te": ("at", "trades"),
    "sglr": ("at",),
    "scores": ("natural",),
    "noilin": ("natural", "at", "trades", "mart"),
}
REMEMBERING = ("te", "sglr", "scores")  # they keep a row of numbers for every training image
_CONSTANTS_OF = {"momentum": ("te", "sglr")}  # of the fields whose name does not begin with their kind


@dataclass(frozen=True)
class RefineSpec:
    """Which labels training uses instead of the given ones; fractions of training count whole epochs.

    Raises:
        UserError: a value is unknown or out of range, or a constant is of another kind.
    """

    # `adr`: of the EMA's tempered prediction and the label; `te`: also a distance to the mean prediction of each image so far;
    # `sglr`: that mean itself; `noilin`: the label, changed at random at a rate that follows validation; `scores`: the label,
    # while what the label noise `badlabel` needs is recorded; `none`.
    kind: str = "none"
    momentum: float = 0.9  # of the mean predictions of `te` and `sglr`
    adr_temperature_first: float = 2.5  # T of the EMA's prediction at the first step of training
    adr_temperature_last: float = 2.0  # T at its end, along half a cosine
    adr_share_first: float = 0.7  # share l of the EMA's prediction in the label at the first step
    adr_share_last: float = 0.95  # l at the end, along half a cosine
    te_start: float = 0.45  # fraction of training at which the mean predictions begin (epoch 90 of 200)
    te_full: float = 0.75  # fraction of training at which the weight has grown to `te_weight` (epoch 150 of 200)
    te_weight: float = 300.0  # w, of the squared distance of probabilities, a mean over the classes
    sglr_start: float = 0.45  # fraction of training at which the labels are refined (epoch 90 of 200)
    sglr_natural: float = 0.2  # n, the share of the natural prediction; the adversarial one has the rest
    scores_step: float = 0.1  # s, of the logarithm of each epoch's prediction
    noilin_first: float = 0.05  # r at the beginning
    noilin_most: float = 0.6  # the largest r; the code for TRADES has 0.4
    # r grows by this fraction when the mean robust accuracy of the last `noilin_window` validations falls.
    noilin_growth: float = 0.05
    noilin_window: int = 10  # validations in that mean
    noilin_half: float = 0.76  # fraction of training in which r is at most half of `noilin_most` (91 epochs of 120)

    def __post_init__(self) -> None:
        check_choice("objective.refine.kind", self.kind, KINDS)
        for field in dataclasses.fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            owners = _CONSTANTS_OF.get(name, (name.partition("_")[0],))
            if value != field.default and self.kind not in owners:
                what = f"objective.refine.{name} is {value}, but objective.refine.kind is '{self.kind}'"
                raise UserError(f"{what}. Choose objective.refine.kind={owners[0]}, or remove the key.")
            if name.startswith("adr_temperature") or name == "te_weight":
                check_value(f"objective.refine.{name}", value, 0 < value < math.inf, "finite and greater than 0")
            elif name == "noilin_window":
                check_value(f"objective.refine.{name}", value, value >= 1, "at least 1")
            elif name == "momentum":  # with 1 nothing would be remembered
                check_value(f"objective.refine.{name}", value, 0 <= value < 1, "in [0, 1)")
            elif name in ("noilin_first", "scores_step"):  # r grows by a factor: from 0 it would stay there
                check_value(f"objective.refine.{name}", value, 0 < value <= 1, "in (0, 1]")
            else:
                check_value(f"objective.refine.{name}", value, 0 <= value <= 1, "in [0, 1]")
        if self.kind == "te" and self.te_full <= self.te_start:
            raise UserError(f"objective.refine.te_full is {self.te_full}; it must be above te_start {self.te_start}.")
        if self.kind == "noilin" and self.noilin_most < self.noilin_first:
            raise UserError(
                f"objective.refine.noilin_most is {self.noilin_most}, below noilin_first {self.noilin_first}."
            )

    def check_objective(self, name: str, family: str, losses: tuple[str, str], smoothing: float) -> None:
        """Raise `UserError` if the objective called `name` has no such refinement; `losses` are its divergence and inner loss."""
        key = f"objective.refine.kind is '{self.kind}'"
        if family not in KINDS[self.kind]:
            *others, last = [kind for kind, families in KINDS.items() if family in families]
            known = f"{', '.join(others)} or {last}"
            raise UserError(f"{key}, which the family '{family}' of {name} does not have. Use {known}.")
        if self.kind in ("adr", "noilin") and "ikl" in losses:
            raise UserError(f"{key}, but IKL weighs by the given label, which it replaces. Choose another divergence.")
        if self.kind in ("adr", "sglr") and smoothing:
            raise UserError(f"{key}, which softens labels; set objective.smoothing=0 instead of {smoothing}.")

    def check_recipe(self, *, ema_decay: float, cutmix: float, awp_gamma: float) -> None:
        """Raise `UserError` if another section of the recipe contradicts it."""
        key = f"objective.refine.kind is '{self.kind}'"
        if self.kind == "adr" and not ema_decay:
            raise UserError(f"{key}, whose teacher is the EMA, but ema.decay is 0. Set ema.decay=0.995.")
        if self.kind != "none" and cutmix:
            raise UserError(f"{key}, which is not defined for mixed images. Set data.augment.cutmix=0.")
        if self.kind == "sglr" and awp_gamma:
            raise UserError(f"{key}, which is not published with weight perturbation. Set awp.gamma=0.")

    def te_weight_at(self, done: float) -> float:
        """The weight of TE's term in an epoch that ends when the fraction `done` of training is done: w exp(-5 (1 - t)^2).

        t goes from 0 at `te_start` to 1 at `te_full` (Laine and Aila 2017).
        """
        if done < self.te_start:
            return 0.0
        left = max(0.0, (self.te_full - done) / (self.te_full - self.te_start))
        return self.te_weight * math.exp(-5 * left * left)

    def starts_by(self, done: float) -> bool:
        """Whether predictions are remembered in an epoch that ends when the fraction `done` of training is done."""
        return self.kind in REMEMBERING and done >= {"te": self.te_start, "sglr": self.sglr_start}.get(self.kind, 0.0)


def cosine(first: float, last: float, progress: float) -> float:
    """From `first` at `progress` 0 to `last` at 1, along half a cosine."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))


def rectified_labels(teacher: Tensor, y: Tensor, temperature: float, share: float) -> Tensor:
    """ADR's labels [B, K] (Wu et al. 2024): l softmax(z_t / T) + (1 - l) onehot.

    l is `share` less the amount by which the teacher's largest probability exceeds that of the label, within [0, 1], so that
    the label keeps the largest probability wherever `share` allows it.

    Args:
        teacher: logits [B, K] of the EMA.
        y: int64 [B].
    """
    p = (upcast(teacher) / temperature).softmax(1)
    own = share - (p.amax(1) - p.gather(1, y[:, None]).squeeze(1))
    own = own.clamp(0.0, 1.0)[:, None]
    return own * p + (1 - own) * label_probabilities(y, p)


def changed_labels(y: Tensor, draws: Tensor, shifts: Tensor, rate: Tensor | float, num_classes: int) -> Tensor:
    """int64 [B]: NoiLIn's labels, `y` or, where `draws` (uniform in [0, 1), [B]) is below `rate`, another class.

    `shifts`: int64 [B] in 1 .. K - 1, uniform: how far the other class is.
    """
    return torch.where(draws < rate, (y + shifts) % num_classes, y)


def ensemble_distance(logits: Tensor, history: Tensor) -> Tensor:
    """[B]: the mean over classes of (p_k - h_k)^2, `history` the mean predictions h [B, K] (Dong et al. 2022)."""
    return (upcast(logits).softmax(1) - history).square().mean(1)


class LabelRefinement(nn.Module):
    """What a `RefineSpec` remembers, in buffers, which belong in checkpoints.

    Args:
        num_classes: K.
        num_images: N, the images of all sources; None if nothing is trained.
    """

    history: Tensor | None  # float32 [N, K], zero for images that no epoch has seen
    rate: Tensor | None  # float64 scalar: NoiLIn's present rate
    accuracies: Tensor | None  # float64 [window]: robust accuracies of the last validations
    validations: Tensor | None  # int64 scalar: their number

    def __init__(self, spec: RefineSpec, num_classes: int | None = None, num_images: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        remembers = spec.kind in REMEMBERING and num_classes is not None and num_images is not None
        injects, empty = spec.kind == "noilin", dict.fromkeys(("history", "rate", "accuracies", "validations"))
        buffers: dict[str, Any] = dict(empty)
        if remembers:
            buffers["history"] = torch.zeros(num_images or 0, num_classes or 0)
        if injects:
            buffers["rate"] = torch.tensor(spec.noilin_first, dtype=torch.float64)
            buffers["accuracies"] = torch.zeros(spec.noilin_window, dtype=torch.float64)
            buffers["validations"] = torch.zeros((), dtype=torch.int64)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def rows(self, images: Tensor, y: Tensor) -> Tensor:
        """float32 [B, K]: what is remembered of the images numbered `images`; but for TE it begins with their labels `y`."""
        assert self.history is not None
        rows = self.history[images]
        if self.spec.kind == "te":
            return rows
        return torch.where((rows == 0).all(1, keepdim=True), label_probabilities(y, rows), rows)

    @torch.no_grad()
    def updated(self, rows: Tensor, logits: Tensor, logits_adv: Tensor | None = None) -> Tensor:
        """`rows` after the predictions of a step: of natural images; for SGLR of adversarial ones too."""
        p, spec = upcast(logits).softmax(1), self.spec
        if spec.kind == "scores":
            return rows + spec.scores_step * upcast(logits).log_softmax(1).to(rows.dtype)
        if logits_adv is not None:
            p = spec.sglr_natural * p + (1 - spec.sglr_natural) * upcast(logits_adv).softmax(1)
        return spec.momentum * rows + (1 - spec.momentum) * p.to(rows.dtype)

    @torch.no_grad()
    def remember(self, images: Tensor, rows: Tensor, gather: Callable[[Any], Any] = lambda pair: pair) -> None:
        """Store `rows` [B, K] of the images numbered `images` [B]; `gather` concatenates a pair of tensors over ranks.

        An image that is twice in the global batch keeps the row of its first place, on any device and number of ranks.
        """
        assert self.history is not None
        images, rows = gather((images, rows))
        first = (images[:, None] == images[None, :]).int().argmax(1)
        self.history[images] = rows[first]

    @torch.no_grad()
    def validated(self, accuracy: float, done: float) -> None:
        """NoiLIn's rate after a validation with this robust accuracy (a fraction), the fraction `done` of training done."""
        if self.rate is None or self.accuracies is None or self.validations is None or not math.isfinite(accuracy):
            return
        spec, before = self.spec, float(self.accuracies.sum())
        self.accuracies[int(self.validations) % spec.noilin_window] = accuracy
        self.validations += 1
        rate = float(self.rate)
        if before > float(self.accuracies.sum()):
            rate = min(rate * (1 + spec.noilin_growth), spec.noilin_most)
        self.rate.fill_(min(rate, spec.noilin_most / 2) if done <= spec.noilin_half else rate)
