"""Models: names of published checkpoints, normalisation inside, timm's registry, specs."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
from nrat_scale.models import Cnn4, ModelSpec, ResNet18, WideResNet, create, model_arguments

OURS = ("wrn28_10_silu", "wrn28_10", "resnet18_cifar", "cnn4")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def _images(count: int, channels: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _small(family: str, **arguments: Any) -> nn.Module:
    """A model of each class that is fast on a CPU."""
    if family == "wide":
        return WideResNet(10, 1, **arguments)
    if family == "resnet18":
        return ResNet18(**arguments)
    return Cnn4(**{"in_chans": 3, "width": 4, "hidden": 8, **arguments})


# ---- names ----------------------------------------------------------------------------------------------------------


def test_wide_resnet_from_timm_has_the_names_of_robustbench():
    """timm's `wrn28_10_silu` is the golden WRN-28-10: names, order and shapes; mean and std are not among them."""
    expected = json.loads((Path(__file__).parents[0] / "golden" / "wrn28_10_state_names.json").read_text())
    for name, activation in (("wrn28_10_silu", nn.SiLU), ("wrn28_10", nn.ReLU)):
        with torch.device("meta"):
            model = timm.create_model(name)
        state = model.state_dict()
        assert list(state) == list(expected)
        assert {key: list(value.shape) for key, value in state.items()} == expected
        kinds = {type(module) for module in model.modules() if isinstance(module, (nn.SiLU, nn.ReLU))}
        assert kinds == {activation}


def test_wide_resnet_padding_and_momentum():
    """Padding is asymmetric with stride 2; the momentum of every BatchNorm is 0.01."""
    model = WideResNet(16, 1)
    blocks = [block for stage in model.layer for block in stage.block]
    assert [block.padding for block in blocks] == [(1, 1, 1, 1)] * 2 + [(0, 1, 0, 1), (1, 1, 1, 1)] * 2
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.01}


def test_resnet18_has_the_usual_names_and_loads_a_public_checkpoint():
    """conv1, layer1.0.conv1, shortcut.0, linear: the CIFAR-10 checkpoint that AutoAttack ships loads strictly."""
    model = ResNet18()
    state = model.state_dict()
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight", "linear.bias"} <= set(
        state
    )
    package = importlib.util.find_spec("pyautoattack")
    assert package is not None and package.origin is not None
    checkpoint = Path(package.origin).parent / "examples" / "model_test.pt"
    published = torch.load(checkpoint, map_location="cpu", weights_only=True)
    published = {name.removeprefix("module."): value for name, value in published.items()}
    model.load_state_dict(published, strict=True)
    assert list(published) == list(state)


# ---- timm's registry ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_registered_with_timm(name):
    """`timm.create_model(name, num_classes=, in_chans=, mean=, std=)` respects its arguments."""
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, in_chans=2, mean=(0.1, 0.2), std=(0.3, 0.4))
        logits = model.eval()(torch.empty(3, 2, 32, 32))
    assert logits.shape == (3, 7)
    assert (model.num_classes, model.in_chans) == (7, 2)
    assert model.get_classifier().out_features == 7
    assert model.get_classifier().in_features == model.num_features
    # timm's tools read these: names of layers, and constants that prevent a second normalisation.
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 2
    assert set(cfg["mean"]) == {0.0} and set(cfg["std"]) == {1.0}


def test_create_is_timms_create_model():
    """`create` adds only error sentences; timm's own models can be used too."""
    ours = create("cnn4", {"num_classes": 3, "in_chans": 1, "width": 4, "mean": [0.3], "std": [0.2]})
    assert isinstance(ours, Cnn4) and ours.mean.item() == pytest.approx(0.3) and ours.features[0].out_channels == 4
    assert create("resnet10t", {"num_classes": 3}).num_classes == 3


def test_model_arguments_rebuild_the_model():
    """A release stores the kwargs of the spec and its mean and std, or else those of the data set."""
    spec = ModelSpec("cnn4", kwargs={"width": 4})
    arguments = model_arguments(spec, 10, 3, MEAN, STD)
    assert arguments == {"width": 4, "num_classes": 10, "in_chans": 3, "mean": list(MEAN), "std": list(STD)}
    own = model_arguments(ModelSpec("cnn4", mean=[0.5], std=[0.1]), 10, 3, MEAN, STD)
    assert (own["mean"], own["std"]) == ([0.5], [0.1])
    assert json.loads(json.dumps(arguments)) == arguments


