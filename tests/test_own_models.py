"""Users' own classes: imported by name, registered, trained, released, and loaded with their code."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.models import REGISTERED, NormalisedModel, create, register
from nrat_scale.recipe import load_recipe
from nrat_scale.release import __main__ as release_cli
from nrat_scale.train.loop import train
from tests.support.accelerate import fresh_process  # noqa: F401  (autouse)
from tests.support.runs import RECIPE, ROOT, make_shards
from tests.support.small_releases import same_logits

PAGE = ROOT / "docs" / "your_model.md"
CODE = re.search(r"```python\n(import torch\n.*?class MyNet.*?)```", PAGE.read_text(), re.DOTALL)[1]  # type: ignore[index]
COMMANDS = re.findall(r"^python -m nrat_scale\.(\w+) (.*my_model.*|runs/mine .*)$", PAGE.read_text(), re.MULTILINE)


class Normalising(nn.Module):
    """Takes mean and std, and normalises by itself."""

    def __init__(self, num_classes: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.shift, self.scale, self.head = mean[0], std[0], nn.Linear(12 * 12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(((x - self.shift) / self.scale).flatten(1))


class Plain(nn.Module):
    """Takes nothing but a width."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(12 * 12, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Tuple(Plain):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with shards and a recipe; imports from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    real, generated = make_shards(tmp_path / "real", 120, 0), make_shards(tmp_path / "generated", 90, 1)
    make_shards(tmp_path / "test", 40, 2)
    text = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)).replace("epochs: 3", "epochs: 1")
    (tmp_path / "tiny.yaml").write_text(text)
    for name in [name for name in sys.modules if name.startswith("my_model")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("nrat_scale.models.own.REGISTERED", REGISTERED)
    return tmp_path


@pytest.mark.medium
def test_the_page_from_its_file_to_the_loaded_release(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/your_model.md, the first in a process of its own; the release does not hold the code."""
    (here / "my_model.py").write_text(CODE)
    commands = {
        name: line.split() for name, line in COMMANDS if "RECIPE" not in line and "releases/mine" not in line[:14]
    }
    training = ["tiny.yaml" if word.startswith("recipes/") else word for word in commands["train"]]
    command = [sys.executable, "-m", "nrat_scale.train", *training]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(here)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=here)
    assert result.returncode == 0, result.stderr
    evaluate_cli.main(["test" if word == "data/digits/test" else word for word in commands["evaluate"]])
    release_cli.main(commands["release"])
    card = (here / "releases/mine/README.md").read_text()
    assert "needs its code" in card and "model=MyNet" in card and "timm.create_model" not in card
    from my_model import MyNet  # type: ignore[import-not-found]

    model = nrat_scale.load("releases/mine", model=MyNet)
    assert isinstance(model, NormalisedModel) and model.model.features[0].out_channels == 8
    run = load_recipe("runs/mine/recipe.yaml")
    assert run.model.name == "my_model:MyNet" and not model(torch.rand(2, 1, 12, 12)).isnan().any()
    with pytest.raises(UserError, match=r"is code, which a release never contains\. .*model=MyNet"):
        nrat_scale.load("releases/mine")
    evaluate_cli.main(
        ["releases/mine", "--arch", "my_model:MyNet", "--data", "test", "--attacks", "natural", "--images", "8"]
    )
    on_card = next(line for line in card.splitlines() if line.startswith("python -m nrat_scale.evaluate"))
    monkeypatch.chdir(here / "releases")
    evaluate_cli.main(shlex.split(on_card.replace("TEST_SHARDS", str(here / "test")))[3:])
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    with pytest.raises(UserError, match="--trust-code"):
        evaluate_cli.main(
            [str(here / "runs/mine"), "--data", str(here / "test"), "--attacks", "natural", "--images", "4"]
        )
    with pytest.raises(UserError, match="--trust-code"):
        release_cli.main([str(here / "runs/mine"), "--to", str(here / "other")])
    release_cli.main([str(here / "runs/mine"), "--to", str(here / "other"), "--trust-code"])


@pytest.mark.medium
def test_a_registered_class_trains_and_its_release_loads(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process that registered it by name alone; elsewhere with model=. It may normalise by itself."""
    register("normalising")(Normalising)
    run = train(load_recipe(here / "tiny.yaml", ["model.name=normalising", "model.mean=[0.25]", "model.std=[0.5]"]))
    release_cli.main([str(run), "--to", str(here / "r"), "--unevaluated"])
    loaded = nrat_scale.load(here / "r")
    assert isinstance(loaded, Normalising) and (loaded.shift, loaded.scale) == (0.25, 0.5)
    monkeypatch.delitem(REGISTERED, "normalising")
    with pytest.raises(UserError, match=r"'normalising' is unknown.*nrat_scale\.load\(\.\.\., model=CLASS\)"):
        nrat_scale.load(here / "r")
    again = nrat_scale.load(here / "r", model=Normalising)
    assert same_logits(again, loaded, (3, 1, 12, 12))
    with pytest.raises(UserError, match="does not fit the architecture"):
        nrat_scale.load(here / "r", model=lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes)))
    with pytest.raises(UserError, match="takes the class of the model"):
        nrat_scale.load(here / "r", model=again)


