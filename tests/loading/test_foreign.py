"""Weight files load exactly or are refused in a sentence; nothing in them is ever run."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
from nrat_scale.loading.foreign import pretrained
from nrat_scale.loading.load import load
from nrat_scale.models import create
from tests.support.small_releases import ARGUMENTS, same_logits

# ---- RobustBench's layouts, from names and shapes -------------------------------------------------------------------


class DMBlock(nn.Module):
    """A block of the DeepMind WideResNet in RobustBench's layout."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        v = F.silu(self.batchnorm_0(x))
        y = self.shortcut(v) if hasattr(self, "shortcut") else x
        v = F.pad(v, (0, 1, 0, 1)) if self.stride == 2 else F.pad(v, (1, 1, 1, 1))
        return y + self.conv_1(F.silu(self.batchnorm_1(self.conv_0(v))))


class DMGroup(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(DMBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(4))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DMLayout(nn.Module):
    """WideResNet-28-10 with the constants outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.init_conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer = nn.Sequential(DMGroup(16, 160, 1), DMGroup(160, 320, 2), DMGroup(320, 640, 2))
        self.batchnorm = nn.BatchNorm2d(640)
        self.logits = nn.Linear(640, 10)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
        out = F.silu(self.batchnorm(self.layer(self.init_conv((x - mean) / std))))
        return self.logits(F.avg_pool2d(out, 8).flatten(1))


@pytest.mark.medium
def test_wide_resnet_weights_go_both_ways(tmp_path: Path) -> None:
    """RobustBench's state dict loads strictly into our model and ours into theirs, and the logits agree."""
    torch.manual_seed(1)
    theirs = DMLayout().eval()
    names = json.loads((Path(__file__).parents[1] / "golden" / "wrn28_10_state_names.json").read_text())
    assert set(theirs.state_dict()) == set(names)
    torch.save(theirs.state_dict(), tmp_path / "dm.pt")
    ours = load(tmp_path / "dm.pt", arch="wrn28_10_silu")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    back = DMLayout()
    back.load_state_dict(ours.state_dict(), strict=True)


def test_the_resnet_in_the_wheel_of_pyautoattack_loads_strictly() -> None:
    """A standard ResNet-18 in the usual CIFAR layout gives the logits of that layout, written out here."""
    path = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    ours = load(path, arch="resnet18_cifar", mean=[0.0] * 3, std=[1.0] * 3)
    state = torch.load(path, weights_only=True, map_location="cpu")
    assert set(state) == set(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)

    def norm(name: str, z: Tensor) -> Tensor:
        return F.batch_norm(
            z,
            state[f"{name}.running_mean"],
            state[f"{name}.running_var"],
            state[f"{name}.weight"],
            state[f"{name}.bias"],
        )

    out = F.relu(norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            z = F.relu(norm(f"{name}.bn1", F.conv2d(out, state[f"{name}.conv1.weight"], stride=stride, padding=1)))
            z = norm(f"{name}.bn2", F.conv2d(z, state[f"{name}.conv2.weight"], padding=1))
            if f"{name}.shortcut.0.weight" in state:
                out = norm(f"{name}.shortcut.1", F.conv2d(out, state[f"{name}.shortcut.0.weight"], stride=stride))
            out = F.relu(z + out)
    expected = F.linear(F.avg_pool2d(out, 4).flatten(1), state["linear.weight"], state["linear.bias"])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


# ---- weight files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {f"module.model.{k}": v for k, v in s.items()},
        lambda s: {f"module.1.{k}": v for k, v in s.items()} | {"module.0.mean": torch.tensor([[[0.3]]]), "module.0.std": torch.tensor([[[0.2]]])},
        lambda s: {f"model.{k}": v for k, v in s.items()} | {"mu": torch.tensor([0.3]), "sigma": torch.tensor([0.2])},
    ],
)  # fmt: skip
def test_the_usual_wrappings(model: nn.Module, tmp_path: Path, wrap: Any) -> None:
    """Prefixes, containers and normalising Sequentials are unwrapped; given constants take precedence over saved ones."""
    content = wrap(dict(model.state_dict()))
    torch.save(content, tmp_path / "w.pt")
    holds = any("mean" in name or "mu" in name for name in content)
    constants = {} if holds else {"mean": [0.3], "std": [0.2]}
    assert same_logits(load(tmp_path / "w.pt", arch="cnn4", width=4, hidden=8, **constants), model)
    assert not same_logits(load(tmp_path / "w.pt", arch="cnn4", width=4, hidden=8, mean=[0.1], std=[0.2]), model)


def test_classes_and_channels_follow_from_a_safetensors_file(tmp_path: Path) -> None:
    """num_classes and in_chans are inferred from the shapes."""
    net = create("cnn4", {"num_classes": 7, "in_chans": 2, "mean": [0.5, 0.5], "std": [0.5, 0.5]})
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    loaded = load(tmp_path / "w.safetensors", arch="cnn4")
    assert (loaded.num_classes, loaded.in_chans) == (7, 2)


