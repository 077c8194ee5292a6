"""The base of our models: normalisation of the input, and the interface that timm's users expect of a classifier."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, create_classifier
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, check_choice, check_value
from nrat_scale.datasets import DATASETS

Channels = Sequence[float] | None  # one value for each channel, or one for all
POOLINGS = ("avg", "max", "avgmax", "catavgmax")  # timm's names; "" is none

_LARGEST_CONSTANT = 10.0  # of mean and std; larger ones are of bytes


class Normalised(nn.Module):
    """A classifier that normalises its input.

    Args:
        num_classes: K.
        in_chans: C.
        mean, std: one value for each channel, or one for all; None means CIFAR-10's if C = 3, else 0.5.

    Raises:
        UserError: mean or std does not fit C, is not finite, or std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int, in_chans: int, mean: Channels, std: Channels) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        cifar10 = DATASETS["cifar10"]
        for name, given, default in (("mean", mean, cifar10.mean), ("std", std, cifar10.std)):
            default = default if in_chans == 3 else (0.5,)
            values = [float(value) for value in (default if given is None else given)]
            if len(values) not in (1, in_chans):
                shown = f"{len(values)} values of {name}: {given}"
                raise UserError(f"The model has {in_chans} input channels but {shown}. Give {name}= for its channels.")
            values *= in_chans // len(values)
            if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
                wanted = "finite" if name == "mean" else "positive"
                raise UserError(f"The {name} of the normalisation must be {wanted}, not {values}.")
            if max(map(abs, values)) > _LARGEST_CONSTANT:
                raise UserError(f"The {name} of the normalisation is {values}; it is of [0, 1] pixels. Divide by 255.")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def normalise(self, x: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (x - self.mean) / self.std


class Classifier(Normalised):
    """timm's interface: `forward` is `forward_head(forward_features(x))`, and `reset_classifier` replaces the head.

    A subclass builds its layers, calls `reset_classifier` when the last layer is due, and defines `forward_features`,
    `forward_head`, `_stages` and, if its features go through further layers, `_final`.

    Args:
        num_classes: K, or 0 for features.
        in_chans, mean, std: as for `Normalised`.
        num_features: channels of `forward_features`.
        drop_rate: dropout before the last layer, in training mode.

    Attributes:
        head_hidden_size: width of the pooled features (twice `num_features` with `catavgmax`).
        feature_info: of each stage of `forward_intermediates`, in timm's format.

    Raises:
        UserError: as `Normalised`, or drop_rate is not in [0, 1).
    """

    if TYPE_CHECKING:  # torch.jit.script takes annotations of modules for those of values
        global_pool: SelectAdaptivePool2d
    last_layer: str
    stages: tuple[tuple[int, tuple[str, ...]], ...]  # for each stage the stride up to it, and the names of its layers
    final_layers: tuple[str, ...] = ()  # with weights, between the last stage and the features
    final_is_norm = False  # whether those only normalise the last stage

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        mean: Channels,
        std: Channels,
        num_features: int,
        stage_channels: Sequence[int],
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, mean, std)
        check_value("drop_rate", drop_rate, 0.0 <= drop_rate < 1.0, "in [0, 1)")
        self.drop_rate, self.num_features = float(drop_rate), num_features
        self.feature_info = [
            {"num_chs": count, "reduction": stride, "module": layers[-1]}
            for count, (stride, layers) in zip(stage_channels, self.stages, strict=True)
        ]

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        return self.last_layer if name_only else self.get_submodule(self.last_layer)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one, by none if `num_classes` is 0; `global_pool` None keeps the pooling.

        Raises:
            UserError: `global_pool` is not in POOLINGS, or is '' although there is a last layer.
        """
        pooling = str(self.global_pool.pool_type) if global_pool is None else global_pool
        if pooling:
            check_choice("global_pool", pooling, POOLINGS)
        check_value("num_classes", num_classes, num_classes >= 0, "at least 0")
        if num_classes and not pooling:
            raise UserError("global_pool '' gives maps, which the last layer cannot take. Set num_classes=0 as well.")
        weight = next(self.parameters())
        made = create_classifier(
            self.num_features, num_classes, pool_type=pooling, device=weight.device, dtype=weight.dtype
        )
        self.global_pool, layer = (module.train(self.training) for module in made)
        setattr(self, self.last_layer, layer)
        self.num_classes, self.head_hidden_size = num_classes, self.num_features * self.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch; the models are too small to need it. Raises `UserError` if `enable` is set."""
        if enable:
            raise UserError(f"{type(self).__name__} has no gradient checkpointing. Use a smaller batch.")

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> features [B, num_features, h, w], not pooled."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits [B, K], or, with `pre_logits` or K = 0, pooled features [B, head_hidden_size]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _pooled(self, x: Tensor) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x

    # ---- features of every stage (timm's `features_only=True`) ---------------------------------------------------------

    def _stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The stages, the first one with the normalisation; then `_final` gives the features."""
        raise NotImplementedError

    def _final(self, x: Tensor) -> Tensor:
        return x

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """The numbers of the stages that `indices` names, as in timm: the last n, a list, or all (None)."""
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            taken = list(range(count - last, count)) if last > 0 else []
        else:
            taken = [count + index if index < 0 else index for index in indices]
        if not taken or not all(0 <= index < count for index in taken):
            raise UserError(f"{type(self).__name__} has the stages 0 to {count - 1}, not out_indices={indices}.")
        return taken

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The features and those of the stages `indices`, as timm's models give them.

        Args:
            x: images [B, C, H, W] in [0, 1].
            indices: the last n stages, a list of their numbers, or None for all.
            norm: apply a WideResNet's last BatchNorm and activation to the last stage too.
            stop_early: compute no stage behind the last of `indices`; its output takes the place of the features.
            output_fmt: `NCHW`.
            intermediates_only: leave the features out.

        Returns:
            (features, [stage, ...]), or the list alone.

        Raises:
            UserError: there is no such stage, or another format is asked for.
        """
        check_choice("output_fmt", str(getattr(output_fmt, "value", output_fmt)), ("NCHW",))
        taken, stages, found = self._taken(indices), self._stages(), []
        for number, stage in enumerate(stages[: max(taken) + 1] if stop_early or intermediates_only else stages):
            x = stage(x)
            if number in taken:
                last = norm and self.final_is_norm and number == len(stages) - 1
                found.append(self._final(x) if last else x)
        if intermediates_only:
            return found
        return (x if stop_early and max(taken) < len(stages) - 1 else self._final(x)), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the weights behind the last stage of `indices`, for `features_only`; returns the stages' numbers."""
        taken = self._taken(indices)
        last = max(taken)
        unused = [name for _, layers in self.stages[last + 1 :] for name in layers]
        if prune_norm or unused:
            unused += self.final_layers
            self.num_features = self.feature_info[last]["num_chs"]  # type: ignore[assignment]
        for name in unused:
            self.set_submodule(name, nn.Identity())
        if prune_head or unused:
            self.reset_classifier(0, "")
        return taken
