"""Classifiers with the normalisation inside; importing this package registers them with timm.

Every model maps images [B, C, H, W] in [0, 1] to logits [B, K]. `mean` and `std` are non-persistent buffers, so that state
dicts have exactly the names of RobustBench and of the usual CIFAR repositories and can be exchanged with both.

classifier     the normalisation, and timm's interface of a classifier
architectures  WideResNet, ResNet-18, the small CNN, and their names in timm's registry
spec           the recipe's `model`, and the construction of a model from its arguments
"""

from nrat_scale.models.architectures import Cnn4, ResNet18, WideBlock, WideResNet, default_cfgs, timm_cfg
from nrat_scale.models.classifier import Channels, Classifier, Normalised
from nrat_scale.models.spec import BN_STATISTICS, ModelSpec, create, model_arguments

__all__ = [
    "BN_STATISTICS",
    "Channels",
    "Classifier",
    "Cnn4",
    "ModelSpec",
    "Normalised",
    "ResNet18",
    "WideBlock",
    "WideResNet",
    "create",
    "default_cfgs",
    "model_arguments",
    "timm_cfg",
]
