"""The architectures and their names in timm's registry."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.models.classifier import Channels, Classifier

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}
WIDE_BN_MOMENTUM = 0.01  # of the generated-data recipe; torch's default is 0.1


class WideBlock(nn.Module):
    """Pre-activation block. With stride 2 its first convolution pads (0, 1, 0, 1), like TensorFlow's SAME."""

    def __init__(self, in_planes: int, planes: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_planes, momentum=WIDE_BN_MOMENTUM)
        # conv_0 pads itself if the padding is symmetric: F.pad would copy every activation.
        self.padding = None if stride == 1 else (0, 1, 0, 1)
        self.conv_0 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=int(stride == 1), bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(planes, momentum=WIDE_BN_MOMENTUM)
        self.conv_1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False) if in_planes != planes else None
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.batchnorm_0(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv_0(activated if self.padding is None else F.pad(activated, self.padding))
        return residual + self.conv_1(self.activation(self.batchnorm_1(out)))


class WideClassifier(Classifier):
    """What the two layouts of WideResNet share: their initial weights."""

    def _initialise(self) -> None:
        """He et al. 2015 by the outputs of each convolution, drawn in the order of the modules."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As in `Classifier`; the new bias is 0."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes:
            bias = self.get_submodule(self.last_layer).bias
            assert isinstance(bias, nn.Parameter)
            nn.init.zeros_(bias)


def wide_sizes(depth: int, width: int) -> tuple[int, list[int]]:
    """(Blocks of a stage, channels of the stem and of the three stages) of a WideResNet; raises `UserError` if there is none."""
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"A WideResNet has depth 6 n + 4 (10, 16, 22, 28, 34, ...), not {depth}.")
    if width < 1:
        raise UserError(f"The width of a WideResNet is a factor of 1 or more, not {width}.")
    return (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]


class WideResNet(WideClassifier):
    """WideResNet (Zagoruyko and Komodakis 2016) as in Gowal et al. 2020 and DM_AT.

    The state-dict names are those of RobustBench's `DMWideResNet`.

    Args:
        depth: 6 n + 4 layers.
        width: widening factor.
        activation: `silu` or `relu`.
        num_classes: K.
        mean, std: normalisation, see `Normalised`.
        in_chans: C.
        drop_rate, global_pool: dropout before the last layer, and pooling, as in timm's models.
    """

    if TYPE_CHECKING:
        logits: nn.Linear
    last_layer = "logits"
    stages = (1, ("init_conv",)), (1, ("layer.0",)), (2, ("layer.1",)), (4, ("layer.2",))
    final_layers, final_is_norm = ("batchnorm",), True

    def __init__(
        self,
        depth: int,
        width: int,
        activation: str = "silu",
        num_classes: int = 10,
        mean: Channels = None,
        std: Channels = None,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        blocks, planes = wide_sizes(depth, width)
        super().__init__(num_classes, in_chans, mean, std, planes[3], planes, drop_rate)
        check_choice("The activation of a WideResNet", activation, ACTIVATIONS)
        act = ACTIVATIONS[activation]
        self.init_conv = nn.Conv2d(in_chans, planes[0], 3, padding=1, bias=False)
        stages = []
        for before, after, stride in zip(planes, planes[1:], (1, 2, 2), strict=False):
            first = WideBlock(before, after, stride, act)
            rest = (WideBlock(after, after, 1, act) for _ in range(blocks - 1))
            stages.append(nn.Sequential(OrderedDict(block=nn.Sequential(first, *rest))))  # named layer.i.block.j
        self.layer = nn.Sequential(*stages)
        self.batchnorm = nn.BatchNorm2d(planes[3], momentum=WIDE_BN_MOMENTUM)
        self.activation = act()
        self.reset_classifier(num_classes, global_pool)
        self._initialise()

    def _stem(self, x: Tensor) -> Tensor:
        return self.init_conv(self.normalise(x))

    def _stages(self) -> list[Callable[[Tensor], Tensor]]:
        return [self._stem, *self.layer]

    def _final(self, x: Tensor) -> Tensor:
        return self.activation(self.batchnorm(x))

    def forward_features(self, x: Tensor) -> Tensor:
        return self._final(self.layer(self._stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pooled(x)
        return x if pre_logits else self.logits(x)


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


class ResNet18(Classifier):
    """ResNet-18 (He et al. 2016) for CIFAR: 3 x 3 stem, no pooling before the stages. Arguments as for `WideResNet`."""

    if TYPE_CHECKING:
        linear: nn.Linear
    last_layer = "linear"
    stages = (1, ("conv1", "bn1")), (1, ("layer1",)), (2, ("layer2",)), (4, ("layer3",)), (8, ("layer4",))

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        mean: Channels = None,
        std: Channels = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(num_classes, in_chans, mean, std, 512, (64, 64, 128, 256, 512), drop_rate)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.reset_classifier(num_classes, global_pool)

    def _stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(self.normalise(x))))

    def _stages(self) -> list[Callable[[Tensor], Tensor]]:
        return [self._stem, self.layer1, self.layer2, self.layer3, self.layer4]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self._stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pooled(x)
        return x if pre_logits else self.linear(x)


class Cnn4(Classifier):
    """Four convolutions, a hidden and an output layer, for digits and Fashion-MNIST; no BatchNorm.

    The convolutions' features are pooled to 4 x 4, so that any image size fits. The hidden layer's units are the features
    [B, hidden, 1, 1] of `forward_features`: the convolutions' maps are those of `features_only`.

    Args:
        num_classes, in_chans, mean, std, drop_rate, global_pool: as for `WideResNet`.
        width: channels of the first two convolutions; the others have twice as many.
        hidden: units of the hidden layer.
    """

    if TYPE_CHECKING:
        classifier: nn.Linear
    last_layer = "classifier"
    stages = tuple((stride, (f"features.{i}", f"features.{i + 1}")) for i, stride in ((0, 1), (2, 2), (4, 2), (6, 4)))
    final_layers = ("features.10",)

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        mean: Channels = (0.5,),
        std: Channels = (0.5,),
        width: int = 32,
        hidden: int = 128,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        channels = (width, width, 2 * width, 2 * width)
        super().__init__(num_classes, in_chans, mean, std, hidden, channels, drop_rate)
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
        self.reset_classifier(num_classes, global_pool)

    def _stem(self, x: Tensor) -> Tensor:
        return self.features[1](self.features[0](self.normalise(x)))

    def _stages(self) -> list[Callable[[Tensor], Tensor]]:
        return [self._stem, self.features[2:4], self.features[4:6], self.features[6:8]]

    def _final(self, x: Tensor) -> Tensor:
        return self.features[8:](x)[:, :, None, None]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(self.normalise(x))[:, :, None, None]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pooled(x)
        return x if pre_logits else self.classifier(x)


def timm_cfg(
    first_conv: str | None,
    classifier: str | None,
    input_size: tuple[int, int, int],
    num_classes: int = 10,
    pool_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model with its normalisation inside; sizes are (C, H, W), and (H, W) of the features."""
    cfg: dict[str, Any] = {
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
    return cfg if pool_size is None else {**cfg, "pool_size": pool_size}


_CFGS: dict[str, Any] = {
    **{
        f"{name}.untrained": timm_cfg("init_conv", "logits", (3, 32, 32), pool_size=(8, 8))
        for name in ("wrn28_10_silu", "wrn28_10", "wrn34_10_silu", "wrn70_16_silu", "wrn82_8_silu", "wrn94_16_silu")
    },
    "resnet18_cifar.untrained": timm_cfg("conv1", "linear", (3, 32, 32), pool_size=(4, 4)),
    "cnn4.untrained": timm_cfg("features.0", "classifier", (1, 28, 28), pool_size=(1, 1)),
}
default_cfgs = generate_default_cfgs(_CFGS)


def build(architecture: type[Classifier], name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """timm's construction, with the arguments that its users pass to every model."""
    for key in ("drop_path_rate", "drop_block_rate"):
        rate = kwargs.pop(key, 0.0)
        check_value(key, rate, not rate, f"0: {name} has no such layers")
    if kwargs.get("feature_cls", "getter") != "getter":
        # They call the layers one after the other, without the forward that normalises.
        raise UserError(
            f"feature_cls would leave out the normalisation of {name}. Drop it: features_only=True suffices."
        )
    features = {"feature_cls": "getter", "out_indices": tuple(range(len(architecture.stages)))}
    place = {key: kwargs.pop(key, None) for key in ("device", "dtype")}
    return build_model_with_cfg(architecture, name, pretrained, feature_cfg=features, **kwargs).to(**place)


@register_model
def wrn28_10_silu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-28-10 with SiLU, the model of the generated-data recipe."""
    return build(WideResNet, "wrn28_10_silu", pretrained, **{"depth": 28, "width": 10, "activation": "silu", **kwargs})


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-28-10 with ReLU, otherwise as `wrn28_10_silu`."""
    return build(WideResNet, "wrn28_10", pretrained, **{"depth": 28, "width": 10, "activation": "relu", **kwargs})


@register_model
def wrn34_10_silu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-34-10 with SiLU, otherwise as `wrn28_10_silu`."""
    return build(WideResNet, "wrn34_10_silu", pretrained, **{"depth": 34, "width": 10, "activation": "silu", **kwargs})


@register_model
def wrn70_16_silu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-70-16 with SiLU, otherwise as `wrn28_10_silu`."""
    return build(WideResNet, "wrn70_16_silu", pretrained, **{"depth": 70, "width": 16, "activation": "silu", **kwargs})


@register_model
def wrn82_8_silu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-82-8 with SiLU, otherwise as `wrn28_10_silu`."""
    return build(WideResNet, "wrn82_8_silu", pretrained, **{"depth": 82, "width": 8, "activation": "silu", **kwargs})


@register_model
def wrn94_16_silu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-94-16 with SiLU, otherwise as `wrn28_10_silu`."""
    return build(WideResNet, "wrn94_16_silu", pretrained, **{"depth": 94, "width": 16, "activation": "silu", **kwargs})


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32 x 32 images."""
    return build(ResNet18, "resnet18_cifar", pretrained, **kwargs)


@register_model
def cnn4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Four convolutions for 16 x 16 or 28 x 28 grey images; `width=32`."""
    return build(Cnn4, "cnn4", pretrained, **kwargs)
