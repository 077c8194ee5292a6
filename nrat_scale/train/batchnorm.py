"""BatchNorm over several processes: which images share batch statistics (`model.bn`), and equal running statistics on all ranks.

`local`   the images that one process holds at a time, as in the published code; depends on the number of processes.
`groups`  fixed groups of consecutive positions of the global batch; the same for any number of processes.
`sync`    the global batch, by torch's SyncBatchNorm; GPUs only.

Within a step each rank updates its own running statistics. `RunningStatistics` averages them at the end of the step, which
is exact because they are linear in the batch statistics.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import batchnorms


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm with the batch statistics of each group of `group_size` consecutive samples.

    `commit` updates the running statistics at the end of a step, once per forward of the step (natural, adversarial), by
    the average over all groups. They depend neither on the number of processes nor on accumulation.
    """

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
            mean, variance = torch.zeros_like(like), torch.ones_like(like)  # momentum 1 overwrites them
            outputs.append(F.batch_norm(group, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
            means.append(mean)
            variances.append(variance)
        if self.track_running_stats:
            self.pending.append((torch.stack(means).mean(0), torch.stack(variances).mean(0)))
        return torch.cat(outputs)

    @torch.no_grad()
    def commit(self, pieces: int) -> None:
        """Update the running statistics at the end of a step of `pieces` micro-batches."""
        calls = len(self.pending) // pieces
        assert calls * pieces == len(self.pending), "all micro-batches must go through the same forwards"
        for call in range(calls):
            seen = self.pending[call::calls]
            assert (
                self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            )
            self.num_batches_tracked += 1
            rate = 1.0 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
            for running, values in zip((self.running_mean, self.running_var), zip(*seen, strict=True), strict=True):
                running += (torch.stack(values).mean(0) - running) * rate
        self.pending = []


def check_batchnorm(statistics: str, group_size: int | None, held: int, device: torch.device) -> None:
    """Raise `UserError` if `model.bn` needs another device, or its groups do not divide a micro-batch of `held` images."""
    if statistics == "sync" and device.type == "cpu":
        raise UserError("model.bn is 'sync', which needs GPUs. Use groups or local, which work on any device.")
    if group_size is not None and held % group_size:
        where = "a process holds at a time (data.batch_size over processes and accumulation steps)"
        raise UserError(f"model.bn_group_size is {group_size}; it must divide the {held} images that {where}.")


def convert(model: nn.Module, statistics: str, group_size: int | None) -> nn.Module:
    """`model` with BatchNorm layers of the kind `statistics` (one of `models.BN_STATISTICS`), which share its parameters.

    Raises `UserError` for `groups` if a layer does more than BatchNorm.
    """
    if statistics == "sync":
        return convert_sync_batchnorm(model)  # timm's: torch's loses the activation in timm's BatchNormAct2d
    if statistics == "local":
        return model
    assert group_size is not None
    modules = model.named_modules(remove_duplicate=False)  # a layer may have several names
    layers = {name: layer for name, layer in modules if isinstance(layer, _BatchNorm)}
    for name, layer in layers.items():
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise UserError(f"model.bn is 'groups', but {name} is a {type(layer).__name__}. Use local, or sync.")
    grouped = {layer: GroupedBatchNorm.of(layer, group_size) for layer in layers.values()}
    for name, layer in layers.items():
        model.set_submodule(name, grouped[layer])
    return model


class RunningStatistics:
    """Keeps the running statistics of the bare `model` equal on all ranks; `mean` averages a tensor over them."""

    def __init__(self, model: nn.Module, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        self._grouped = [layer for layer in batchnorms(model) if isinstance(layer, GroupedBatchNorm)]
        self._mean = mean
        buffers = [b for layer in batchnorms(model) for b in layer.buffers(recurse=False) if b.is_floating_point()]
        dtypes = dict.fromkeys(buffer.dtype for buffer in buffers)
        self._by_dtype = [[b for b in buffers if b.dtype == dtype] for dtype in dtypes]  # one all-reduce per dtype

    @torch.no_grad()
    def end_step(self, pieces: int, *, reduce: bool = True) -> None:
        """Commit the groups of a step of `pieces` micro-batches, and average over ranks if `reduce`."""
        for layer in self._grouped:
            layer.commit(pieces)
        if self._mean is None or not reduce:
            return
        for buffers in self._by_dtype:
            averaged = self._mean(torch.cat([buffer.flatten() for buffer in buffers]))
            for buffer, value in zip(buffers, averaged.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(value.view_as(buffer))
