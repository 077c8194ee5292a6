"""Architectures in the layout of other projects: names, shapes and logits of RobustBench's classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nrat_scale.loading.load import load
from nrat_scale.models import PreActResNet18, TradesWideResNet, WideResNet
from tests.support.layouts import fill, images

GOLDEN = json.loads((Path(__file__).parent / "golden" / "robustbench_layouts.json").read_text())
PLAIN: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}  # RobustBench's classes do not normalise
SILU = {"wrn34_10_silu": (34, 10), "wrn70_16_silu": (70, 16), "wrn82_8_silu": (82, 8), "wrn94_16_silu": (94, 16)}


@pytest.mark.parametrize("name", GOLDEN["names"])
def test_names_and_shapes_are_robustbenchs(name: str) -> None:
    """In their order, so that files go both ways."""
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(map(tuple, GOLDEN["names"][name].items()))


@pytest.mark.parametrize(
    ("golden", "build"),
    [
        ("trades", lambda: TradesWideResNet(10, 1, **PLAIN)),
        ("trades_sub_block1", lambda: TradesWideResNet(10, 1, sub_block1=True, **PLAIN)),
        ("preact", lambda: PreActResNet18(**PLAIN)),
        ("preact_bn", lambda: PreActResNet18(bn_before_fc=True, **PLAIN)),
        ("preact_bn_out_shortcut", lambda: PreActResNet18(bn_before_fc=True, out_shortcut=True, **PLAIN)),
    ],
)
def test_logits_are_robustbenchs(golden: str, build: Any) -> None:
    """In float64, for weights that are a function of the names' order."""
    with torch.no_grad():
        logits = fill(build())(images())
    torch.testing.assert_close(
        logits, torch.tensor(GOLDEN["logits"][golden], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("name", "size"), SILU.items())
def test_deep_wide_resnets_are_those_of_the_papers(name: str, size: tuple[int, int]) -> None:
    """Depth, width and SiLU of the names; the layout is that of `wrn28_10_silu`."""
    depth, width = size
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, WideResNet) and {type(m) for m in model.modules()} >= {nn.SiLU}
    assert [len(stage.block) for stage in model.layer] == [(depth - 4) // 6] * 3
    assert [stage.block[0].conv_0.out_channels for stage in model.layer] == [16 * width, 32 * width, 64 * width]
    small = WideResNet(16, 1).state_dict()  # two blocks a stage
    assert set(small) <= set(model.state_dict())
    last = (depth - 4) // 6 - 1
    more = {key.replace(f".block.{last}.", ".block.1.") for key in model.state_dict() if f".block.{last}." in key}
    assert more <= set(small)


@pytest.mark.parametrize(
    ("name", "arguments", "variant"),
    [
        ("wrn34_10", {"depth": 10, "width": 1}, {"sub_block1": True}),
        ("preact_resnet18", {}, {"bn_before_fc": True}),
    ],
)
def test_a_file_with_optional_tensors_loads(
    tmp_path: Path, name: str, arguments: dict[str, Any], variant: dict[str, Any]
) -> None:
    """TRADES' unused block and AWP's last BatchNorm follow from the names in the file."""
    saved = timm.create_model(name, **arguments, **variant).eval()
    torch.save({f"module.{key}": value for key, value in saved.state_dict().items()}, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", arch=name, **arguments)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), saved(x))
