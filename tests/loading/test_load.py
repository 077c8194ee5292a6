"""Loading a release folder: it loads in one line, or one sentence explains why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.loading.load import load
from nrat_scale.loading.release_folder import verify
from tests.support.small_releases import same_logits, write_release


def _images(count: int, channels: int, size: int) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def _release(folder: Path, architecture: str = "cnn4", **arguments: Any) -> nn.Module:
    """A release folder written by hand, in timm's format; the model whose weights it holds."""
    arguments = {"num_classes": 4, "in_chans": 2, "mean": [0.3, 0.4], "std": [0.2, 0.1], **arguments}
    model = timm.create_model(architecture, **arguments).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": arguments["num_classes"],
        "num_features": model.num_features,
        "label_names": [f"class {i}" for i in range(arguments["num_classes"])],
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": arguments["num_classes"],
            "input_size": [arguments["in_chans"], 16, 16],
            "fixed_input_size": False,
            "mean": [0.0] * arguments["in_chans"],
            "std": [1.0] * arguments["in_chans"],
            "first_conv": model.pretrained_cfg["first_conv"],
            "classifier": model.pretrained_cfg["classifier"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["plain", "with blank", "name@1"])
def test_release_folder_loads_in_one_line(tmp_path, name, channels):
    """`nrat_scale.load(folder)` and `timm.create_model("local-dir:folder", pretrained=True)` are the same model."""
    constants = {"in_chans": channels, "mean": [0.3] * channels, "std": [0.2] * channels}
    saved = _release(tmp_path / name, width=4, hidden=8, **constants)
    x = _images(3, channels, 16)
    loaded = nrat_scale.load(tmp_path / name)
    assert not loaded.training and loaded.num_classes == 4
    assert torch.equal(loaded(x), saved(x))
    assert torch.equal(load(str(tmp_path / name))(x), saved(x))
    by_timm = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
    if channels in (1, 3):  # for other numbers older versions of timm re-initialise the first layer
        assert torch.equal(by_timm(x), saved(x))
    assert by_timm.pretrained_cfg["label_names"] == [f"class {i}" for i in range(4)]


def test_release_with_batchnorm_keeps_its_statistics(tmp_path):
    """The running statistics are saved and used: the model is loaded in evaluation mode."""
    saved = _release(tmp_path, "resnet18_cifar")
    state = saved.state_dict()
    state["bn1.running_mean"].fill_(0.5)
    state["bn1.num_batches_tracked"].fill_(7)
    save_file(state, tmp_path / "model.safetensors")
    saved.load_state_dict(state)
    loaded = load(tmp_path)
    assert loaded.state_dict()["bn1.num_batches_tracked"] == 7
    assert torch.equal(loaded(_images(2, 2, 8)), saved(_images(2, 2, 8)))


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_incomplete_release_is_refused(tmp_path, missing):
    """The message names the missing file and the command that makes a release."""
    _release(tmp_path, width=4, hidden=8)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=rf"has no {missing}.*nrat_scale\.release"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    """A folder with only pytorch_model.bin is refused: timm would unpickle it, we never do."""
    model = _release(tmp_path, width=4, hidden=8)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load(tmp_path)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _garble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def _drop_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["features.2.bias"]
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _garble_header,
        _drop_tensor,
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "config.json").write_text(""),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        lambda folder: _edit(folder, architecture="cnn5"),
        lambda folder: _edit(folder, architecture="resnet18_cifar"),
        lambda folder: _edit(folder, model_args=[1]),
        lambda folder: _edit(folder, model_args={"widht": 3}),
        lambda folder: _edit(folder, model_args={"width": 5}),
        lambda folder: _edit(folder, model_args={"mean": [0.1] * 7}),
        # timm would accept these and keep the random weights of the last or first layer.
        lambda folder: _edit(folder, model_args={"num_classes": 6}),
        lambda folder: _edit(folder, model_args={"in_chans": 4, "mean": [0.1], "std": [0.2]}),
    ],
)
def test_damaged_release_is_refused(tmp_path, damage):
    """Damaged, missing or contradicting contents raise one sentence that names the release."""
    folder = tmp_path / "released"
    _release(folder, width=4, hidden=8)
    load(folder)
    damage(folder)
    with pytest.raises(UserError, match=r"released cannot be loaded: .") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "./no/where", "/nowhere", "~/nowhere", "a/b/c"])
def test_missing_folder_is_refused(source):
    """A mistyped path does not start a download."""
    with pytest.raises(UserError, match="is not a release folder and does not have the Hub's form"):
        load(source)


def test_a_release_of_an_earlier_version_loads() -> None:
    """A release that abbf399 wrote matches its manifest and has the logits of the run's weights that it was made from."""
    golden = Path(__file__).parents[1] / "golden" / "abbf399"
    verify(golden / "release", everything=True)
    arguments = json.loads((golden / "run" / "model.json").read_text())["model_args"]
    for checkpoint in (golden / "run" / "checkpoints").glob("step-*"):
        if (checkpoint / "ema.safetensors").read_bytes() == (golden / "release" / "model.safetensors").read_bytes():
            weights = checkpoint / "ema.safetensors"
    constants = {name: arguments.pop(name) for name in ("mean", "std")}
    file = load(weights, arch="cnn4", **constants, **arguments)
    assert same_logits(load(golden / "release"), file, (3, 1, 16, 16))


def test_a_release_of_a_timm_model_takes_pixels(tmp_path: Path) -> None:
    """The constants of `pretrained_cfg`, as timm's own repositories have them, are applied first."""
    net = timm.create_model("test_resnet", num_classes=4).eval()
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    changes = {"architecture": "test_resnet", "num_classes": 4, "model_args": {}, "pretrained_cfg": cfg}
    loaded = load(write_release(tmp_path / "r", net, **changes))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net((x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1))
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="must be a list of numbers"):
        load(write_release(tmp_path / "r", net, **{**changes, "pretrained_cfg": {"mean": "grey"}}))


def test_a_loaded_timm_model_keeps_timms_conventions(tmp_path: Path) -> None:
    """Features and a new head of a timm model that normalises its input now are those of the model inside."""
    net = timm.create_model("test_resnet", num_classes=4).eval()
    loaded = load(write_release(tmp_path / "r", net, architecture="test_resnet", num_classes=4, model_args={}))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = loaded.forward_features(x)
    assert torch.equal(loaded.forward_head(features), loaded(x))
    pooled = loaded.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, loaded.head_hidden_size) and features.shape[1] == loaded.num_features
    assert loaded.get_classifier() is loaded.model.get_classifier()
    loaded.reset_classifier(0)
    assert torch.equal(loaded(x), pooled) and loaded.num_classes == 0
    loaded.reset_classifier(7, "max")
    assert loaded(x).shape == (2, 7) and loaded.num_classes == 7