def test_a_name_of_timm_cannot_be_registered() -> None:
    """A registered name shadows nothing, is an identifier, and names a factory; registering again replaces it."""
    for name, message in (
        ("resnet18", "timm knows"),
        ("cnn4", "timm knows"),
        ("my net", "use letters"),
        ("a:b", "use letters"),
    ):
        with pytest.raises(UserError, match=message):
            register(name)
    with pytest.raises(UserError, match="takes a class or a function"):
        register("my_net")(Plain())  # type: ignore[arg-type]
    register("my_net")(Plain)
    register("my_net")(Normalising)
    assert isinstance(create("my_net", {"num_classes": 10, "mean": [0.0], "std": [1.0]}), Normalising)
    del REGISTERED["my_net"]


def test_only_what_a_factory_takes_is_given() -> None:
    """num_classes and in_chans if it takes them; the wrapper has the normalisation."""
    module = f"{__name__}:Plain"
    model = create(module, {"num_classes": 10, "in_chans": 1, "mean": [0.25], "std": [0.5]}, trust_code=True)
    assert isinstance(model, NormalisedModel) and model.num_classes == 10 and model.mean.item() == 0.25
    x = torch.rand(2, 1, 12, 12)
    assert torch.equal(model(x), model.model((x - 0.25) / 0.5))
    assert set(model.state_dict()) == {"head.weight", "head.bias"}


CASES = [
    ("no_such_file:Net", None, "There is no module 'no_such_file' for model.name"),
    ("my_model:Nett", "class Net:\n    pass\n", r"has no 'Nett'\. Did you mean 'Net'"),
    ("my_model:net", "net = 3\n", "must be a class or a function"),
    ("my_model:net", "def net(num_classes):\n    return num_classes\n", "is a int; it must be a torch.nn.Module"),
    ("my_model:Net", "import no_such_package\n", "No module named 'no_such_package'"),
    ("my_model:Net", "x = 1 / 0\n", r"ZeroDivisionError: division by zero \(my_model\.py, line 1\)"),
    ("my_model:Net", "def Net(:\n", r"SyntaxError: .*\(my_model\.py, line 1\)"),
    ("my_model:net", "def net(num_classes):\n    raise KeyError('a')\n", r"KeyError.*\(my_model\.py, line 2\)"),
]


@pytest.mark.parametrize(("name", "code", "message"), CASES)
def test_wrong_code_is_a_sentence(here: Path, name: str, code: str | None, message: str) -> None:
    """It names what, and where in the user's file."""
    if code is not None:
        (here / "my_model.py").write_text(code)
    with pytest.raises(UserError, match=message):
        train(load_recipe(here / "tiny.yaml", [f"model.name={name}"]))
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("my_model.py:Net", "my_model:Net"),
        ("./my_model.py:Net", "my_model:Net"),
        ("my_model.Net", "my_model:Net"),
        ("nets/mine.py:Net", "nets.mine:Net"),
        ("nets/mine:Net", "nets.mine:Net"),
        ("nets.mine.Net", "nets.mine:Net"),
        ("my_model.py", "my_model:CLASS"),
        ("my_model", "my_model:CLASS"),
    ],
)
def test_a_class_named_as_a_file_gets_the_right_spelling(here: Path, written: str, meant: str) -> None:
    """Only if there is such a file; for training and for --arch."""
    (here / "nets").mkdir()
    torch.save({"weight": torch.zeros(2, 2)}, "weights.pt")
    weights = ["weights.pt", "--arch", written, "--data", "test", "--eps", "0.1"]
    with pytest.raises(UserError) as without:
        train(load_recipe(here / "tiny.yaml", [f"model.name={written}"]))
    for name in ("my_model.py", "nets/mine.py"):
        (here / name).write_text("")
    with pytest.raises(UserError) as trained:
        train(load_recipe(here / "tiny.yaml", [f"model.name={written}"]))
    with pytest.raises(UserError) as evaluated:
        evaluate_cli.main(weights)
    assert meant not in str(without.value) and meant in str(trained.value) and meant in str(evaluated.value)


class Softmax(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class LogSoftmax(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


@pytest.mark.parametrize(("factory", "warned"), [(Softmax, True), (LogSoftmax, False), (Plain, False)])
def test_a_softmax_at_the_output_is_said_before_training(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factory: Any, warned: bool
) -> None:
    """Logarithms of probabilities are logits."""
    monkeypatch.setitem(REGISTERED, "tried", factory)
    train(load_recipe(here / "tiny.yaml", ["model.name=tried", "train.max_steps=1"]))
    assert ("Remove the softmax" in capsys.readouterr().err) is warned


def test_only_models_of_timm_get_the_hint_of_an_image_size(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's class may have no such argument."""
    monkeypatch.setitem(REGISTERED, "tried", lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes)))
    with pytest.raises(UserError, match=r"cannot take images of 1 x 12 x 12: .* cannot be multiplied[^.]*\.$"):
        train(load_recipe(here / "tiny.yaml", ["model.name=tried"]))


@pytest.mark.parametrize(
    ("factory", "kwargs", "message"),
    [
        (Plain, {"width": 7}, r"gives \[2, 7\] in evaluation mode; expected logits \[2, 10\]"),
        (Tuple, {}, "gives tuple in evaluation mode"),
        (Plain, {"wdith": 7}, "does not take these arguments"),
        (nn.Flatten, {}, "does not take these arguments|no parameters"),
    ],
)
def test_a_model_without_logits_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, factory: Any, kwargs: dict[str, Any], message: str
) -> None:
    """The model is tried on two images before the run writes anything."""
    monkeypatch.setitem(REGISTERED, "tried", factory)
    overrides = ["model.name=tried", *(f"model.kwargs.{key}={value}" for key, value in kwargs.items())]
    with pytest.raises(UserError, match=message):
        train(load_recipe(here / "tiny.yaml", overrides))
    assert not (here / "runs").exists()
