"""Classifiers with the normalisation inside; importing this module registers them with timm.

Every model maps images [B, C, H, W] in [0, 1] to logits [B, K]. `mean` and `std` are non-persistent buffers, so that state
dicts have exactly the names of RobustBench and of the usual CIFAR repositories and can be exchanged with both.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value, did_you_mean, first_line
from nrat_scale.datasets import DATASETS

Channels = Sequence[float] | None  # one value for each channel, or one for all
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}
WIDE_BN_MOMENTUM = 0.01  # of the generated-data recipe; torch's default is 0.1
BN_STATISTICS = ("local", "groups", "sync")


@dataclass(frozen=True)
class ModelSpec:
    """Which model to train, and how its BatchNorm layers work.

    Raises:
        UserError: a value is unknown or out of range.
    """

    name: str = "resnet18_cifar"  # a timm name; ours are `wrn28_10_silu`, `wrn28_10`, `resnet18_cifar`, `cnn4`
    mean: list[float] | None = None  # per channel, of [0, 1] pixels; by default that of the data set
    std: list[float] | None = None  # as `mean`
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments, for instance {width: 64} for `cnn4`
    bn_momentum: float | None = None  # weight of the new batch in the running statistics; None keeps the model's own
    bn_first_step: bool = False  # after the first step the running statistics are those of its batch, as in DM_AT
    # Training statistics on several processes. `local`: of the images that each process holds at a time, as in the
    # published code; `groups`: of `bn_group_size` consecutive images of the global batch, the same for any number of
    # processes; `sync`: of the global batch (GPUs only).
    bn: str = "local"
    bn_group_size: int | None = None  # for `groups`; each process must hold whole groups

    def __post_init__(self) -> None:
        check_choice("model.bn", self.bn, BN_STATISTICS)
        if (self.bn == "groups") != (self.bn_group_size is not None):
            raise UserError("model.bn groups and model.bn_group_size go together: set both or neither.")
        size, momentum = self.bn_group_size, self.bn_momentum
        check_value("model.bn_group_size", size, size is None or size >= 2, "at least 2")
        check_value("model.bn_momentum", momentum, momentum is None or 0.0 <= momentum <= 1.0, "in [0, 1]")


class Normalised(nn.Module):
    """Base of our models: normalisation, and the attributes that timm expects of a classifier.

    Args:
        num_classes: K.
        in_chans: C.
        mean, std: one value for each channel, or one for all; None means CIFAR-10's if C = 3, else 0.5.

    Raises:
        UserError: mean or std does not fit C, is not finite, or std is not positive.
    """

    mean: Tensor
    std: Tensor
    last_layer: str

    def __init__(self, num_classes: int, in_chans: int, mean: Channels, std: Channels) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        cifar10 = DATASETS["cifar10"]
        for name, given, default in (("mean", mean, cifar10.mean), ("std", std, cifar10.std)):
            default = default if in_chans == 3 else (0.5,)
            values = [float(value) for value in (default if given is None else given)]
            if len(values) not in (1, in_chans):
                raise UserError(f"The model has {in_chans} input channels but {len(values)} values of {name}: {given}.")
            values *= in_chans // len(values)
            if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
                wanted = "finite" if name == "mean" else "positive"
                raise UserError(f"The {name} of the normalisation must be {wanted}, not {values}.")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def get_classifier(self) -> nn.Module:
        """The last layer, under timm's name."""
        return self.get_submodule(self.last_layer)

    def normalise(self, x: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (x - self.mean) / self.std


class WideBlock(nn.Module):
    """Pre-activation block. With stride 2 its first convolution pads (0, 1, 0, 1), like TensorFlow's SAME."""

    def __init__(self, in_planes: int, planes: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_planes, momentum=WIDE_BN_MOMENTUM)
        self.conv_0 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(planes, momentum=WIDE_BN_MOMENTUM)
        self.conv_1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False) if in_planes != planes else None
        self.activation = activation()
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.batchnorm_0(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv_0(F.pad(activated, self.padding))
        return residual + self.conv_1(self.activation(self.batchnorm_1(out)))


class WideResNet(Normalised):
    """WideResNet (Zagoruyko and Komodakis 2016) as in Gowal et al. 2020 and DM_AT.

    The state-dict names are those of RobustBench's `DMWideResNet`.

    Args:
        depth: 6 n + 4 layers.
        width: widening factor.
        activation: `silu` or `relu`.
        num_classes: K.
        mean, std: normalisation, see `Normalised`.
        in_chans: C.
    """

    last_layer = "logits"

    def __init__(
        self,
        depth: int,
        width: int,
        activation: str = "silu",
        num_classes: int = 10,
        mean: Channels = None,
        std: Channels = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_classes, in_chans, mean, std)
        if depth < 10 or (depth - 4) % 6:
            raise UserError(f"A WideResNet has depth 6 n + 4 (10, 16, 22, 28, 34, ...), not {depth}.")
        if width < 1:
            raise UserError(f"The width of a WideResNet is a factor of 1 or more, not {width}.")
        check_choice("The activation of a WideResNet", activation, ACTIVATIONS)
        act, blocks = ACTIVATIONS[activation], (depth - 4) // 6
        planes = [16, 16 * width, 32 * width, 64 * width]
        self.num_features = planes[3]
        self.init_conv = nn.Conv2d(in_chans, planes[0], 3, padding=1, bias=False)
        stages = []
        for before, after, stride in zip(planes, planes[1:], (1, 2, 2), strict=False):
            first = WideBlock(before, after, stride, act)
            rest = (WideBlock(after, after, 1, act) for _ in range(blocks - 1))
            stages.append(nn.Sequential(OrderedDict(block=nn.Sequential(first, *rest))))  # named layer.i.block.j
        self.layer = nn.Sequential(*stages)
        self.batchnorm = nn.BatchNorm2d(planes[3], momentum=WIDE_BN_MOMENTUM)
        self.activation = act()
        self.logits = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.init_conv(self.normalise(x)))
        return self.logits(self.activation(self.batchnorm(out)).mean((2, 3)))


