"""The attack model: a second module over the weights of the model in training, on which its attacks run.

It shares parameters and buffers, needs no gradient for any of them, and keeps the mode of the attack, so no mode is switched
during a step and torch.compile sees one graph. In evaluation mode BatchNorm is a constant affine map: behind a convolution it is
folded into the convolution's weights by `refresh`, before the attack of every step.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.core.errors import first_line
from nrat_scale.core.modes import BN_MODES, batchnorms


@dataclass(frozen=True)
class _Folded:
    """A convolution of the attack model, and the layers of the model that it replaces."""

    own: nn.Conv2d
    convolution: nn.Conv2d
    norm: _BatchNorm


class AttackModel:
    """The model as attacks run it. Create it before Accelerate or a compiler wraps the model's forward.

    Args:
        model: the bare module.
        bn: `eval`, or `batch`: batch statistics, running statistics unchanged.
        fold: fold BatchNorm into convolutions if `bn` is `eval`.

    Attributes:
        module: maps images to logits.
        forward: call this: `module`, or its compiled version.
        num_folded: number of folded BatchNorm layers.
        untraced: why torch.fx cannot trace the model, which prevents folding; None if it can, or was not tried.
    """

    def __init__(self, model: nn.Module, bn: str, *, fold: bool = True) -> None:
        assert bn in BN_MODES, bn
        shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        self.module: nn.Module = copy.deepcopy(model, shared)
        self.module.train(bn == "batch")
        self._folded: list[_Folded] = []
        self.untraced: str | None = None
        if bn == "batch":
            for layer in batchnorms(self.module):
                # In training mode a layer without tracking uses batch statistics and does not change its buffers.
                layer.track_running_stats = False
        elif fold:
            nodes, self.untraced = _traced(self.module)
            self._folded = [_fold(model, self.module, *names) for names in _foldable(self.module, nodes)]
        own_weights = {id(pair.own) for pair in self._folded}
        self._shared = [
            (theirs, own)
            for (_, theirs), (_, own) in zip(model.named_modules(), self.module.named_modules(), strict=True)
            if type(theirs) is type(own) and id(own) not in own_weights
        ]
        self.forward: Callable[[Tensor], Tensor] = self.module
        self.refresh()

    @property
    def num_folded(self) -> int:
        """Number of folded BatchNorm layers."""
        return len(self._folded)

    @torch.no_grad()
    def refresh(self) -> None:
        """Update to the model's current weights and running statistics."""
        for theirs, own in self._shared:
            # Re-alias parameters whose storage changed, e.g. because DistributedDataParallel re-allocated them.
            for name, parameter in theirs.named_parameters(recurse=False):
                shared = own.get_parameter(name)
                if shared.data_ptr() != parameter.data_ptr():
                    shared.data = parameter.data
            own._buffers.update(theirs._buffers)
        for pair in self._folded:
            norm, source = pair.norm, pair.convolution
            assert norm.running_mean is not None and norm.running_var is not None and pair.own.bias is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight
            torch.mul(source.weight, scale.view(-1, 1, 1, 1), out=pair.own.weight)
            shift = -norm.running_mean if source.bias is None else source.bias - norm.running_mean
            pair.own.bias.copy_(shift * scale if norm.bias is None else norm.bias + shift * scale)


class _LayerTracer(Tracer):
    """Treats BatchNorm layers of every kind as one operation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> tuple[list[Node], str | None]:
    """The operations of a forward pass; none and the reason if torch.fx cannot trace it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_LayerTracer().trace(module).nodes), None
    except Exception as error:  # torch.fx can fail in arbitrary ways on user models; attack the unfolded model then
        return [], first_line(error)


def _foldable(module: nn.Module, nodes: list[Node]) -> list[tuple[str, str]]:
    """Pairs of names: a convolution, and the BatchNorm layer that is the only user of its result.

    Layers with several names, with hooks, with several calls, or with weights that are read elsewhere are not folded.
    """
    uses = [str(node.target) for node in nodes if node.op == "call_module"]
    read = tuple(str(node.target) for node in nodes if node.op == "get_attr")
    names = [id(m) for _, m in module.named_modules(remove_duplicate=False)]

    def used_once(name: str) -> bool:
        layer = module.get_submodule(name)
        hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
        tied = any(parameter.startswith(f"{name}.") for parameter in read)
        return uses.count(name) == names.count(id(layer)) == 1 and not hooked and not tied

    found = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, Node) or not node.op == before.op == "call_module" or len(before.users) != 1:
            continue
        convolution, norm = str(before.target), str(node.target)
        layers = type(module.get_submodule(convolution)), module.get_submodule(norm)
        if layers[0] is nn.Conv2d and _is_affine_map(layers[1]) and used_once(convolution) and used_once(norm):
            found.append((convolution, norm))
    return found


def _is_affine_map(layer: nn.Module) -> bool:
    """Whether `layer` is nothing but BatchNorm, with running statistics."""
    plain = type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) or getattr(layer, "plain_in_evaluation", False)
    return plain and isinstance(layer, _BatchNorm) and layer.track_running_stats


def _fold(model: nn.Module, module: nn.Module, convolution: str, norm: str) -> _Folded:
    """Replace a pair of layers of the attack model's `module` by one convolution, filled in by `refresh`."""
    own, source = module.get_submodule(convolution), model.get_submodule(convolution)
    assert isinstance(own, nn.Conv2d) and isinstance(source, nn.Conv2d)
    weight = torch.empty_like(source.weight)  # in the same memory format
    bias: Tensor = weight.new_empty(len(weight))
    own.weight, own.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    parent, _, attribute = norm.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Identity())
    layer = model.get_submodule(norm)
    assert isinstance(layer, _BatchNorm)
    return _Folded(own, source, layer)