@pytest.mark.parametrize("extra", [{"acc": torch.tensor(0.5)}, {"epoch": 3, "best_acc": 0.5}])
def test_values_beside_the_state_dict(model: nn.Module, tmp_path: Path, extra: dict[str, Any]) -> None:
    """An accuracy saved as a tensor does not hide the state dict; of two state dicts none is chosen, and both are named."""
    state = dict(model.state_dict())
    torch.save({"net": state, **extra}, tmp_path / "w.pt")
    assert same_logits(load(tmp_path / "w.pt", arch="cnn4", width=4, hidden=8, mean=[0.3], std=[0.2]), model)
    torch.save({"state_dict": state, "ema": state, **extra}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="'state_dict', 'ema'"):
        load(tmp_path / "w.pt", arch="cnn4", width=4, hidden=8)


def test_two_normalisations_are_refused(model: nn.Module, tmp_path: Path) -> None:
    """The error shows the constants of both, unless the caller gives some."""
    constants = {f"{at}.{name}": torch.tensor([v]) for at, v in ((0, 0.5), (1, 0.25)) for name in ("mean", "std")}
    torch.save({**{f"1.{key}": value for key, value in model.state_dict().items()}, **constants}, tmp_path / "w.pt")
    arguments = {"arch": "cnn4", "width": 4, "hidden": 8}
    with pytest.raises(UserError, match=r"more than one mean of a normalisation: \[0\.5\] and \[0\.25\]"):
        load(tmp_path / "w.pt", **arguments)
    assert same_logits(load(tmp_path / "w.pt", mean=[0.3], std=[0.2], **arguments), model)


@pytest.mark.parametrize("how", ["given", "saved", "timm's"])
def test_a_weight_file_of_a_timm_model_takes_pixels(tmp_path: Path, how: str) -> None:
    """timm's models do not normalise their input: given, saved or timm's constants are applied first."""
    net = timm.create_model("resnet10t", num_classes=4).eval()
    mean, std = (
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if how == "timm's" else ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    )
    saved = {"mean": torch.tensor(mean), "std": torch.tensor(std)} if how == "saved" else {}
    torch.save({**net.state_dict(), **saved}, tmp_path / "w.pt")
    given = {"mean": mean, "std": std} if how == "given" else {}
    loaded = load(tmp_path / "w.pt", arch="resnet10t", **given)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    assert (loaded.num_classes, loaded.in_chans) == (4, 3)
    assert loaded.mean.flatten().tolist() == pytest.approx(mean)


@pytest.mark.parametrize("zipped", [True, False])
@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4))
@example(changes=[(164, 141)])  # a length of exabytes
def test_damaged_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, changes: list[tuple[int, int]]
) -> None:
    """Whatever torch raises on changed bytes (KeyError, IndexError, ...) becomes one sentence."""
    path = tmp_path_factory.mktemp("w") / "w.pt"
    torch.save(create("cnn4", ARGUMENTS).state_dict(), path, _use_new_zipfile_serialization=zipped)
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position] = value
    path.write_bytes(data)
    sentence = ""
    try:
        load(path, arch="cnn4", width=4, hidden=8)
    except UserError as error:
        sentence = str(error)
    assert not sentence or sentence.isprintable()


@pytest.mark.parametrize("opcodes", [b"\x80\x02h\x07.", b"\x80\x02e.", b"\x80\x02(Rq\x00."])
def test_broken_pickles_are_refused(tmp_path: Path, opcodes: bytes) -> None:
    """A value that was never stored, or an operation on an empty stack, makes torch raise KeyError or IndexError."""
    (tmp_path / "w.pt").write_bytes(opcodes)
    with pytest.raises(UserError, match=r"cannot be read|is not opened"):
        load(tmp_path / "w.pt", arch="cnn4")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    """Neither torch's format nor a bare pickle."""
    torch.save({"state_dict": Trap(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="could run code"):
            load(tmp_path / name, arch="cnn4")
    assert not (tmp_path / "ran").exists()


def test_differences_are_named(model: nn.Module, tmp_path: Path) -> None:
    """Missing and additional tensors, other shapes, unknown architectures, options that do not apply."""
    state = dict(model.state_dict())
    state["extra"] = state.pop("classifier.bias")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"'classifier.bias' is missing; 'extra' is not part of it"):
        load(tmp_path / "w.pt", arch="cnn4", width=4, hidden=8)
    torch.save(dict(model.state_dict()), tmp_path / "w.pt")
    with pytest.raises(UserError, match="instead of"):
        load(tmp_path / "w.pt", arch="cnn4", width=8)
    with pytest.raises(UserError, match="Did you mean 'cnn4'"):
        load(tmp_path / "w.pt", arch="cnn5")
    with pytest.raises(UserError, match="arch="):
        load(tmp_path / "w.pt")
    with pytest.raises(UserError, match="need arch="):
        load(tmp_path, mean=[0.1])
    with pytest.raises(UserError, match="no weight file"):
        load(tmp_path / "nowhere.pt", arch="cnn4")
    torch.save({"a": {"x": torch.zeros(1)}, "b": 3}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="expected one state dict"):
        load(tmp_path / "odd.pt", arch="cnn4")
    torch.save({"mean": torch.zeros(1), "std": torch.ones(1)}, tmp_path / "constants.pt")
    with pytest.raises(UserError, match="is missing"):
        load(tmp_path / "constants.pt", arch="cnn4")
    with pytest.raises(UserError, match="has no weights of"):
        pretrained("wrn28_10_silu")
