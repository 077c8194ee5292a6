"""Register a release under the name that RobustBench asks timm for."""

from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.loading.load import load

_DATASETS, _THREAT_MODELS = ("cifar10", "cifar100", "imagenet"), ("Linf", "L2", "corruptions")
_registered: dict[str, str] = {}  # timm name -> source


def register_robustbench(source: str | Path, name: str, dataset: str = "cifar10", threat_model: str = "Linf") -> str:
    """Let RobustBench's `load_model(name, dataset=dataset, threat_model=threat_model)` find a release.

    RobustBench asks timm for `<name>_<dataset>_<threat_model>`, in lower case with `_` for `-`, before its own zoo.

    Args:
        source: as for `load`.
        name: the name for the model.
        dataset: `cifar10`, `cifar100` or `imagenet`.
        threat_model: `Linf`, `L2` or `corruptions`; RobustBench asks for the latter for `corruptions_3d` too.

    Returns:
        The name registered with timm.

    Raises:
        UserError: the name is taken or invalid, or RobustBench has no such data set or threat model.
    """
    for what, value, known in (("data set", dataset, _DATASETS), ("threat model", threat_model, _THREAT_MODELS)):
        if value not in known:
            raise UserError(
                f"RobustBench has no {what} '{value}' and would never ask for it. {did_you_mean(value, known)}"
            )
    # Absolute: the working directory may change before the model is loaded.
    source = str(Path(source).resolve() if Path(source).exists() else source)
    entry = f"{name.lower().replace('-', '_')}_{dataset.lower()}_{threat_model.lower()}"
    if not entry.isidentifier():
        raise UserError(f"'{name}' cannot be the name of a model: use letters, digits, - and _.")
    if _registered.get(entry) == source:
        return entry
    if timm.is_model(entry):
        raise UserError(f"timm knows a model {entry} already. Choose another name.")

    def create(pretrained: bool = False, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
        if not pretrained:
            raise UserError(f"{entry} is a trained model: use pretrained=True.")
        if others := [key for key, value in kwargs.items() if value]:  # None, 0 and False are timm's for "not set"
            raise UserError(f"{entry} is a trained model and takes no {', '.join(others)}.")
        model = load(source)
        if num_classes == 0:  # features, as for every model of timm
            model.reset_classifier(0)  # type: ignore[operator]
        elif num_classes not in (None, model.num_classes):
            raise UserError(f"{source} has {model.num_classes} classes, not {num_classes}.")
        return model

    create.__name__, create.__module__ = entry, __name__
    register_model(create)
    _registered[entry] = source
    return entry
