"""Refuse evaluations that would be meaningless, and flag doubtful ones with a sentence.

The checks follow Carlini et al. 2019 (arXiv:1902.06705) and Croce et al. 2022 (arXiv:2202.13711).
"""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nrat_scale.attacks import RELEASED_CODE_WARNING, ThreatSpec, short_reach
from nrat_scale.core.errors import UserError
from nrat_scale.core.float32 import exact_float32
from nrat_scale.core.modes import frozen
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.attacks import Attack, attack_title, parse_attack
from nrat_scale.evaluate.autoattack import STANDARD
from nrat_scale.evaluate.backward_smoothing import smoothed_attack
from nrat_scale.evaluate.differentiable import differ, logits_without_gradient, without_gradient
from nrat_scale.evaluate.gaps import attack_gaps
from nrat_scale.evaluate.gradient_checks import check_gradients
from nrat_scale.evaluate.measures import Images
from nrat_scale.evaluate.output_scale import check_output_scale, probability_flags
from nrat_scale.evaluate.probe import PROBED_IMAGES, Probe
from nrat_scale.evaluate.results import Outcome
from nrat_scale.evaluate.statistics import Paired, beyond_chance, paired, wilson

_CONVERGED = 0.03  # a larger drop in accuracy by more steps or restarts means that fewer had not converged
_ITERATED_GAIN = (
    0.01  # of the images that FGSM breaks: PGD breaks more than that in addition, unless gradients are masked
)
_FEW_RECOGNISED = 0.5  # a smaller natural accuracy of a foreign model may be due to another normalisation
_SQUARE_SHARE = 0.002  # of all images: the threshold of AutoAttack's own check
_SAME_LOSS = {"apgd-ce": ("pgd", "fgsm"), "apgd-dlr": ("cw",), "apgd-t": ("cw",)}  # component -> kinds of attack
_APGD_STEPS = 100
_FEWEST_FOR_CONSTANT = 16  # images: fewer may have one predicted class by chance


@dataclass(frozen=True)
class ModelCheck:
    """The flags of a model, and the numbers behind them, which results.json records."""

    flags: list[str]
    numbers: dict[str, float]


def check_model(
    model: nn.Module, images: Images, threat: ThreatSpec, what: str, *, follows_gradient: bool = True
) -> list[str]:
    """The flags of `inspect_model`."""
    return inspect_model(model, images, threat, what, follows_gradient=follows_gradient).flags


def inspect_model(
    model: nn.Module,
    images: Images,
    threat: ThreatSpec,
    what: str,
    *,
    follows_gradient: bool = True,
    attacked: bool = True,
) -> ModelCheck:
    """Refuse a model that cannot be measured; look for masked gradients in one that can.

    Args:
        images: a few of the evaluated ones.
        what: names the model in errors.
        follows_gradient: whether an attack will follow the model's gradient; if not, it may have none.
        attacked: whether there will be an attack; if not, masking is not looked for, which costs most of the check.

    Raises:
        UserError: a module is in training mode, logits are not finite or not [B, K], the logits of an image change between
            calls or with the other images of the batch, gradients are not finite, or there are none.
    """
    for name, module in model.named_modules():
        if module.training:
            raise UserError(f"{what} is in training mode ({name or 'the model itself'}). Call model.eval() first.")
    device = next(model.parameters()).device
    x, y = to_float(images.pixels.to(device)), images.labels.to(device)
    with torch.no_grad():
        logits = model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(f"{what} gives {shape} for {len(x)} images; expected logits [{len(x)}, classes].")
        again = model(x)
        alone = torch.cat([model(x[:1]), model(x[1:])]) if len(x) > 1 else logits
    if not bool(logits.isfinite().all()):
        raise UserError(f"{what} gives logits that are not finite: its accuracy would be meaningless.")
    if differ(logits, again):
        reason = "Attacks on the expectation of a randomised model (AutoAttack's 'rand') are not available."
        raise UserError(f"{what} gives different logits for the same images. {reason}")
    if differ(logits, alone):
        way_out = "If its BatchNorm uses batch statistics, evaluate it with running statistics."
        raise UserError(f"The logits of {what} depend on the other images of the batch. {way_out}")
    flags = [] if threat.space == "pixel" else [RELEASED_CODE_WARNING]
    if not attacked:
        return ModelCheck([*flags, *probability_flags(logits.float())], {})
    if (sentence := without_gradient(model, x, what)) is not None:
        if follows_gradient:
            raise UserError(sentence)
        upper = f"{sentence} Accuracies under Square and transferred attacks are upper bounds."
        return ModelCheck([*flags, *probability_flags(logits.float()), upper], {})
    dead = logits_without_gradient(model, x)
    check = look_for_masking(model, x[:PROBED_IMAGES], y[:PROBED_IMAGES], threat, what)
    return replace(check, flags=[*flags, *dead, *(_constant(logits, y) or check.flags)])


