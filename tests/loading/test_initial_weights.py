"""`model.init`: a run starts from a release, a weight file or timm's weights, says what fits, and records it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.models import ModelSpec, create
from nrat_scale.recipe import load_recipe, to_yaml
from nrat_scale.release.bundle import release
from nrat_scale.train.loop import train
from tests.support.accelerate import fresh_process  # noqa: F401  (autouse)
from tests.support.runs import RECIPE, make_shards
from tests.support.small_releases import write_release

ARGUMENTS: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "width": 4, "hidden": 16}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of four steps whose learning rate is almost 0, so that the weights stay what they were."""
    folder = tmp_path_factory.mktemp("init")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    text = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)).replace("epochs: 3", "epochs: 1")
    (folder / "tiny.yaml").write_text(text.replace("lr: 0.01, schedule: onecycle, pct_start: 0.5", "lr: 1.0e-12"))
    return folder / "tiny.yaml"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    (folder,) = RunFolder(run).checkpoints.glob("step-*4")
    return load_file(folder / "model.safetensors")


def _same(run: Path, model: nn.Module, *, but: tuple[str, ...] = ()) -> None:
    for name, value in _weights(run).items():
        close = torch.allclose(value, model.state_dict()[name], atol=1e-6) if name not in but else None
        assert close is not False, name


def _net(**changes: Any) -> nn.Module:
    torch.manual_seed(7)
    return create("cnn4", {**ARGUMENTS, "mean": [0.25], "std": [0.75], **changes})


