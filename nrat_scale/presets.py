"""Objectives as data: `ObjectiveSpec`, and in `OBJECTIVES` the published combinations of losses and divergences.

`nrat_scale.objectives` computes them and has their mathematics.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean
from nrat_scale.label_refinement import RefineSpec
from nrat_scale.losses import DIVERGENCES, LOSSES

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
