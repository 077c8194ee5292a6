"""A model whose forward and backward passes are CUDA graphs, for attacks that wait for the launches of small batches.

AutoAttack drops images as it breaks them, so its batches have every size. A batch is padded with zeros to the next of `BUCKETS`,
and each bucket is captured once. Attacks differentiate a call once, so the backward graph repeats the forward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.core.graphs import Capture, GraphedCall, Tensors, capture_cuda, relative_difference

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # batch sizes; a larger batch is launched as it is
_SLACK = 1e-4  # relative difference of logits or gradients


class GraphedModel(nn.Module):
    """`model` for attacks: maps images [B, C, H, W] to logits [B, K], differentiable once with respect to the images.

    Args:
        model: in evaluation mode, with frozen parameters or without; no logit depends on the other images of a batch.
        capture: makes a graph; tests on a CPU replace it.
    """

    def __init__(self, model: nn.Module, capture: Capture = capture_cuda) -> None:
        super().__init__()
        self.model = model.eval()
        self.eval()
        for name in ("mean", "std"):  # for threat.space
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        tensors = [*model.parameters(), *model.buffers()]

        def close(plain: Tensors, graphed: Tensors) -> str:
            return "" if relative_difference(plain[0], graphed[0]) <= _SLACK else "its results differ"

        options: dict[str, Any] = {"reads": lambda: tensors, "close": close, "enabled": True, "capture": capture}
        self.logits = GraphedCall("forward pass", self._logits, **options)
        self.gradient = GraphedCall("backward pass", self._gradient, **options)

    def _logits(self, x: Tensor) -> Tensors:
        with torch.no_grad():
            return (self.model(x),)

    def _gradient(self, x: Tensor, grad_logits: Tensor) -> Tensors:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.model(x), x, grad_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K]."""
        if len(x) > BUCKETS[-1]:
            return self.model(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Differentiable.apply(x, self)
        return self.logits(_padded(x))[0][: len(x)]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graphed: GraphedModel) -> Tensor:
        padded = _padded(x.detach())
        ctx.graphed = graphed
        ctx.save_for_backward(padded)
        return graphed.logits(padded)[0][: len(x)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, None]:
        (padded,) = ctx.saved_tensors
        (gradient,) = ctx.graphed.gradient(padded, _padded(grad_logits))
        return gradient[: len(grad_logits)], None


def _padded(x: Tensor) -> Tensor:
    """`x` [B, ...] with zeros up to the next bucket."""
    size = next(size for size in BUCKETS if size >= len(x))
    return x.contiguous() if size == len(x) else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