def _constant(logits: Tensor, y: Tensor) -> list[str]:
    """A flag if one class is predicted for all images, which are of several: what looks like masking is that."""
    predicted, num_classes = logits.argmax(1).unique(), len(y.unique())
    if len(predicted) > 1 or num_classes == 1 or len(y) < _FEWEST_FOR_CONSTANT:
        return []
    return [
        f"The model predicts class {int(predicted)} for all {len(y)} images that were checked, which are of {num_classes} "
        "classes. No attack changes the prediction of such a model, so its accuracies say nothing about robustness. Its "
        "training collapsed or has hardly begun, or it expects images of another range."
    ]


def look_for_masking(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatSpec, what: str) -> ModelCheck:
    """Flags for an output whose scale hides gradients, for gradients that mislead, and for flat activations.

    Args:
        x: images [B, C, H, W] in [0, 1], on the device of the model.
        y: labels [B].

    Raises:
        UserError: gradients are not finite.
    """
    with exact_float32(), frozen(model):
        with torch.no_grad():
            logits = model(x).float()
        probe = Probe(model, x, y, logits, threat)
        numbers, scale = check_output_scale(probe, what)
        more, gradients = check_gradients(probe)
        smooth, flat = smoothed_attack(probe)
    # An output whose scale hides gradients fails the checks of the gradients, and one sentence tells more than two.
    return ModelCheck([*(scale or gradients), *flat], {"images": len(x), **numbers, **more, **smooth})


def short_reaches(entries: Mapping[str, Mapping[str, Any]], threat: ThreatSpec) -> list[str]:
    """Flags for gradient attacks whose steps cannot reach the surface of the ball.

    Args:
        entries: attack -> its entry in results.json, with `steps` and `step`.
        threat: for eps and norm.
    """
    flags = []
    for name, entry in entries.items():
        if entry.get("steps") and entry.get("step") is not None:
            taken = replace(threat, eps=entry.get("eps", threat.eps), step=entry["step"])
            if (problem := short_reach(taken, entry["steps"])) is not None:
                way_out = "Give a longer --step or more steps."
                flags.append(
                    f"{attack_title(name)} is too weak for its radius: {problem}. Its accuracy is too high. {way_out}"
                )
    return flags


