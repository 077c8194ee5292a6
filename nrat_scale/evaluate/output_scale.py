"""Whether the scale of a model's output weakens attacks on the cross-entropy.

Softmax at the output, a temperature and saturated float32 arithmetic change neither predictions nor robustness, but they
take the gradient from the cross-entropy (Carlini and Wagner 2017, arXiv:1608.04644; Croce and Hein 2020, arXiv:2003.01690).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.probe import Probe, gradient, paired_gain
from nrat_scale.evaluate.statistics import wilson

_VANISHED = torch.finfo(torch.float32).tiny  # a smaller gradient of a pixel is 0, or soon becomes 0
_VANISHED_SHARE = 0.1  # share of images with a vanished gradient, above which the model is flagged
_SATURATED = 16.6  # margin above which the float32 probability of the class is 1
_MARGIN = 10.0  # median margin to which logits are rescaled: trained models have about 1 to 20
_GAIN = 0.2  # gain in units of the median margin by an attack on rescaled logits, above which the model is flagged
_SATURATED_GAIN = 0.08  # the same if most images are saturated; sound models reach 0.07
_ERRORS = 3.0
_CONFIDENCE = 0.1  # of the way from chance to accuracy, which the mean confidence of sound models exceeds


def check_output_scale(probe: Probe, what: str) -> tuple[dict[str, float], list[str]]:
    """Numbers and at most one flag.

    Raises:
        UserError: gradients of the cross-entropy are not finite.
    """
    right = probe.right
    if not bool(right.any()):
        return {}, probability_flags(probe.logits)
    x, y = probe.x[right], probe.y[right]
    found = gradient(lambda x: F.cross_entropy(probe.model(x), y, reduction="none"), x)
    if not bool(found.isfinite().all()):
        raise UserError(f"{what} has gradients that are not finite: gradient-based attacks cannot work.")
    vanished = int((found.abs().flatten(1).amax(1) < _VANISHED).sum())
    gain, error = _rescaled_gain(probe)
    numbers = {"median_margin": probe.scale, "vanished": vanished / len(x), "rescaled_gain": gain}
    flags = probability_flags(probe.logits)
    if not flags and vanished > max(1, _VANISHED_SHARE * len(x)):
        flags = [
            f"The gradient of the cross-entropy vanishes on {100 * vanished / len(x):.0f} % of {len(x)} correctly classified "
            "images: attacks that follow it (FGSM, PGD) underestimate the vulnerability. If the logits are large (their "
            f"median margin is {probe.scale:.3g}), divide them by a constant; rely on the margin loss (CW) and on Square."
        ]
    saturated = float((probe.logits.amax(1) - probe.logits.topk(2)[0][:, 1] > _SATURATED).float().mean())
    least = _SATURATED_GAIN if saturated > 0.5 else _GAIN
    if not flags and gain > least and gain > _ERRORS * error:
        flags = [
            f"The scale of the output weakens the cross-entropy: on logits divided by {probe.scale / _MARGIN:.3g} PGD "
            f"raises the margin by {100 * gain:.0f} % of its median. Evaluate the model with its logits divided by that "
            "constant, which changes no prediction, or rely on attacks that do not depend on the scale (CW, AutoAttack)."
        ]
    return numbers, flags or _underconfident(probe, numbers)


def probability_flags(logits: Tensor) -> list[str]:
    """A flag if the outputs are probabilities, or a multiple of them, or all in [0, 1]."""
    total, spread = logits.sum(1), float(logits.amax() - logits.amin())
    constant = bool(((total - total.mean()).abs() < 1e-3 * spread).all())
    normalised = constant and (abs(float(total.mean()) - 1) < 1e-3 or spread > 0.5)
    within = bool((logits <= 1).all()) and spread > 0.5
    # A constant that is added to probabilities hides their sum, and not their gradients.
    moved = logits - (total[:, None] - 1) / logits.shape[1]
    shifted = constant and bool((moved >= -1e-4).all()) and float(moved.amax()) > 0.5
    if not shifted and (not bool((logits >= 0).all()) or not (normalised or within)):
        return []
    return [
        "The model returns probabilities instead of logits: their gradients vanish for confident predictions, and "
        "attacks become weak. Remove the softmax or sigmoid."
    ]


def _rescaled_gain(probe: Probe) -> tuple[float, float]:
    """How much larger margins get by PGD on rescaled logits than by PGD as it is, and the paired standard error."""

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, probe.y, reduction="none")

    right, factor = probe.right, _MARGIN / probe.scale
    plain = probe.attacked(loss)
    rescaled = probe.attacked(lambda logits: loss(logits * factor))
    # The unit is the scale of correct predictions, so that a misclassified image counts no more than it must.
    return paired_gain(plain[right] / probe.scale, rescaled[right] / probe.scale)


def _underconfident(probe: Probe, numbers: dict[str, float]) -> list[str]:
    """A flag if the probabilities are almost uniform although predictions are right: a high temperature."""
    n, chance, correct = len(probe.y), 1 / probe.logits.shape[1], int(probe.right.sum())
    confidence = float(probe.logits.softmax(1).amax(1).mean())
    numbers["confidence"] = confidence
    if wilson(correct, n)[0] <= chance + 0.1 or (confidence - chance) >= _CONFIDENCE * (correct / n - chance):
        return []
    return [
        f"The mean confidence is {100 * confidence:.1f} % at an accuracy of {100 * correct / n:.0f} % on {n} images, as if "
        "the logits were divided by a temperature or bounded: the cross-entropy hardly depends on the prediction, and PGD on "
        "it is weak. Remove the temperature, or rely on attacks that do not depend on the scale (CW, AutoAttack)."
    ]
