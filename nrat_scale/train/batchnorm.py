"""BatchNorm over several processes: whose statistics a batch is normalised with, and running ones that are equal everywhere.

`local`   those of what one process holds at a time, as in the published code. They depend on the number of processes.
`groups`  those of fixed groups of consecutive positions of the global batch: the same for any number of processes.
`sync`    those of the global batch, by torch's SyncBatchNorm: GPUs only.

Within a step a rank's running statistics are its own; `RunningState` then averages them (they are linear in the
statistics of the batches, so this is exact), or puts everything back where the step was bad.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of groups of `group_size` consecutive samples.

    The running statistics move by the average over all groups of a step, once for each forward of the step (natural and
    adversarial), in `commit`: so they depend neither on the number of processes nor on accumulation.
    """

    plain_in_evaluation = True  # where it is nothing but BatchNorm: it may be folded

    group_size: int
    pending: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, layer: _BatchNorm, group_size: int) -> "GroupedBatchNorm":
        """A layer with the parameters and buffers of `layer`."""
        grouped = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        grouped.weight, grouped.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            grouped.register_buffer(name, buffer)
        grouped.group_size, grouped.pending = group_size, []
        return grouped.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert len(input) % self.group_size == 0, "the recipe's batch is made of whole groups"
        outputs, means, variances = [], [], []
        like = self.running_mean if self.running_mean is not None else self.weight
        if like is None:
            like = input.new_zeros(self.num_features)
        for group in input.split(self.group_size):
            mean, variance = torch.zeros_like(like), torch.ones_like(like)  # filled in by momentum 1
            outputs.append(F.batch_norm(group, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
            means.append(mean)
            variances.append(variance)
        if self.track_running_stats:
            self.pending.append((torch.stack(means).mean(0), torch.stack(variances).mean(0)))
        return torch.cat(outputs)

    @torch.no_grad()
    def commit(self, pieces: int) -> None:
        """Let the statistics of a step, made of `pieces` micro-batches, into the running ones."""
        calls = len(self.pending) // pieces
        assert calls * pieces == len(self.pending), "every micro-batch goes through the same forwards"
        for call in range(calls):
            seen = self.pending[call::calls]
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            rate = 1.0 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
            for running, values in zip((self.running_mean, self.running_var), zip(*seen, strict=True), strict=True):
                running += (torch.stack(values).mean(0) - running) * rate
        self.pending = []


def check_batchnorm(statistics: str, group_size: int | None, held: int, device: torch.device) -> None:
    """Whether `convert` can do what a recipe asks for.

    Args:
        statistics, group_size: `model.bn` and `model.bn_group_size`.
        held: images that one process holds at a time.

    Raises:
        UserError: it cannot.
    """
    if statistics == "sync" and device.type == "cpu":
        raise UserError("model.bn is 'sync', which needs GPUs. Use groups or local, which work on any device.")
    if group_size is not None and held % group_size:
        raise UserError(
            f"model.bn_group_size is {group_size}; it must divide the {held} images that each process holds "
            "at a time (data.batch_size over processes and accumulation steps)."
        )


def convert(model: nn.Module, statistics: str, group_size: int | None) -> nn.Module:
    """`model` with the BatchNorm layers that `statistics` (one of `models.BN_STATISTICS`) asks for; parameters are shared.

    Raises:
        UserError: `groups` for a layer that does more than BatchNorm.
    """
    if statistics == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if statistics == "groups":
        assert group_size is not None
        grouped: dict[nn.Module, GroupedBatchNorm] = {}
        names = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)]
        for name in names:  # a layer may have several
            layer = model.get_submodule(name)
            if isinstance(layer, GroupedBatchNorm):  # in a module that has several names
                continue
            if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise UserError(f"model.bn is 'groups', but {name} is a {type(layer).__name__}. Use local, or sync.")
            assert isinstance(layer, _BatchNorm)
            parent, _, attribute = name.rpartition(".")
            if layer not in grouped:
                grouped[layer] = GroupedBatchNorm.of(layer, group_size)
            setattr(model.get_submodule(parent), attribute, grouped[layer])
    return model


class RunningState:
    """What a step changes as it goes, besides weights: BatchNorm's buffers, and sums that are kept on the device.

    Args:
        model: its BatchNorm layers are looked after.
        others: tensors, always changed in place, that a bad step must not change either.
        mean: averages a tensor over ranks; None where there is one.
    """

    def __init__(
        self, model: nn.Module, others: Sequence[Tensor], mean: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._layers = [layer for layer in batchnorms(model) if isinstance(layer, GroupedBatchNorm)]
        buffers = [buffer for layer in batchnorms(model) for buffer in layer.buffers(recurse=False)]
        self._statistics, self._others = _by_dtype(buffers), _by_dtype(others)
        self._mean = mean
        self._before: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Remember what is there before a step."""
        self._before = [_flat(group) for group in self._statistics + self._others]

    @torch.no_grad()
    def end(self, good: Tensor, pieces: int) -> None:
        """Average BatchNorm's statistics over ranks; or, where `good` (bool scalar) is false, undo all changes.

        Args:
            pieces: micro-batches of the step.
        """
        for layer in self._layers:
            layer.commit(pieces)
        for number, (group, before) in enumerate(zip(self._statistics + self._others, self._before, strict=True)):
            after = _flat(group)
            if self._mean is not None and after.is_floating_point() and number < len(self._statistics):
                after = self._mean(after)
            values = torch.where(good, after, before).split([tensor.numel() for tensor in group])
            for tensor, value in zip(group, values, strict=True):
                tensor.copy_(value.view_as(tensor))


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
