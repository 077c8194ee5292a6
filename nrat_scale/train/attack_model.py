"""The attack model: a second module over the weights of the model in training, on which its attacks run.

It shares parameters and buffers, needs no gradient for any of them, and keeps the mode of the attack (no dropout, no stochastic
depth), so no mode is switched during a step and torch.compile sees one graph. In evaluation mode BatchNorm is a constant affine
map: behind a convolution it is folded into the convolution's weights by `refresh`, before the attack of every step.

Under autocast every forward would cast all weights anew, because autocast caches only casts of parameters that need gradients.
So `refresh` also writes the weights in the compute type, once a step; the results have the same bits.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.core.errors import first_line
from nrat_scale.core.modes import set_attack_mode
from nrat_scale.train.batchnorm import GroupedBatchNorm

_CAST_BY_AUTOCAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # subclasses may use their weights in other operations


class AttackModel:
    """The model as attacks run it. Create it before Accelerate or a compiler wraps the model's forward.

    Args:
        model: the bare module.
        bn: `eval`, or `batch`: batch statistics, running statistics unchanged.
        fold: fold BatchNorm into convolutions if `bn` is `eval`.
        compute: bfloat16 or float16: also keep the weights in this type, for forwards under autocast.

    Attributes:
        module: maps images [B, C, H, W] to logits [B, K].
        forward: what attacks call: `module` or its compiled version.
        low: `module` with the weights of convolutions and linear layers in `compute`; `module` itself if that is None.
        low_forward: what attacks call under autocast: `low` or its compiled version.
        num_folded: number of folded BatchNorm layers.
        untraced: why torch.fx cannot trace the model, which prevents folding; None if it can, or folding is off.
    """

    def __init__(self, model: nn.Module, bn: str, *, fold: bool = True, compute: torch.dtype | None = None) -> None:
        shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        self.module: nn.Module = copy.deepcopy(model, shared)
        set_attack_mode(self.module, bn)
        self._folded: list[tuple[nn.Conv2d, nn.Conv2d, _BatchNorm]] = []  # our convolution, the two layers it replaces
        self.untraced: str | None = None
        if fold and bn == "eval":
            try:
                pairs = _foldable(self.module)
            except Exception as error:  # torch.fx can fail in arbitrary ways on user models: attack the unfolded one
                pairs, self.untraced = [], first_line(error)
            self._folded = [_fold(model, self.module, names) for names in pairs]
        self.num_folded = len(self._folded)
        folded = [own for own, _, _ in self._folded]
        self._shared = [
            (theirs, own)
            for (_, theirs), (_, own) in zip(model.named_modules(), self.module.named_modules(), strict=True)
            if type(theirs) is type(own) and own not in folded
        ]
        self.low, self._cast = (self.module, []) if compute is None else _low_precision(self.module, compute)
        self.use_eager()
        self.refresh()

    def use_eager(self) -> None:
        """Let attacks call the modules themselves."""
        self.forward: Callable[[Tensor], Tensor] = self.module
        self.low_forward: Callable[[Tensor], Tensor] = self.low

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
        for own, convolution, norm in self._folded:
            assert norm.running_mean is not None and norm.running_var is not None and own.bias is not None
            scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
            torch.mul(convolution.weight, scale.view(-1, 1, 1, 1), out=own.weight)
            shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
            own.bias.copy_(shift * scale if norm.bias is None else norm.bias + shift * scale)
        if self._cast:
            for own, low in zip(self.module.modules(), self.low.modules(), strict=True):
                low._buffers.update(own._buffers)
            torch._foreach_copy_([low for low, _ in self._cast], [full for _, full in self._cast])


def _low_precision(module: nn.Module, compute: torch.dtype) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """(a copy of `module` that shares everything but the weights that autocast casts, pairs (its weight, that of `module`)).

    A weight that another layer also holds or reads stays shared, and is cast by autocast as before.
    """
    holders = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    layers = [layer for layer in module.modules() if type(layer) in _CAST_BY_AUTOCAST]
    cast = [p for layer in layers for p in layer.parameters(recurse=False) if holders[id(p)] == 1]
    copies = {id(p): nn.Parameter(torch.empty_like(p, dtype=compute), requires_grad=False) for p in cast}
    shared: dict[int, object] = {id(p): p for p in module.parameters()} | {id(b): b for b in module.buffers()}
    low = copy.deepcopy(module, {**shared, **copies})
    return low, [(copies[id(p)], p) for p in cast]


class _LayerTracer(Tracer):
    """Treats BatchNorm layers of every kind as one operation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _foldable(module: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names: a convolution, and the BatchNorm layer that is the only user of its result.

    Layers with several names, with hooks, with several calls, or with weights that are read elsewhere are not folded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = list(_LayerTracer().trace(module).nodes)
    uses = [str(node.target) for node in nodes if node.op == "call_module"]
    read = tuple(str(node.target) for node in nodes if node.op == "get_attr")
    layers = [layer for _, layer in module.named_modules(remove_duplicate=False)]

    def used_once(name: str) -> bool:
        layer = module.get_submodule(name)
        hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
        tied = any(parameter.startswith(f"{name}.") for parameter in read)
        return uses.count(name) == layers.count(layer) == 1 and not hooked and not tied

    found = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, Node) or not node.op == before.op == "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(node.target)
        convolution, norm = map(module.get_submodule, names)
        plain = type(convolution) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, GroupedBatchNorm)
        if plain and norm.track_running_stats and all(map(used_once, names)):
            found.append(names)
    return found


def _fold(model: nn.Module, module: nn.Module, names: tuple[str, str]) -> tuple[nn.Conv2d, nn.Conv2d, _BatchNorm]:
    """Replace a pair of layers of the attack model's `module` by one convolution, filled in by `refresh`."""
    own, (convolution, norm) = module.get_submodule(names[0]), map(model.get_submodule, names)
    assert isinstance(own, nn.Conv2d) and isinstance(convolution, nn.Conv2d) and isinstance(norm, _BatchNorm)
    weight = torch.empty_like(convolution.weight)  # in the same memory format
    own.weight, own.bias = (nn.Parameter(w, requires_grad=False) for w in (weight, weight.new_empty(len(weight))))
    module.set_submodule(names[1], nn.Identity().eval())
    return own, convolution, norm
