"""Whether a model's gradients are those of the function that it computes, and whether following them helps an attack.

The checks are those that Carlini et al. 2019 (arXiv:1902.06705, section 3) and Athalye et al. 2018 (arXiv:1802.00420,
section 3.1) recommend. Each compares a number of the model with a threshold that sound models keep by a wide margin.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nrat_scale.attacks import ThreatSpec, search
from nrat_scale.evaluate.attacks import margin
from nrat_scale.evaluate.probe import Probe, gradient
from nrat_scale.evaluate.statistics import wilson

_DIRECTIONS = 8  # random directions of the finite differences
_DIFFERENCE = 1e-3  # half the step of the finite differences, per pixel
_ROUNDING = 1e-4  # a smaller change, relative to the logits, may be a rounding error of float32
_COSINE = 0.8  # sound models: above 0.95
_POINTS = 16  # of a straight path through the ball
_ROUGHNESS = 0.5  # sound models: below 0.3; noise: about 1.6
_RANDOM_SIGNS = 4
_BETTER = 0.9  # share of images on which the gradient's sign must beat random signs; sound models: above 0.95
_UNBOUNDED = ThreatSpec(eps=0.999, step=0.05, num_steps=5, init="zero")
_ROUNDS = 8
_SURVIVORS = 0.5  # share that may survive the unbounded attack: sound models 0, small ones with plateaus up to 0.2


def check_gradients(probe: Probe) -> tuple[dict[str, float], list[str]]:
    """Numbers and flags: continuity and direction, and if they hold, whether the direction helps an attack.

    A model that fails the first two fails the others for the same reason, which one flag explains better than four.
    """
    cosine, rough = gradient_cosine(probe), roughness(probe)
    better, tried = beats_random_signs(probe)
    survivors, attacked = unbounded_survivors(probe)
    numbers = {"gradient_cosine": cosine, "roughness": rough}
    numbers |= {"beats_random_signs": better / tried} if tried else {}
    numbers |= {"unbounded_accuracy": survivors / attacked} if attacked else {}
    if rough > _ROUGHNESS:
        return numbers, [
            f"The output jumps where the image hardly changes (roughness {rough:.2f}; sound models have less than 0.3): noise "
            "that is a function of the image, or an activation that is quantised, sparsified or thresholded. Gradients do "
            "not describe such a function, and attacks that follow them, AutoAttack included, give too high an accuracy. "
            "Remove the noise or the threshold, or differentiate it as the identity (BPDA) and average over the noise."
        ]
    if cosine < _COSINE:
        return numbers, [
            f"The gradient is not the derivative of the output: its cosine with finite differences is {cosine:.2f} (sound "
            "models have more than 0.95). A custom backward pass replaces it. Evaluate with the true gradient; until then "
            "only attacks without gradients (Square) and transfer attacks mean something."
        ]
    if tried and wilson(better, tried)[1] < _BETTER:
        return numbers, [
            f"Following the sign of the gradient raises the loss more than random signs do on {better} of {tried} images only "
            "(sound models: almost all). The gradients are masked. Rely on Square, on transfer attacks and on an attack that "
            "is adapted to the model."
        ]
    if survivors > max(1, _SURVIVORS * attacked):
        return numbers, [
            f"An attack of unbounded radius leaves {survivors} of {attacked} images correctly classified, although it may turn "
            "any image into any other. The gradients are masked. Rely on Square, on transfer attacks and on an attack that "
            "is adapted to the model."
        ]
    return numbers, []


def gradient_cosine(probe: Probe) -> float:
    """The median cosine between gradient and finite differences of the margin, over images with a gradient; 1 for none.

    In random directions of signs d, the correlation of <gradient, d> with the central difference of the function is an
    estimate of the cosine between the gradient and the derivative.
    """
    x = _inside(probe, _DIFFERENCE)
    with torch.no_grad():
        logits = probe.model(x)
    others = logits.scatter(1, probe.y[:, None], -math.inf).argmax(1)

    def difference(x: Tensor) -> Tensor:  # to a fixed class, because the margin has a kink where the classes change
        logits = probe.model(x).double()
        return (logits.gather(1, others[:, None]) - logits.gather(1, probe.y[:, None])).squeeze(1)

    found = gradient(difference, x).double()
    predicted, observed = [], []
    with torch.no_grad():
        for number in range(_DIRECTIONS):
            signs = probe.signs("direction", number)
            predicted.append((found * signs).flatten(1).sum(1))
            observed.append(difference(x + _DIFFERENCE * signs) - difference(x - _DIFFERENCE * signs))
    one, other = 2 * _DIFFERENCE * torch.stack(predicted), torch.stack(observed)
    lengths = one.norm(dim=0) * other.norm(dim=0)
    measurable = torch.maximum(one.norm(dim=0), other.norm(dim=0)) > _ROUNDING * logits.abs().amax(1)
    measurable &= one.norm(dim=0) > 0
    if not bool(measurable.any()):
        return 1.0
    cosines = (one * other).sum(0) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    return float(cosines[measurable].median())


def roughness(probe: Probe) -> float:
    """How much the logits jump along straight paths: the sum of |second differences| over that of |first differences|.

    0 for a linear function, 1.6 for independent noise at each point. The median over images, and the larger of a path
    through the ball and of one an eighth as long.
    """
    return max(_path_roughness(probe, length) for length in (min(probe.radius, 32 / 255), probe.radius / 8))


def _path_roughness(probe: Probe, length: float) -> float:
    x, signs = _inside(probe, length), probe.signs("path")
    with torch.no_grad():
        path = torch.stack([probe.model(x + length * k / _POINTS * signs).double() for k in range(_POINTS + 1)])
    first = path[1:] - path[:-1]
    second = first[1:] - first[:-1]
    total = first.norm(dim=2).sum(0)
    moving = total > _POINTS * _ROUNDING * path.abs().amax((0, 2))
    if not bool(moving.any()):
        return 0.0
    return float((second.norm(dim=2).sum(0) / total)[moving].median())


def _inside(probe: Probe, length: float) -> Tensor:
    """A random point of each image's ball, far enough from 0 and 1 that a step of `length` does not leave [0, 1].

    Points off the grid of bytes, because a function of rounded pixels is constant around images from files.
    """
    return (probe.x + probe.radius * probe.uniform("start")).clamp(length, 1 - length)


def beats_random_signs(probe: Probe) -> tuple[int, int]:
    """On how many of the correctly classified images with a gradient its sign raises the margin more than random signs do.

    The sign of the cross-entropy's gradient, at the radius and at a quarter of it, against the mean of random signs.

    Returns:
        That number, and the number of the images.
    """
    direction = gradient(lambda x: F.cross_entropy(probe.model(x), probe.y, reduction="none"), probe.x)
    counted = probe.right & (direction.flatten(1).abs().amax(1) > 0)

    def raised(signs: Tensor) -> Tensor:
        lengths = (probe.radius / 4, probe.radius)
        return torch.stack([probe.margins((probe.x + r * signs).clamp(0, 1)) for r in lengths]).amax(0)

    random = torch.stack([raised(probe.signs("random", number)) for number in range(_RANDOM_SIGNS)]).mean(0)
    better = raised(direction.sign()) > random
    return int((better & counted).sum()), int(counted.sum())


def unbounded_survivors(probe: Probe) -> tuple[int, int]:
    """How many of the correctly classified images survive an l_inf attack on the margin whose radius is the pixel range.

    The attack starts at the image itself: random starts in so large a ball are noise, which breaks images without gradients.
    Images that survive are attacked again from noise of half the range.

    Returns:
        That number, and the number of the images.
    """
    x, y = probe.x[probe.right], probe.y[probe.right]
    x_adv, attacked = x, len(x)
    noise = probe.uniform("unbounded")[probe.right] / 2
    for number in range(2 * _ROUNDS):
        if not len(x):
            break
        if number == _ROUNDS:  # small networks have plateaus that no gradient leaves: leave them by noise
            x_adv = (x + noise).clamp(0, 1)

        def loss(logits: Tensor, y: Tensor = y) -> Tensor:
            return margin(logits, y)

        x_adv = search(probe.model, x, loss, _UNBOUNDED, x_adv).x_adv
        with torch.no_grad():
            alive = probe.model(x_adv).argmax(1) == y
        x, y, x_adv, noise = x[alive], y[alive], x_adv[alive], noise[alive]
    return len(x), attacked