# ---- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wide", "resnet18", "cnn4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisation_is_inside(family, dtype):
    """model(x) equals the model with mean 0 and std 1 on (x - mean) / std, also in float64."""
    model = _small(family, mean=MEAN, std=STD).to(dtype).eval()
    identity = _small(family, mean=(0.0,), std=(1.0,)).to(dtype).eval()
    identity.load_state_dict(model.state_dict())
    x = _images(2, 3, 32, dtype)
    mean, std = (torch.tensor(values).to(dtype).view(1, 3, 1, 1) for values in (MEAN, STD))
    logits = model(x)
    assert logits.dtype == dtype and logits.shape == (2, 10)
    torch.testing.assert_close(logits, identity((x - mean) / std), rtol=1e-5, atol=1e-5)
    assert (logits - identity(x)).abs().max() > 1e-3
    assert torch.equal(model.normalise(x), (x - mean) / std)


@pytest.mark.parametrize("family", ["wide", "resnet18", "cnn4"])
def test_constants_are_not_weights(family):
    """mean and std are in no state dict and no parameter, but they are moved and cast with the model."""
    model = _small(family, mean=MEAN, std=STD)
    assert not {name for name in model.state_dict() if name.endswith(("mean", "std")) and "running" not in name}
    assert {name for name, _ in model.named_buffers()} >= {"mean", "std"}
    assert not {name for name, _ in model.named_parameters()} & {"mean", "std"}
    assert model.double().mean.dtype == torch.float64


def test_one_value_serves_all_channels():
    """A single mean or std is repeated for all channels."""
    model = _small("cnn4", mean=[0.5], std=[0.25])
    assert model.mean.flatten().tolist() == [0.5] * 3 and model.std.flatten().tolist() == [0.25] * 3


@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_cnn4_takes_any_image_size(size):
    """Digits of 16 x 16, Fashion-MNIST of 28 x 28."""
    assert Cnn4(width=4, hidden=8)(_images(2, 1, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18_cifar", {"mean": (0.5, 0.5)}, "^The model has 3 input channels but 2 values of mean"),
        ("resnet18_cifar", {"std": (0.5,) * 4}, "3 input channels but 4 values of std"),
        ("cnn4", {"in_chans": 3, "mean": ()}, "3 input channels but 0 values of mean"),
        ("cnn4", {"std": (0.0,)}, "^The std of the normalisation must be positive"),
        ("cnn4", {"std": (-1.0,)}, "std of the normalisation must be positive"),
        ("cnn4", {"std": (math.nan,)}, "std of the normalisation must be positive"),
        ("cnn4", {"std": (math.inf,)}, "std of the normalisation must be positive"),
        ("cnn4", {"mean": (math.nan,)}, "mean of the normalisation must be finite"),
        ("cnn4", {"mean": ("grey",)}, "does not take these arguments"),
        ("wrn28_10", {"depth": 11}, "depth 6 n \\+ 4 .*not 11"),
        ("wrn28_10", {"depth": 4}, "depth 6 n \\+ 4 .*not 4"),
        ("wrn28_10", {"activation": "sliu"}, "activation of a WideResNet is 'sliu'. Did you mean 'silu'"),
        ("cnn4", {"wdith": 3}, "'cnn4' does not take these arguments .*wdith"),
        ("cnn4", {"width": -3}, "'cnn4' does not take these arguments"),
        ("resnet18_cifer", {}, "Did you mean 'resnet18_cifar'"),
        ("no such thing", {}, "Known: cnn4, "),
        ("hf-hub:somebody/model", {}, "Unknown model"),
    ],
)
def test_wrong_arguments_are_refused(name, arguments, message):
    """A wrong constant, argument or name raises a sentence instead of an error of torch."""
    with pytest.raises(UserError, match=message):
        create(name, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bn": "group"}, r"model\.bn is 'group'\. Did you mean 'groups'"),
        ({"bn": "groups"}, "model.bn groups and model.bn_group_size go together"),
        ({"bn_group_size": 4}, "model.bn groups and model.bn_group_size go together"),
        ({"bn": "sync", "bn_group_size": 4}, "model.bn groups and model.bn_group_size go together"),
        ({"bn": "groups", "bn_group_size": 1}, "bn_group_size is 1; it must be at least 2"),
        ({"bn": "groups", "bn_group_size": -4}, "bn_group_size is -4; it must be at least 2"),
        ({"bn_momentum": 1.5}, r"model\.bn_momentum is 1\.5; it must be in \[0, 1\]"),
    ],
)
def test_a_spec_checks_itself(arguments, message):
    """A recipe with unknown or contradicting model settings fails before any data are read."""
    with pytest.raises(UserError, match=message):
        ModelSpec(**arguments)
