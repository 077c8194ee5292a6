"""A second module over the weights of the model in training, for its attacks.

The twin shares parameters and buffers, needs no gradient for any, and stays in the mode that the attack wants: nothing is
switched to and fro, and a compiler sees one graph. In evaluation mode BatchNorm is a constant affine map; where it follows
a convolution it is folded into that convolution's weights, by `refresh`, before the attack of every step.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.core.modes import BN_MODES, batchnorms


@dataclass(frozen=True)
class _Folded:
    """A convolution of the twin, and the layers of the model that it stands for."""

    twin: nn.Conv2d
    convolution: nn.Conv2d
    norm: _BatchNorm


class AttackModel:
    """See above. Make it before anything wraps the model's forward.

    Args:
        model: the bare module, whose forward is its class's still.
        bn: `eval`, or `batch`: batch statistics, running ones untouched.
        fold: fold BatchNorm into convolutions where `bn` is `eval`.

    Attributes:
        module: maps images to logits.
        forward: what to call: `module`, or what a compiler made of it.
        num_folded: how many BatchNorm layers are folded.
        untraced: why torch.fx cannot trace the model, so that none is; None where it can, or need not.
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
                # In training mode a layer that does not track uses the batch's statistics and leaves its buffers alone.
                layer.track_running_stats = False
        elif fold:
            nodes, self.untraced = _traced(self.module)
            self._folded = [_fold(model, self.module, *names) for names in _foldable(self.module, nodes)]
        own_weights = {id(pair.twin) for pair in self._folded}
        self._shared = [
            (theirs, own)
            for (_, theirs), (_, own) in zip(model.named_modules(), self.module.named_modules(), strict=True)
            if type(theirs) is type(own) and id(own) not in own_weights
        ]
        self.forward: Callable[[Tensor], Tensor] = self.module
        self.refresh()

    @property
    def num_folded(self) -> int:
        """BatchNorm layers that are no layers of their own any more."""
        return len(self._folded)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights and running statistics."""
        for theirs, own in self._shared:
            # Shared already, unless somebody has moved the model's (DistributedDataParallel gives parameters new memory).
            for name, parameter in theirs.named_parameters(recurse=False):
                shared = own.get_parameter(name)
                if shared.data_ptr() != parameter.data_ptr():
                    shared.data = parameter.data
            own._buffers.update(theirs._buffers)
        for pair in self._folded:
            norm, source = pair.norm, pair.convolution
            assert norm.running_mean is not None and norm.running_var is not None and pair.twin.bias is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight
            torch.mul(source.weight, scale.view(-1, 1, 1, 1), out=pair.twin.weight)
            shift = -norm.running_mean if source.bias is None else source.bias - norm.running_mean
            pair.twin.bias.copy_(shift * scale if norm.bias is None else norm.bias + shift * scale)


class _LayerTracer(Tracer):
    """Sees BatchNorm layers of every kind as one operation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> tuple[list[Node], str | None]:
    """The operations of a forward pass, and, where torch.fx cannot tell them, why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_LayerTracer().trace(module).nodes), None
    except Exception as error:  # a model may do anything in its forward, and a tracer raise anything
        return [], (str(error).strip() or type(error).__name__).splitlines()[0]


def _foldable(module: nn.Module, nodes: list[Node]) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorm layers that alone use their results.

    What has several names or hooks, is called twice, or has weights that are read elsewhere is left alone.
    """
    uses = [str(node.target) for node in nodes if node.op == "call_module"]
    read = tuple(str(node.target) for node in nodes if node.op == "get_attr")
    names = [id(m) for _, m in module.named_modules(remove_duplicate=False)]

    def alone(name: str) -> bool:
        layer = module.get_submodule(name)
        hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
        return (
            uses.count(name) == names.count(id(layer)) == 1
            and not hooked
            and not any(r.startswith(f"{name}.") for r in read)
        )

    found = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if (
            node.op != "call_module"
            or not isinstance(before, Node)
            or before.op != "call_module"
            or len(before.users) != 1
        ):
            continue
        convolution, norm = str(before.target), str(node.target)
        layers = type(module.get_submodule(convolution)), module.get_submodule(norm)
        if layers[0] is nn.Conv2d and _is_affine_map(layers[1]) and alone(convolution) and alone(norm):
            found.append((convolution, norm))
    return found


def _is_affine_map(layer: nn.Module) -> bool:
    """Whether it is BatchNorm, and nothing else, with running statistics."""
    plain = type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) or getattr(layer, "plain_in_evaluation", False)
    return plain and isinstance(layer, _BatchNorm) and layer.track_running_stats


def _fold(model: nn.Module, twin: nn.Module, convolution: str, norm: str) -> _Folded:
    own, source = twin.get_submodule(convolution), model.get_submodule(convolution)
    assert isinstance(own, nn.Conv2d) and isinstance(source, nn.Conv2d)
    weight = torch.empty_like(source.weight)  # in the same memory format
    bias: Tensor = weight.new_empty(len(weight))
    own.weight, own.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    parent, _, attribute = norm.rpartition(".")
    setattr(twin.get_submodule(parent), attribute, nn.Identity())
    layer = model.get_submodule(norm)
    assert isinstance(layer, _BatchNorm)
    return _Folded(own, source, layer)
