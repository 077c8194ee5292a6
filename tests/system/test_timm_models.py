"""Architectures of timm from training to a release that timm loads: BatchNorm, LayerNorm, GroupNorm, and no normalisation."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.recipe import load_recipe
from nrat_scale.release import __main__ as release_cli
from nrat_scale.train.loop import train
from tests.support.accelerate import new_process
from tests.support.runs import make_shards

pytestmark = pytest.mark.medium
RECIPE = """
threat: {eps: 0.05, step: 0.02, num_steps: 1}
objective: {name: trades}
data: {batch_size: 8, epoch_samples: 16, validation: {size: 10}, augment: {crop: 1, flip: false}}
optim: {lr: 0.001}
ema: {decay: 0.9}
train: {epochs: 1, validation_attack: pgd1}
"""
BATCH, LAYER, GROUP, NONE = _BatchNorm, nn.LayerNorm, nn.GroupNorm, None
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}
# name -> (side of the images, model.kwargs, the kind of norm layer); small variants of each family
MODELS: dict[str, tuple[int, dict[str, Any], type[nn.Module] | None]] = {
    "resnet18": (32, {"layers": [1, 1, 1, 1]}, BATCH),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2, "patch_size": 8, "drop_path_rate": 0.2}, LAYER),
    "convnext_atto": (32, {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "drop_path_rate": 0.2}, LAYER),
    "efficientnet_b0": (64, {"drop_rate": 0.2, "drop_path_rate": 0.2}, BATCH),
    "swin_tiny_patch4_window7_224": (32, SWIN, LAYER),
    "densenet121": (32, {"block_config": [1, 1, 1, 1], "growth_rate": 8, "drop_rate": 0.2}, BATCH),
    "resnetv2_50": (64, {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64], "stem_chs": 16}, BATCH),
    "mobilenetv3_small_050": (32, {}, BATCH),
    "regnetx_002": (32, {}, BATCH),
    "mixer_s32_224": (64, {"img_size": 64}, LAYER),
    "test_efficientnet_gn": (32, {}, GROUP),
    "test_nfnet": (32, {}, NONE),
}
SLOW = ("resnet18", "efficientnet_b0", "regnetx_002", "mixer_s32_224", "test_nfnet")  # on busy cores


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`recipe(name, side, channels)`: a recipe for a model and shards of images of that size."""
    folder = tmp_path_factory.mktemp("timm")

    def write(name: str, side: int, kwargs: dict[str, Any], channels: int = 3) -> Path:
        shards = folder / f"{side}x{channels}"
        if not shards.is_dir():
            make_shards(shards, 40, 0, channels, side)
        path = folder / f"{name}.yaml"
        path.write_text(f"{RECIPE}model: {json.dumps({'name': name, 'kwargs': kwargs})}\n")
        path.write_text(path.read_text().replace("data: {", f"data: {{real: {{shards: {shards}}}, "))
        return path

    return write


def _story(recipe: Path, folder: Path, name: str) -> tuple[nn.Module, Path]:
    """Train, evaluate and release; the released model as `nrat_scale.load` gives it, and the shards."""
    with new_process():
        run = train(load_recipe(recipe, [f"run_dir={folder / 'run'}"]))
    shards = Path(load_recipe(recipe).data.real.shards or "")
    evaluate_cli.main(
        [str(run), "--data", str(shards), "--attacks", "natural,pgd1", "--images", "8", "--checkpoint", "last"]
    )
    (attacks,) = [found["attacks"] for found in (RunFolder(run).read_results() or {})["checkpoints"].values()]
    assert {"natural", "pgd1"} == set(attacks) and attacks["pgd1"]["n"] == 8
    release_cli.main([str(run), "--to", str(folder / "release"), "--checkpoint", "last"])
    return nrat_scale.load(folder / "release"), shards


@pytest.fixture
def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests evaluate on the training shards, which the command refuses."""
    monkeypatch.setattr("nrat_scale.evaluate.api.check_unseen", lambda run, shards: None)


@pytest.mark.usefixtures("_unseen")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_a_timm_model_from_training_to_timm(recipe: Any, tmp_path: Path, name: str) -> None:
    """Two steps, an evaluation and a release; timm's own model gives its logits on normalised images."""
    side, kwargs, norm = MODELS[name]
    ours, _ = _story(recipe(name, side, kwargs), tmp_path, name)
    kinds = {kind for kind in (BATCH, LAYER, GROUP) if any(isinstance(layer, kind) for layer in ours.modules())}
    assert kinds == ({norm} if norm else set())
    theirs = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True).eval()
    assert set(theirs.state_dict()) == set(ours.state_dict()), "the weights have timm's names"
    cfg = theirs.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs((x - mean) / std)) and ours(x).shape == (3, 10)
    assert (
        "do not normalise the images"
        not in (tmp_path / "release" / "README.md").read_text().lower().split("with timm")[1]
    )


@pytest.mark.usefixtures("_unseen")
def test_a_timm_model_for_grey_images(recipe: Any, tmp_path: Path) -> None:
    """One channel; also exported."""
    ours, _ = _story(recipe("test_resnet", 32, {}, 1), tmp_path, "test_resnet")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True).eval()
    x = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (theirs.pretrained_cfg[key][0] for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs((x - mean) / std))
    release_cli.main(
        [str(tmp_path / "run"), "--to", str(tmp_path / "exported"), "--checkpoint", "last", "--torch-export"]
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_tiny_patch16_224", {}, r"cannot take images of 3 x 32 x 32: .*224.* model\.kwargs\.img_size=32"),
        ("inception_v3", {}, "cannot take images of 3 x 32 x 32: .*others larger images"),
        ("test_vit", {"img_size": 32, "num_clases": 3}, r"does not take these arguments \(model\.kwargs\)"),
    ],
)
def test_a_model_that_does_not_fit_the_images_is_refused(
    recipe: Any, tmp_path: Path, name: str, kwargs: dict[str, Any], message: str
) -> None:
    """Before anything is written, in a sentence."""
    with new_process(), pytest.raises(UserError, match=message):
        train(load_recipe(recipe(name, 32, kwargs), [f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
