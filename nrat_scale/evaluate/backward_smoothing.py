"""A gradient that passes through the flat places of a network, for attacks that ask whether they hide something.

Sparsifying activations (MeanSparse, Amini et al. 2024, arXiv:2406.05927), thresholds and quantisers are constant almost
everywhere or around a mean, where their derivative is zero. BPDA (Athalye et al. 2018, arXiv:1802.00420) keeps their
forward pass and differentiates the identity instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nrat_scale.attacks import Map
from nrat_scale.evaluate.attacks import margin
from nrat_scale.evaluate.probe import Probe, paired_gain

_GAIN = 0.03  # smallest gain in units of the median margin; on sound networks the smoothed attack is the weaker one
_ERRORS = 3.0
# Nodes of autograd's graph whose derivative is zero on an interval. ReLU and clamps are not among them: they are
# monotone, and their flat part lies at an end of their domain.
_FLAT = (
    *("Where", "MaskedFill", "MaskedScatter", "IndexPut", "Threshold", "Hardshrink", "Softshrink"),
    *("Round", "Floor", "Ceil", "Trunc", "Sign"),
)


def smoothed_attack(probe: Probe) -> tuple[dict[str, float], list[str]]:
    """Compare a short attack on the margin with the same one that passes through flat places: numbers and flags.

    Returns nothing if the graph of the model has no flat places.
    """
    if not has_flat_places(probe.model, probe.x[:1]):
        return {}, []

    def loss(logits: Tensor) -> Tensor:
        return margin(logits, probe.y)

    right = probe.right
    plain = probe.attacked(loss)[right] / probe.scale
    smooth = probe.attacked(loss, smoothed(probe.model))[right] / probe.scale
    gain, error = paired_gain(plain, smooth)
    broken = [int((margins > 0).sum()) for margins in (plain, smooth)]
    numbers = {"smoothed_gain": gain, "plain_broken": broken[0], "smoothed_broken": broken[1]}
    if gain <= _GAIN or gain <= _ERRORS * error:
        return numbers, []
    return numbers, [
        "The model has activations that are flat on an interval (sparsifying, thresholded or quantised), where gradients "
        f"vanish. An attack whose backward pass takes them for the identity raises the margin by {100 * gain:.0f} % of its "
        f"median and breaks {broken[1]} of {len(plain)} images instead of {broken[0]}. Attack with such a backward pass "
        "(BPDA); PGD and AutoAttack give too high an accuracy."
    ]


def has_flat_places(model: Map, x: Tensor) -> bool:
    """Whether the autograd graph of model(x) has a node that `smoothed` changes."""
    with torch.enable_grad():
        logits = model(x.detach().requires_grad_())
    return any(_is_flat(node) for node in _nodes(logits.grad_fn))


def smoothed(model: Map | nn.Module) -> Map:
    """The same function, whose backward pass replaces the derivative of each flat operation by the identity."""

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        for node in _nodes(logits.grad_fn):
            if _is_flat(node):
                node.register_hook(_pass_through)
        return logits

    return forward


def _pass_through(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    outer = outputs[0]
    same = [outer is not None and value is not None and value.shape == outer.shape for value in inputs]
    return tuple(outer if replaced else value for value, replaced in zip(inputs, same, strict=True))


def _nodes(root: torch.autograd.graph.Node | None) -> list[torch.autograd.graph.Node]:
    """All nodes of a graph."""
    seen, waiting = dict[torch.autograd.graph.Node, None](), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            waiting += [following for following, _ in node.next_functions]
    return list(seen)


def _is_flat(node: torch.autograd.graph.Node) -> bool:
    name = node.name().rpartition("Backward")[0]
    if name == "Mul":
        return any(_is_mask(getattr(node, saved, None)) for saved in ("_saved_self", "_saved_other"))
    # A Python function may have any derivative; the hook replaces it if input and output have the same shape.
    return name in _FLAT or isinstance(node, torch.autograd.function.BackwardCFunction)


def _is_mask(factor: Tensor | None) -> bool:
    """Whether a factor is a mask of zeros and ones."""
    if factor is None or factor.requires_grad or factor.numel() < 2:
        return False
    return bool(((factor == 0) | (factor == 1)).all()) and bool((factor == 0).any())
