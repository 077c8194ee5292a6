"""Architectures in the layout of other projects' files: names of tensors and arithmetic are theirs.

`wrn34_10`        WideResNet-34-10 of TRADES and AWP (RobustBench's `WideResNet`)
`preact_resnet18` PreActResNet-18 (RobustBench's `PreActResNet`)
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from nrat_scale.models.architectures import WideClassifier, build, timm_cfg, wide_sizes
from nrat_scale.models.classifier import Channels, Classifier


class TradesBlock(nn.Module):
    """Pre-activation block with symmetric padding, and ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False) if in_planes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = x if self.convShortcut is None else self.convShortcut(activated)
        return residual + self.conv2(F.relu(self.bn2(self.conv1(activated))))


def _trades_stage(count: int, in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """`layer.0` ... `layer.<count - 1>`."""
    rest = (TradesBlock(planes, planes, 1) for _ in range(count - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(TradesBlock(in_planes, planes, stride), *rest)))


class TradesWideResNet(WideClassifier):
    """WideResNet in the layout of TRADES (Zhang et al. 2019) and AWP (Wu et al. 2020), with ReLU.

    The state-dict names are those of RobustBench's `WideResNet`.

    Args:
        depth: 6 n + 4 layers.
        width: widening factor.
        num_classes, in_chans, mean, std, drop_rate, global_pool: as for `WideResNet`.
        sub_block1: the unused block of TRADES' own code, whose weights are in many files; only to load these.
    """

    if TYPE_CHECKING:
        fc: nn.Linear
    last_layer = "fc"
    stages = (1, ("conv1",)), (1, ("block1",)), (2, ("block2",)), (4, ("block3",))
    final_layers, final_is_norm = ("bn1",), True

    def __init__(
        self,
        depth: int = 34,
        width: int = 10,
        num_classes: int = 10,
        mean: Channels = None,
        std: Channels = None,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        sub_block1: bool = False,
    ) -> None:
        blocks, planes = wide_sizes(depth, width)
        super().__init__(num_classes, in_chans, mean, std, planes[3], planes, drop_rate)
        self.conv1 = nn.Conv2d(in_chans, planes[0], 3, padding=1, bias=False)
        self.block1 = _trades_stage(blocks, planes[0], planes[1], 1)
        if sub_block1:
            self.sub_block1 = _trades_stage(blocks, planes[0], planes[1], 1).requires_grad_(False)
        self.block2 = _trades_stage(blocks, planes[1], planes[2], 2)
        self.block3 = _trades_stage(blocks, planes[2], planes[3], 2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.reset_classifier(num_classes, global_pool)
        self._initialise()

    def _stem(self, x: Tensor) -> Tensor:
        return self.conv1(self.normalise(x))

    def _stages(self) -> list[Callable[[Tensor], Tensor]]:
        return [self._stem, self.block1, self.block2, self.block3]

    def _final(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))

    def forward_features(self, x: Tensor) -> Tensor:
        return self._final(self.block3(self.block2(self.block1(self._stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pooled(x)
        return x if pre_logits else self.fc(x)


class PreActBlock(nn.Module):
    """Pre-activation block of two 3 x 3 convolutions; the shortcut reads the input, or with `out_shortcut` its activation."""

    def __init__(self, in_planes: int, planes: int, stride: int, out_shortcut: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))
        self.out_shortcut = out_shortcut and len(self.shortcut) > 0

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.shortcut(activated if self.out_shortcut else x)
        return residual + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class PreActResNet18(Classifier):
    """Pre-activation ResNet-18 (He et al. 2016b) for CIFAR; the state-dict names are those of RobustBench's `PreActResNet`.

    Args:
        num_classes, in_chans, mean, std, drop_rate, global_pool: as for `WideResNet`.
        bn_before_fc: BatchNorm and ReLU before the pooling, as in the files of AWP and of Rice et al. 2020.
        out_shortcut: a block's shortcut reads the activated input, as in AWP's code. No tensor tells that a file needs it.
    """

    if TYPE_CHECKING:
        linear: nn.Linear
    last_layer = "linear"
    stages = (1, ("conv1",)), (1, ("layer1",)), (2, ("layer2",)), (4, ("layer3",)), (8, ("layer4",))

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        mean: Channels = None,
        std: Channels = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        bn_before_fc: bool = False,
        out_shortcut: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, mean, std, 512, (64, 64, 128, 256, 512), drop_rate)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        for number, (before, after) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), start=1):
            first = PreActBlock(before, after, 1 if number == 1 else 2, out_shortcut)
            setattr(self, f"layer{number}", nn.Sequential(first, PreActBlock(after, after, 1, out_shortcut)))
        self.bn = nn.BatchNorm2d(512) if bn_before_fc else None
        if bn_before_fc:
            self.final_layers, self.final_is_norm = ("bn",), True
        self.reset_classifier(num_classes, global_pool)

    def _stem(self, x: Tensor) -> Tensor:
        return self.conv1(self.normalise(x))

    def _stages(self) -> list[Callable[[Tensor], Tensor]]:
        return [self._stem, *(self.get_submodule(f"layer{number}") for number in range(1, 5))]

    def _final(self, x: Tensor) -> Tensor:
        return x if self.bn is None else F.relu(self.bn(x))

    def forward_features(self, x: Tensor) -> Tensor:
        for stage in self._stages():
            x = stage(x)
        return self._final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pooled(x)
        return x if pre_logits else self.linear(x)


_CFGS: dict[str, Any] = {
    "wrn34_10.untrained": timm_cfg("conv1", "fc", (3, 32, 32), pool_size=(8, 8)),
    "preact_resnet18.untrained": timm_cfg("conv1", "linear", (3, 32, 32), pool_size=(4, 4)),
}
default_cfgs = generate_default_cfgs(_CFGS)


@register_model
def wrn34_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-34-10 with ReLU in the layout of TRADES and AWP."""
    return build(TradesWideResNet, "wrn34_10", pretrained, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18 in RobustBench's layout."""
    return build(PreActResNet18, "preact_resnet18", pretrained, **kwargs)