def test_a_release_its_head_and_its_normalisation(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything of a release is loaded, with its constants; the record names the file, and a card shows it."""
    net = _net()
    source = write_release(tmp_path / "r", net, model_args={**ARGUMENTS, "mean": [0.25], "std": [0.75]})
    run = train(load_recipe(recipe, [f"model.init={source}", f"run_dir={tmp_path / 'run'}"]))
    _same(run, net)
    printed = capsys.readouterr().out
    assert (
        "initial weights: 12 of 12 tensors" in printed
        and "normalisation of the initial weights: mean [0.25]" in printed
    )
    description = RunFolder(run).read_model()
    assert description["init"]["num_loaded"] == 12 and len(description["init"]["sha256"]) == 64
    assert (description["model_args"]["mean"], description["model_args"]["std"]) == ([0.25], [0.75])
    card = (release(run, tmp_path / "out", unevaluated=True) / "README.md").read_text()
    assert "* initial weights: `r` (sha256" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "recipe.yaml").read_text()
    own = train(load_recipe(recipe, [f"model.init={source}", "model.mean=[0.5]", f"run_dir={tmp_path / 'own'}"]))
    assert RunFolder(own).read_model()["model_args"]["mean"] == [0.5]


def test_a_file_with_another_head(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head for other classes stays random, which the run says and records; of several sets the key chooses one."""
    net = _net(num_classes=3)
    averaged = {f"ema.{key}": value for key, value in net.state_dict().items()}
    raw = {f"model.{key}": value * 0 for key, value in net.state_dict().items()}
    torch.save({**averaged, **raw, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    options = [f"model.init={tmp_path / 'w.pt'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="holds 2 sets of weights"):
        train(load_recipe(recipe, options))
    run = train(load_recipe(recipe, [*options, "model.init_key=ema"]))
    head = ("classifier.weight", "classifier.bias")
    _same(run, net, but=head)
    assert "not loaded, random: classifier.weight has shape [3, 16] instead of [10, 16]" in capsys.readouterr().out
    record = RunFolder(run).read_model()["init"]
    assert (record["num_loaded"], tuple(record["not_loaded"])) == (10, head)


def test_a_resumed_run_does_not_read_the_source(recipe: Path, tmp_path: Path) -> None:
    """The file may be gone; record and normalisation stay. Before the first checkpoint other bytes are refused."""
    source = write_release(tmp_path / "r", _net(), model_args={**ARGUMENTS, "mean": [0.25], "std": [0.75]})
    options = [f"model.init={source}", f"run_dir={tmp_path / 'run'}", "train.epochs=2"]
    run = train(load_recipe(recipe, [*options, "train.max_steps=2"]))
    before = RunFolder(run).read_model()
    for file in source.iterdir():
        file.unlink()
    train(load_recipe(recipe, options))
    assert RunFolder(run).read_model() == before and before["init"]["num_loaded"] == 12
    for folder in RunFolder(run).checkpoints.iterdir():
        for file in [folder] if folder.is_file() else [*folder.iterdir()]:
            file.unlink()
        if folder.is_dir():
            folder.rmdir()
    other = create("cnn4", {**ARGUMENTS, "mean": [0.25], "std": [0.75]})
    write_release(source, other, model_args={**ARGUMENTS, "mean": [0.25], "std": [0.75]})
    with pytest.raises(UserError, match=r"has changed since the run in .* began"):
        train(load_recipe(recipe, options))


@pytest.mark.medium
def test_weights_of_timm(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timm` and `timm:NAME`: all but the head, adapted to one channel by timm; the model's own arguments are kept."""
    torch.manual_seed(5)
    net = timm.create_model("test_vit")
    made = timm.create_model

    def fetched(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        """timm without the network."""
        weights = {key: value.clone() for key, value in net.state_dict().items()}
        return made(name, pretrained, pretrained_cfg_overlay={"state_dict": weights} if pretrained else {}, **arguments)

    monkeypatch.setattr(timm, "create_model", fetched)
    shards = make_shards(tmp_path / "shards", 60, 0, 1, 32)
    data = [f"data.{kind}.shards={shards}" for kind in ("real", "generated")]
    model = ["model.name=test_vit", "model.kwargs.img_size=32", *data]
    for source in ("timm", "timm:test_vit.r160_in1k"):
        run = train(load_recipe(recipe, [*model, f"model.init={source}", f"run_dir={tmp_path / source}"]))
        record = RunFolder(run).read_model()["init"]
        assert record["not_loaded"] == ["head.weight", "head.bias"] and len(record["sha256"]) == 64
        weights = _weights(run)
        torch.testing.assert_close(weights["blocks.0.mlp.fc1.weight"], net.state_dict()["blocks.0.mlp.fc1.weight"])
        torch.testing.assert_close(
            weights["patch_embed.proj.weight"], net.state_dict()["patch_embed.proj.weight"].sum(1, keepdim=True)
        )
    with pytest.raises(UserError, match=r"timm has no weights of 'resnet999'"):
        train(load_recipe(recipe, [*model, "model.init=timm:resnet999", f"run_dir={tmp_path / 'x'}"]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.pt", "There is no weight file no/such.pt"),
        ("other.safetensors", "holds .*; expected one state dict of cnn4"),
        ("resnet", r"fits only 0 of the 12 tensors of cnn4: features\.0\.weight is missing"),
        ("timm:cnn4", "timm has no weights of 'cnn4'"),
        ("run", "is a run. Give a release of it"),
        ("word", "is not a release folder and does not have the Hub's form"),
    ],
)
def test_unusable_sources_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    """Before the run folder is made, in a sentence."""
    monkeypatch.chdir(tmp_path)
    net = create("test_resnet", {"num_classes": 4})
    save_file(net.state_dict(), tmp_path / "other.safetensors")
    write_release(tmp_path / "resnet", net, architecture="test_resnet", num_classes=4, model_args={})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=message):
        train(load_recipe(recipe, [f"model.init={source}"]))
    assert not (tmp_path / "runs").exists()


def test_the_keys_are_no_part_of_the_identity_of_runs_without_them(recipe: Path) -> None:
    """A stored recipe from before the keys is resumed; a recipe with another source is another run."""
    plain = load_recipe(recipe)
    stored = recipe.with_name("stored.yaml")
    stored.write_text(
        "\n".join(line for line in to_yaml(plain).splitlines() if "init_key" not in line and "  init: null" not in line)
    )
    assert load_recipe(stored).identity == plain.identity
    assert load_recipe(recipe, ["model.init=timm"]).identity != plain.identity
    assert json.dumps(plain.model.kwargs) == '{"width": 4, "hidden": 16}'
    with pytest.raises(UserError, match=r"model\.init_key needs model\.init"):
        ModelSpec(init_key="ema")
