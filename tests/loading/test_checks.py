"""Untrusted configurations and damaged weights of a release are refused in a sentence before they cost memory."""

import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.loading.load import load
from nrat_scale.models import create
from tests.support.small_releases import ARGUMENTS, same_logits, write_release


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "evil"}, "is unknown"),
        ({"model_args": {**ARGUMENTS, "width": 10**9}}, "no model is that large"),
        ({"architecture": "wrn28_10", "model_args": {"depth": 6 * 10**5 + 4}}, "no model is that large"),
        ({"model_args": {**ARGUMENTS, "width": 50000}}, "does not fit"),
        ({"model_args": {**ARGUMENTS, "pretrained_cfg": "x"}}, "not a property"),
        ({"model_args": {**ARGUMENTS, "width": {"a": 1}}}, "expected a number"),
        ({"model_args": {**ARGUMENTS, "padding": "x" * (1 << 20)}}, "no configuration is that large"),
    ],
)
def test_a_configuration_with_huge_arguments_is_refused(
    model: nn.Module, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The error comes before anything of that size is allocated (50,000 channels would be 90 GB)."""
    with pytest.raises(UserError, match=message):
        load(write_release(tmp_path / "r", model, **changes))


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("resnet18", {"layers": [10**6, 2, 2, 2]}, "far more layers"),
        ("convnext_atto", {"depths": [10**6, 2, 2, 2]}, "far more layers"),
        ("convnext_atto", {"depths": [2**20] * 1000}, "no model is that large"),
        ("vit_tiny_patch16_224", {"depth": 1000}, "far more layers"),
        ("test_vit", {"device": "cpu", "embed_dim": 4096}, "not a property"),
        ("test_vit", {"dtype": "float64"}, "not a property"),
        ("resnet10t", {"act_layer": "nope"}, "does not take these arguments"),  # KeyError
        ("resnet10t", {"block": "x"}, "does not take these arguments"),  # AttributeError
        ("wrn28_10", {"width": 0}, "factor of 1 or more"),
    ],
)
def test_a_harmful_configuration_of_a_timm_model_is_refused(
    model: nn.Module, tmp_path: Path, architecture: str, arguments: dict[str, Any], message: str
) -> None:
    """Millions of layers, a device that would allocate, values that the constructor does not know."""
    with pytest.raises(UserError, match=message) as caught:
        load(write_release(tmp_path / "r", model, architecture=architecture, model_args=arguments))
    assert "\n" not in str(caught.value)


def test_the_size_of_unsaved_buffers_is_bounded(tmp_path: Path) -> None:
    """The attention mask of Swin grows with the image size (to 55 GB here), but no shape in the file does."""
    arguments = {"num_classes": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "img_size": 56}
    net = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    changes = {"architecture": "swin_tiny_patch4_window7_224", "num_classes": 2}
    load(write_release(tmp_path / "r", net, model_args=arguments, **changes))
    with pytest.raises(UserError, match="MiB of constants"):
        load(write_release(tmp_path / "r", net, model_args={**arguments, "img_size": 2**16}, **changes))


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 900), value=st.integers(0, 255), cut=st.integers(0, 8000))
def test_damaged_weights_are_refused_or_the_same(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    """One changed byte of the header or a truncated file ends in a sentence, or in the same tensors; never in a crash."""
    torch.manual_seed(0)
    net = create("cnn4", ARGUMENTS).eval()
    folder = write_release(tmp_path_factory.mktemp("r"), net)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data[: len(data) - cut])
    try:
        load(folder)
    except UserError as error:
        sentence = str(error)
    else:
        sentence = ""
    assert "\n" not in sentence
    assert sentence or not cut


def test_a_wrong_safetensors_header_is_refused(model: nn.Module, tmp_path: Path) -> None:
    """A header longer than the file, sizes that do not add up, impossible shapes, other types."""
    path = write_release(tmp_path / "r", model) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(tmp_path / "r")
    path.write_bytes(content + b"\0" * 8)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(tmp_path / "r")
    header = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(tmp_path / "r")
    state = model.state_dict()
    save_file({key: value.double() for key, value in state.items()}, path)
    assert same_logits(load(tmp_path / "r"), model), "a release of a float64 run"
    save_file({key: value.int() for key, value in state.items()}, path)
    with pytest.raises(UserError, match=r"has type 'I32' instead of torch\.float32"):
        load(tmp_path / "r")


@pytest.mark.parametrize(
    ("kind", "shown"), [(torch.int32, "I32"), (torch.int16, "I16"), (torch.uint8, "U8"), (torch.bool, "BOOL")]
)
def test_an_integer_of_another_width_is_refused(tmp_path: Path, kind: torch.dtype, shown: str) -> None:
    """A release has exactly the integer types of its architecture; a float for an integer is refused as well."""
    net = create("resnet18_cifar", {"num_classes": 3}).eval()
    changes = {"architecture": "resnet18_cifar", "num_classes": 3, "model_args": {}}
    path = write_release(tmp_path / "r", net, **changes) / "model.safetensors"
    assert same_logits(load(tmp_path / "r"), net, (2, 3, 8, 8))
    state = net.state_dict()
    for other, name in ((kind, shown), (torch.float64, "F64")):
        save_file({**state, "bn1.num_batches_tracked": torch.tensor(0, dtype=other)}, path)
        with pytest.raises(UserError, match=rf"'bn1\.num_batches_tracked' has type '{name}' instead of torch\.int64"):
            load(tmp_path / "r")
    save_file({**state, "conv1.weight": state["conv1.weight"].to(kind)}, path)
    with pytest.raises(UserError, match=rf"'conv1\.weight' has type '{shown}' instead of torch\.float32"):
        load(tmp_path / "r")


def test_names_from_a_file_cannot_write_to_the_terminal(model: nn.Module, tmp_path: Path) -> None:
    """Line ends and escape sequences in names of tensors, containers, arguments and architectures are escaped."""
    evil = "\x1b[2J\nerror: all is well" + "x" * 500
    torch.save({**model.state_dict(), evil: torch.zeros(1)}, tmp_path / "a.pt")
    torch.save({evil: {}}, tmp_path / "b.pt")
    loads = [partial(load, tmp_path / name, arch="cnn4", width=4, hidden=8) for name in ("a.pt", "b.pt")]
    for number, changes in enumerate(
        ({"architecture": evil}, {"model_args": {**ARGUMENTS, evil: 1}}, {"model_args": {"width": evil}})
    ):
        loads.append(partial(load, write_release(tmp_path / f"r{number}", model, **changes)))
    save_file({evil: torch.zeros(1)}, write_release(tmp_path / "r", model) / "model.safetensors")
    for refused in (*loads, partial(load, tmp_path / "r")):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value).isprintable(), str(caught.value)
        assert "x" * 100 not in str(caught.value)
