"""Models: names of published checkpoints, normalisation inside, timm's registry, specs."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nrat_scale.core.errors import UserError
from nrat_scale.models import Cnn4, ModelSpec, ResNet18, WideResNet, create, model_arguments, timm_cfg

OURS = ("wrn28_10_silu", "wrn28_10", "wrn34_10", "preact_resnet18", "resnet18_cifar", "cnn4")
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


class _Calls(TorchDispatchMode):
    """Records the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


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
    assert [block.padding for block in blocks] == [None] * 2 + [(0, 1, 0, 1), None] * 2
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.01}


@pytest.mark.parametrize("size", [32, 28, 8])
def test_wide_resnet_pads_without_a_copy_where_the_padding_is_symmetric(size):
    """Two copies in a forward pass, those of the stride-2 blocks; logits and gradients are those of padding by hand."""
    model = WideResNet(16, 1).double().eval()
    x = _images(2, 3, size, torch.float64).requires_grad_()
    with _Calls() as counted:
        logits = model(x)
    assert counted.names.count("aten::constant_pad_nd") == 2
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    for block in (block for stage in model.layer for block in stage.block):
        if block.padding is None:
            block.padding, block.conv_0.padding = (1, 1, 1, 1), (0, 0)
    expected = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


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


TIMM_ARGUMENTS = {
    "wrn28_10_silu": {"depth": 10, "width": 1},
    "wrn28_10": {"depth": 10, "width": 1},
    "wrn34_10": {"depth": 10, "width": 1},
    "preact_resnet18": {},
    "resnet18_cifar": {},
    "cnn4": {"width": 4, "in_chans": 3},
}