def doubtful_normalisation(facts: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A flag if the model of a weight file has an assumed normalisation and recognises few images.

    Args:
        facts: of the checkpoint in results.json.
        entries: attack -> its entry there.
    """
    assumed, accuracy = facts.get("assumed_normalisation"), entries.get("natural", {}).get("accuracy")
    if not assumed or accuracy is None or accuracy >= _FEW_RECOGNISED:
        return []
    what = f"Natural accuracy is {100 * accuracy:.1f} %, with {assumed} assumed because the file has none"
    return [
        f"{what}. If the model was trained with another normalisation, give it with --mean and --std (0 and 1 for none)."
    ]


def contradictions(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Flags for outcomes of one model that cannot all be valid; differences that chance explains are none.

    Args:
        outcomes: by attack; without attacks that skipped images which others had broken.
    """
    attacks, flags = {}, []
    for name in outcomes:
        with suppress(UserError):  # skip attacks that only another version has
            attacks[name] = parse_attack(name)
    for strong, weak in itertools.permutations(attacks, 2):
        pair = paired(outcomes[strong], outcomes[weak])
        broken = _broken(outcomes[weak], outcomes.get("natural"), outcomes[strong][0])
        if pair.n and (why := _contradiction(attacks[strong], attacks[weak], pair, broken)):
            left, other = 100 * pair.right / pair.n, 100 * pair.other_right / pair.n
            seen = f"{left:.1f} % under {attack_title(strong)} and {other:.1f} % under {attack_title(weak)}"
            flags.append(f"On the same {pair.n} images accuracy is {seen}: {why}")
    return flags + attack_gaps(outcomes)


def _contradiction(strong: Attack, weak: Attack, pair: Paired, broken: int) -> str | None:
    """How the outcomes of `strong` and `weak`, in this order in `pair`, contradict each other; None if they do not.

    Args:
        broken: images that `weak` broke; 0 if unknown.
    """
    weaker = beyond_chance(pair.only_second_broke, pair.only_first_broke)
    if weaker and _is_stronger(strong, weak):
        return "the stronger attack broke fewer images, so it failed; AutoAttack's number is too high."
    if strong.kind == "pgd" and weak.kind == "fgsm" and pair.right > 0:
        # The images that PGD may break beyond FGSM's, at the upper end of the interval.
        gain = wilson(pair.only_first_broke, pair.n)[1] * pair.n - pair.only_second_broke
        if weaker or gain < _ITERATED_GAIN * broken:
            return "one step breaks as many images as an iterated attack: a sign of masked gradients."
    more_steps = strong.steps >= weak.steps and strong.restarts >= weak.restarts
    if strong.kind == weak.kind and strong.kind in ("pgd", "cw") and more_steps:
        drop = pair.other_right - pair.right
        if drop > _CONVERGED * pair.n and beyond_chance(pair.only_first_broke, pair.only_second_broke):
            return (
                "the shorter attack had not converged, and the longer one may not have either. Add steps and restarts."
            )
    return None


def _broken(outcome: Outcome, natural: Outcome | None, ids: np.ndarray) -> int:
    """How many of the images `ids` an attack broke that are classified correctly without one; 0 if unknown."""
    if natural is None:
        return 0
    rows = np.isin(outcome[0], ids)
    return paired((outcome[0][rows], outcome[1][rows]), natural).only_first_broke


def _is_stronger(strong: Attack, weak: Attack) -> bool:
    """Whether `strong` is AutoAttack, or parts of it, that should break what `weak` breaks.

    The standard version should break more than any gradient attack, and more parts more than fewer. Other parts should break
    more than a gradient attack on the same kind of loss with no more steps; FAB and Square alone may break less than PGD.
    """
    parts = set(strong.components)
    if weak.components:
        return parts > set(weak.components)
    if weak.steps == 0:
        return False
    same_loss = any(weak.kind in _SAME_LOSS.get(part, ()) for part in parts)
    return parts.issuperset(STANDARD) or (same_loss and weak.steps * weak.restarts <= _APGD_STEPS)


def square_warning(broken: Mapping[str, int], n: int) -> str | None:
    """AutoAttack's check of Square over all `n` images: it should not break many that the other components left.

    The authors' threshold is 0.2 % of a test set. At fewer images it also takes more of them than chance explains.

    Args:
        broken: component -> number of images that it was the first to break, in the order of the components.
    """
    if len(broken) < 2 or list(broken)[-1] != "square":  # Square alone or before others is no evidence against them
        return None
    count = broken["square"]
    if count <= _SQUARE_SHARE * n or not beyond_chance(count, 0):
        return None
    return (
        f"Square broke {count} of {n} images ({100 * count / n:.2f} %) that the other components did not break: gradients may "
        "be masked. Run Square with more queries and restarts, or an adaptive attack."
    )
