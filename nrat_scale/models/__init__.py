"""Classifiers with the normalisation inside; importing this package registers them with timm.

Every model maps images [B, C, H, W] in [0, 1] to logits [B, K]. `mean` and `std` are non-persistent buffers, so that state
dicts have exactly the names of RobustBench and of the usual CIFAR repositories and can be exchanged with both.

classifier     the normalisation, and timm's interface of a classifier
architectures  WideResNet, ResNet-18, the small CNN, and their names in timm's registry
published      the layouts of other projects: TRADES' and AWP's WideResNet, RobustBench's PreActResNet
wrapped        the normalisation around models that have none: timm's and users' classes
own            users' classes: `register`, and the import of `package.module:factory`
spec           the recipe's `model`, and the construction of a model from its arguments
"""

from nrat_scale.models.architectures import Cnn4, ResNet18, WideBlock, WideResNet, timm_cfg
from nrat_scale.models.classifier import Channels, Classifier, Normalised
from nrat_scale.models.own import REGISTERED, as_import, build_own, find_factory, is_import, is_own, origin, register
from nrat_scale.models.published import PreActResNet18, TradesWideResNet
from nrat_scale.models.spec import (
    BN_STATISTICS,
    ModelSpec,
    create,
    default_cfgs,
    is_ours,
    model_arguments,
    near_model,
    try_out,
)
from nrat_scale.models.wrapped import NormalisedModel, around_timm, bare

__all__ = [
    "BN_STATISTICS",
    "REGISTERED",
    "Channels",
    "Classifier",
    "Cnn4",
    "ModelSpec",
    "Normalised",
    "NormalisedModel",
    "PreActResNet18",
    "ResNet18",
    "TradesWideResNet",
    "WideBlock",
    "WideResNet",
    "around_timm",
    "as_import",
    "bare",
    "build_own",
    "create",
    "default_cfgs",
    "find_factory",
    "is_import",
    "is_ours",
    "is_own",
    "model_arguments",
    "near_model",
    "origin",
    "register",
    "timm_cfg",
    "try_out",
]