@pytest.fixture(params=["create_model", "local-dir", "trained"])
def timm_model(request, tmp_path):
    """`timm.create_model` for each way in: an untrained model, a release (`local-dir:`), the release's weights."""

    def made(name: str, **arguments: Any) -> nn.Module:
        given = {**TIMM_ARGUMENTS[name], "num_classes": 4}
        if request.param == "create_model":
            return timm.create_model(name, **{**given, **arguments}).eval()
        folder = tmp_path / name
        if not folder.is_dir():
            folder.mkdir()
            torch.manual_seed(0)
            model = timm.create_model(name, **given)
            save_file(model.state_dict(), folder / "model.safetensors")
            cfg = timm_cfg(model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"], (3, 16, 16), 4)
            config = {"architecture": name, "num_classes": 4, "model_args": given, "pretrained_cfg": cfg}
            (folder / "config.json").write_text(json.dumps(config))
        return timm.create_model(f"local-dir:{folder}", pretrained=request.param == "trained", **arguments).eval()

    return made


@pytest.mark.parametrize("name", OURS)
def test_timms_conventions_of_a_classifier(timm_model, name):
    """No classes mean pooled features; forward is head after features; the head can be replaced, unpooled, or read."""
    x = _images(2, 3, 16)
    model = timm_model(name)
    maps = model.forward_features(x)
    assert maps.ndim == 4 and maps.shape[:2] == (2, model.num_features)
    assert torch.equal(model.forward_head(maps), model(x)) and model(x).shape == (2, 4)
    pooled = model.forward_head(maps, pre_logits=True)
    assert pooled.shape == (2, model.num_features) and model.head_hidden_size == model.num_features
    assert torch.equal(model.get_classifier()(pooled), model(x))
    assert model.get_submodule(model.get_classifier(name_only=True)) is model.get_classifier()

    features = timm_model(name, num_classes=0)
    assert features(x).shape == (2, features.num_features) and features.num_classes == 0
    assert isinstance(features.get_classifier(), nn.Identity)
    model.double().reset_classifier(0)
    torch.testing.assert_close(model(x.double()).float(), pooled)  # the same features as before
    model.reset_classifier(7)
    assert model(x.double()).shape == (2, 7) and model.num_classes == 7 and not model.get_classifier().training
    model.reset_classifier(0, "")
    assert torch.equal(model(x.double()), model.forward_features(x.double()))
    model.reset_classifier(3, "catavgmax")
    assert model(x.double()).shape == (2, 3) and model.head_hidden_size == 2 * model.num_features
    with pytest.raises(UserError, match="global_pool '' gives maps"):
        model.reset_classifier(3, "")
    with pytest.raises(UserError, match=r"global_pool is 'agv'\. Did you mean 'avg'"):
        model.reset_classifier(3, "agv")


@pytest.mark.parametrize("timm_model", ["trained"], indirect=True)
def test_a_release_without_classes_keeps_its_other_weights(timm_model):
    """`num_classes=0` and `features_only=True` of a trained release give the features of its weights."""
    x, model = _images(2, 3, 16), timm_model("resnet18_cifar")
    maps, stages = model.forward_intermediates(x)
    assert torch.equal(timm_model("resnet18_cifar", num_classes=0)(x), maps.mean((2, 3)))
    found = timm_model("resnet18_cifar", features_only=True)(x)
    assert len(found) == 5 and all(map(torch.equal, found, stages)) and torch.equal(found[-1], maps)


@pytest.mark.parametrize("name", OURS)
def test_features_of_every_stage(timm_model, name):
    """`features_only=True`: maps of normalised images with the channels and strides that `feature_info` states."""
    x, last = _images(2, 3, 16), 4 if "resnet18" in name else 3
    model = timm_model(name, features_only=True)
    assert [tuple(found.shape) for found in model(x)] == [
        (2, channels, 16 // stride, 16 // stride)
        for channels, stride in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]
    assert not [
        key
        for key in model.state_dict()
        if key.endswith(("linear.weight", "logits.weight", "classifier.weight", "fc.weight"))
    ]
    chosen = timm_model(name, features_only=True, out_indices=(1, -1))
    assert chosen.feature_info.out_indices == (1, last) and len(chosen(x)) == 2
    first = timm_model(name, features_only=True, out_indices=[0])
    first(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in first.parameters()), "unused layers are dropped"
    with pytest.raises(UserError, match=f"has the stages 0 to {last}, not out_indices"):
        timm_model(name, features_only=True, out_indices=(0, 5))
    with pytest.raises(UserError, match="would leave out the normalisation"):
        timm_model(name, features_only=True, feature_cls="hook")


def test_features_see_the_normalised_image():
    """The first stage of a model with mean and std is that of the identity's on (x - mean) / std."""
    model, identity = ResNet18(mean=MEAN, std=STD).eval(), ResNet18(mean=(0.0,), std=(1.0,)).eval()
    identity.load_state_dict(model.state_dict())
    x = _images(2, 3, 8)
    for mine, theirs in zip(
        model.forward_intermediates(x, intermediates_only=True),
        identity.forward_intermediates(model.normalise(x), intermediates_only=True),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    wide = WideResNet(10, 1).eval()
    features, stages = wide.forward_intermediates(x, norm=True)
    assert torch.equal(features, stages[-1]), "norm=True applies the last BatchNorm and activation"
    assert len(wide.forward_intermediates(x, indices=[1], stop_early=True)[1]) == 1


@pytest.mark.parametrize("name", OURS)
def test_the_arguments_of_timms_training_script(timm_model, name):
    """drop_rate acts in training mode; rates of layers that the models lack are accepted as 0 and refused otherwise."""
    x = _images(4, 3, 16)
    model = timm_model(name, drop_rate=0.5, drop_path_rate=0.0, drop_block_rate=None, global_pool="max")
    assert model.drop_rate == 0.5 and model.global_pool.pool_type == "max"
    assert torch.equal(model(x), model(x)), "no dropout in evaluation mode"
    features = model.forward_features(x)
    model.train()
    dropped = (model.forward_head(features, pre_logits=True) == 0) & (features.amax((2, 3)) != 0)
    assert dropped.any() and not torch.equal(model.forward_head(features), model.forward_head(features))
    for arguments, message in (
        ({"drop_path_rate": 0.1}, "drop_path_rate is 0.1; it must be 0: .* has no such layers"),
        ({"drop_rate": 1.5}, r"drop_rate is 1\.5; it must be in \[0, 1\)"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"global_pool": ""}, "global_pool '' gives maps"),
    ):
        with pytest.raises(UserError, match=message):
            timm_model(name, **arguments)
    with pytest.raises(UserError, match="no gradient checkpointing"):
        model.set_grad_checkpointing()
    model = timm_model(name, device="meta", dtype=torch.float64)
    assert {(value.device.type, value.dtype) for value in (*model.parameters(), model.mean)} == {
        ("meta", torch.float64)
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["wide", "resnet18", "cnn4"])
def test_torchscript_takes_the_models(family):
    """As timm's own tests ask of its models."""
    model, x = _small(family).eval(), _images(2, 3, 8)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


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
    torch.manual_seed(0)  # some random models of this size hardly depend on their input
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
        (
            "cnn4",
            {"mean": (125.3,)},
            r"mean of the normalisation is \[125\.3\]; it is of \[0, 1\] pixels\. Divide by 255",
        ),
        ("cnn4", {"std": (63.0,)}, "Divide by 255"),
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
