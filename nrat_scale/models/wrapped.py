"""The normalisation around a model that does not normalise by itself: timm's models and users' classes."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.models.classifier import Channels, Normalised


class NormalisedModel(Normalised):
    """`model` for [0, 1] images: training, loading and evaluation all use this one wrapper.

    Its state dict is that of the model inside, so that weights are exchanged with timm and with the user's own code.

    Args:
        model: maps normalised images [B, C, H, W] to logits [B, K].
        num_classes, in_chans, mean, std: as for `Normalised`.

    Raises:
        UserError: as `Normalised`, or mean or std is no list of numbers.
    """

    def __init__(self, model: nn.Module, num_classes: int, in_chans: int, mean: Channels, std: Channels) -> None:
        for name, values in (("mean", mean), ("std", std)):
            holds = values is None or isinstance(values, list | tuple)
            if not holds or not all(isinstance(value, int | float) for value in values or ()):
                raise UserError(f"The {name} of the normalisation must be a list of numbers, not {quoted(values)}.")
        super().__init__(num_classes, in_chans, mean, std)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """That of the model inside, under its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of the model inside, under its own names."""
        return self.model.load_state_dict(state_dict, strict, assign)

    # timm's interface is that of the model inside.

    @property
    def pretrained_cfg(self) -> Any:
        return self.model.pretrained_cfg

    @property
    def num_features(self) -> int:
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def head_hidden_size(self) -> int:
        return int(getattr(self.model, "head_hidden_size", self.num_features))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.model.forward_features(self.normalise(x))  # type: ignore[operator]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(x, pre_logits=pre_logits)  # type: ignore[operator]

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.model.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))  # type: ignore[operator]
        self.num_classes = num_classes


def around_timm(model: nn.Module, arch: str, arguments: Mapping[str, Any], mean: Channels, std: Channels) -> nn.Module:
    """timm's `model` in its wrapper; `mean` and `std` are by default those that timm lists for the architecture.

    Raises:
        UserError: timm lists none and none are given, or they do not fit.
    """
    known = timm.get_pretrained_cfg(arch)
    constants = {name: getattr(known, name, None) if v is None else v for name, v in (("mean", mean), ("std", std))}
    if None in constants.values():
        raise UserError(f"timm knows no normalisation for {arch}. Give mean= and std=.")
    in_chans = arguments.get("in_chans", 3 if known is None else known.input_size[0])
    return NormalisedModel(model, int(model.num_classes), int(in_chans), **constants)  # type: ignore[arg-type]


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrapper, or `model` itself if it has none."""
    return model.model if isinstance(model, NormalisedModel) else model