class BasicBlock(nn.Module):
    """Post-activation block of two 3 x 3 convolutions."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            projection = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(Normalised):
    """ResNet-18 (He et al. 2016) for CIFAR: 3 x 3 stem, no pooling before the stages. Arguments as for `WideResNet`."""

    last_layer = "linear"

    def __init__(self, num_classes: int = 10, in_chans: int = 3, mean: Channels = None, std: Channels = None) -> None:
        super().__init__(num_classes, in_chans, mean, std)
        self.num_features = 512
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalise(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))


class Cnn4(Normalised):
    """Four convolutions, a hidden and an output layer, for digits and Fashion-MNIST; no BatchNorm.

    The features are pooled to 4 x 4, so that any image size fits.

    Args:
        num_classes, in_chans, mean, std: as for `WideResNet`.
        width: channels of the first two convolutions; the others have twice as many.
        hidden: units of the hidden layer.
    """

    last_layer = "classifier"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        mean: Channels = (0.5,),
        std: Channels = (0.5,),
        width: int = 32,
        hidden: int = 128,
    ) -> None:
        super().__init__(num_classes, in_chans, mean, std)
        self.num_features = hidden
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(2 * width * 16, hidden),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalise(x)))


def timm_cfg(
    first_conv: str | None, classifier: str | None, input_size: tuple[int, int, int], num_classes: int = 10
) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model with its normalisation inside; `input_size` is (C, H, W)."""
    return {
        "num_classes": num_classes,
        "input_size": input_size,
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0,) * input_size[0],  # normalisation is inside the model
        "std": (1.0,) * input_size[0],
        "first_conv": first_conv,
        "classifier": classifier,
    }


_CFGS: dict[str, Any] = {
    "wrn28_10_silu.untrained": timm_cfg("init_conv", "logits", (3, 32, 32)),
    "wrn28_10.untrained": timm_cfg("init_conv", "logits", (3, 32, 32)),
    "resnet18_cifar.untrained": timm_cfg("conv1", "linear", (3, 32, 32)),
    "cnn4.untrained": timm_cfg("features.0", "classifier", (1, 28, 28)),
}
default_cfgs = generate_default_cfgs(_CFGS)


@register_model
def wrn28_10_silu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-28-10 with SiLU, the model of the generated-data recipe."""
    kwargs = {"depth": 28, "width": 10, "activation": "silu", **kwargs}
    return build_model_with_cfg(WideResNet, "wrn28_10_silu", pretrained, **kwargs)


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-28-10 with ReLU, otherwise as `wrn28_10_silu`."""
    kwargs = {"depth": 28, "width": 10, "activation": "relu", **kwargs}
    return build_model_with_cfg(WideResNet, "wrn28_10", pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32 x 32 images."""
    return build_model_with_cfg(ResNet18, "resnet18_cifar", pretrained, **kwargs)


@register_model
def cnn4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Four convolutions for 16 x 16 or 28 x 28 grey images; `width=32`."""
    return build_model_with_cfg(Cnn4, "cnn4", pretrained, **kwargs)


def model_arguments(
    spec: ModelSpec, num_classes: int, in_chans: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """The keyword arguments that rebuild this model; a release stores them as timm's `model_args`.

    `mean` and `std` are those of the data set, for a spec without its own.
    """
    constants = {"mean": [*map(float, spec.mean or mean)], "std": [*map(float, spec.std or std)]}
    return {**spec.kwargs, "num_classes": num_classes, "in_chans": in_chans, **constants}


def create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model(name, **arguments)`.

    Raises:
        UserError: timm does not know the name, or the model does not take the arguments.
    """
    if not timm.is_model(name):
        nearest = did_you_mean(name, default_cfgs)
        raise UserError(f"Unknown model '{name}' (model.name). {nearest} Any timm model can be used.")
    try:
        return timm.create_model(name, **arguments)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        # Constructors raise any of these for unexpected arguments.
        reason = first_line(error).rstrip(".")
        raise UserError(f"The model '{name}' does not take these arguments (model.kwargs): {reason}.") from error
