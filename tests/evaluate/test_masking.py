"""Models that mask gradients are flagged with what to do; sound ones, robust or not, are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.evaluate.backward_smoothing import has_flat_places, smoothed
from nrat_scale.evaluate.measures import Images
from nrat_scale.evaluate.sanity import check_model, inspect_model
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.objectives import build
from tests.support.digits import CNN_ARGUMENTS, as_images, digits, trained_cnn
from tests.support.masked_models import Changed, NoisyLogits, WithGradient, mean_sparse, noise_of


def trained(objective: str, classes: int = 10, norm: str = "linf", steps: int = 150) -> nn.Module:
    """A small CNN trained with an objective of ours, on all digits or on those below `classes`."""
    pixels, labels = digits()
    rows = np.flatnonzero(labels[:1200] < classes)
    x, y = as_images(pixels[rows], labels[rows]).pixels / 255, torch.from_numpy(labels[rows])
    torch.manual_seed(0)
    arguments = model_arguments(ModelSpec(kwargs={"width": 8, "hidden": 32}), classes, 1, (0.3,), (0.3,))
    model, made = create("cnn4", arguments), build(objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    threat = ThreatSpec(0.15, 0.07, 3, "normal") if norm == "linf" else ThreatSpec(0.8, 0.4, 3, norm="l2")
    for step in range(steps):
        batch = torch.arange(step * 64, step * 64 + 64) % len(x)
        logits = model(x[batch])
        x_adv = pgd(model, x[batch], made.inner(logits, y[batch]), threat) if made.attacks else x[batch]
        optimizer.zero_grad()
        made.loss(logits, model(x_adv), y[batch]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def plain() -> nn.Module:
    """A model without adversarial training."""
    pixels, labels = digits()
    return trained_cnn(pixels[:1200], labels[:1200], 0.0)


@pytest.fixture(scope="session")
def nrat() -> nn.Module:
    return trained("nrat")


@pytest.fixture(scope="session")
def sound(model: nn.Module, plain: nn.Module, nrat: nn.Module) -> dict[str, nn.Module]:
    return {"robust": model, "plain": plain, "nrat": nrat}


SOUND = ("robust", "plain", "nrat")
THREATS = [ThreatSpec(0.15, 0.04, 1), ThreatSpec(8 / 255, 2 / 255, 1), ThreatSpec(0.8, 0.2, 1, norm="l2")]


@pytest.mark.parametrize("ball", THREATS, ids=lambda ball: f"{ball.norm}-{ball.eps:.2f}")
@pytest.mark.parametrize("name", SOUND)
def test_sound_models_are_not_flagged(sound: dict[str, nn.Module], images: Images, ball: ThreatSpec, name: str) -> None:
    """Robust, plain and NRAT-trained, for large, small and l_2 radii, on all images and on few, with their numbers."""
    check = inspect_model(sound[name], images, ball, "m")
    assert check.flags == []
    numbers = check.numbers
    assert numbers["gradient_cosine"] > 0.95 and numbers["roughness"] < 0.3 and numbers["unbounded_accuracy"] == 0
    assert numbers["beats_random_signs"] > 0.9 and numbers["images"] == 32 and "smoothed_gain" not in numbers
    for n in (1, 5, 20):
        assert check_model(sound[name], images.take(np.arange(n)), ball, "m") == []


@pytest.mark.parametrize(
    ("objective", "norm"), [("trades", "linf"), ("nrat", "linf"), ("natural", "linf"), ("trades", "l2")]
)
def test_sound_models_of_two_classes_are_not_flagged(objective: str, norm: str, threat: ThreatSpec) -> None:
    """Two easy classes give margins of 20 and more, where float32 probabilities are 1, and attacks work."""
    pixels, labels = digits()
    rows = 1200 + np.flatnonzero(labels[1200:1500] < 2)
    model = trained(objective, 2, norm, 200)
    threat = threat if norm == "linf" else ThreatSpec(0.8, 0.2, 1, norm="l2")
    assert check_model(model, as_images(pixels[rows], labels[rows]), threat, "m") == []


def _grid(x: Tensor) -> Tensor:
    return (x * 255).round()


OTHER = {  # gradients that are not those of the function
    "random": lambda x, gradient: torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    "constant": lambda x, gradient: torch.ones_like(x),
    "flipped": lambda x, gradient: -gradient,
    "moved": lambda x, gradient: gradient.flip(-1),
    "noisy": lambda x, gradient: gradient + 2 * gradient.abs().mean() * noise_of(x),
}
NOISE = {
    "pixels": lambda model: Changed(model, lambda x: x + 0.05 * noise_of(x)),
    "pixels by bytes": lambda model: Changed(model, lambda x: x + 0.1 * noise_of(x, _grid)),
    "pixels by brightness": lambda model: Changed(model, lambda x: x + 0.15 * noise_of(x, lambda x: x.sum().round())),
    "logits": NoisyLogits,
    "a wave": lambda model: Changed(model, lambda x: x + 0.1 * torch.sin(1e4 * x)),
}
SCALE = {
    "x 30": (lambda logits: 30 * logits, "vanishes|scale of the output"),
    "x 100": (lambda logits: 100 * logits, "vanishes"),
    "/ 100": (lambda logits: logits / 100, "temperature|scale of the output"),
    "softmax": (lambda logits: logits.softmax(1), "probabilities"),
    "softmax moved": (lambda logits: logits.softmax(1) - 0.1, "probabilities"),
    "10 softmax": (lambda logits: 10 * logits.softmax(1), "probabilities"),
    "sharp softmax": (lambda logits: (10 * logits).softmax(1), "probabilities"),
    "sigmoid": (lambda logits: logits.sigmoid(), "probabilities"),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("way", OTHER)
def test_useless_gradients_are_flagged(
    sound: dict[str, nn.Module], images: Images, threat: ThreatSpec, way: str, name: str
) -> None:
    """A custom backward pass that is not the derivative."""
    check = inspect_model(WithGradient(sound[name], OTHER[way]), images, threat, "m")
    assert len(check.flags) == 1 and "The gradient is not the derivative" in check.flags[0], check
    assert check.numbers["gradient_cosine"] < 0.8


def test_a_custom_backward_pass_that_is_right_is_not_flagged(
    model: nn.Module, images: Images, threat: ThreatSpec
) -> None:
    """The true gradient, of any length."""
    for factor in (1.0, 1e-6, 1e6):
        wrapped = WithGradient(model, lambda x, gradient, factor=factor: factor * gradient)
        assert check_model(wrapped, images, threat, "m") == []


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("way", NOISE)
def test_noise_that_is_a_function_of_the_image_is_flagged(
    sound: dict[str, nn.Module], images: Images, threat: ThreatSpec, way: str, name: str
) -> None:
    """Deterministic noise passes the comparison of two calls."""
    (flag,) = check_model(NOISE[way](sound[name]), images, threat, "m")
    assert "The output jumps" in flag


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("way", SCALE)
def test_an_output_that_hides_gradients_is_flagged(
    sound: dict[str, nn.Module], images: Images, threat: ThreatSpec, way: str, name: str
) -> None:
    """Temperatures, softmax and sigmoid, once each."""
    change, words = SCALE[way]
    (flag,) = check_model(Changed(sound[name], None, change), images, threat, "m")
    assert any(word in flag for word in words.split("|")), flag


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("name", SOUND)
def test_sparsifying_activations_are_flagged(
    sound: dict[str, nn.Module], images: Images, threat: ThreatSpec, name: str, threshold: float, masks: bool
) -> None:
    """MeanSparse, with `torch.where` and with a mask: its output jumps, and an attack knows how to pass."""
    check = inspect_model(mean_sparse(sound[name], images.pixels / 255, threshold, masks), images, threat, "m")
    assert "sparsified" in check.flags[0] and "smoothed_gain" in check.numbers


@pytest.mark.parametrize(
    "shrink",
    [lambda x: F.softshrink(x - 0.5, 0.25), lambda x: torch.where(x > 0.3, x, 0.0), lambda x: (8 * x).floor() / 8],
)
def test_a_smoothed_backward_pass_breaks_flat_inputs(
    plain: nn.Module, images: Images, threat: ThreatSpec, shrink: Callable[[Tensor], Tensor]
) -> None:
    """Shrunk, cut and quantised images: the attack that passes through them breaks more, and the flag says so."""
    check = inspect_model(Changed(plain, shrink), images, threat, "m")
    assert any("(BPDA)" in flag and "instead of" in flag for flag in check.flags), check
    assert check.numbers["smoothed_gain"] > 0.03


def test_activations_made_of_conditions_are_not_flagged(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """ReLU and leaky ReLU written with `torch.where` or a mask have flat nodes, and nothing to hide."""
    ways = (lambda x: torch.where(x > 0, x, 0.0), lambda x: torch.where(x > 0, x, 0.01 * x), lambda x: x * (x > 0))
    for way in ways:
        changed = mean_sparse(model, images.pixels / 255, 0.0)
        for number, layer in enumerate(changed.features):
            if isinstance(layer, nn.ReLU):
                changed.features[number] = Changed(nn.Identity(), None, way)
            elif type(layer).__name__ == "MeanSparse":
                changed.features[number] = nn.Identity()
        assert has_flat_places(changed, images.pixels[:1] / 255)
        assert check_model(changed.eval(), images, threat, "m") == []


def test_the_smoothed_backward_pass_is_the_identity() -> None:
    """The function stays the same, and flat operations get the gradient of the identity."""
    x = torch.linspace(-1, 1, 9)[None]
    ways = (torch.round, lambda x: torch.where(x.abs() > 0.5, x, 0.0), lambda x: x * (x.abs() > 0.5), F.hardshrink)
    for way in ways:
        leaf = x.clone().requires_grad_()
        found = smoothed(lambda x, way=way: 3 * way(x))(leaf)
        found.sum().backward()
        assert torch.equal(found, 3 * way(x)) and torch.equal(leaf.grad, torch.full_like(x, 3.0))
    assert not has_flat_places(lambda x: x.relu().clamp(0, 1), x)


def test_checks_do_not_depend_on_global_state(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """The numbers are the same in every run; precision, parameters and random state are as before."""
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = inspect_model(model, images, threat, "m")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.manual_seed(2)
    assert inspect_model(model, images, threat, "m") == first


def test_the_command_records_flags_and_numbers(
    run: Path,
    measured: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command line: a sound run has numbers and no flag, one with noise of the image has both."""
    record = measured("--attacks", "natural,pgd20,cw20", "--checkpoint", "best")["checkpoints"]["best"]
    assert record["flags"] == [] and record["checks"]["gradient_cosine"] > 0.95
    kind = type(create("cnn4", CNN_ARGUMENTS))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x + 0.1 * noise_of(x)))
    out = run.parent / "noisy.json"
    measured("--attacks", "natural,pgd2", "--checkpoint", "best", "--out", str(out))
    record = json.loads(out.read_text())["checkpoints"]["best"]
    assert "The output jumps" in record["flags"][0] and record["checks"]["roughness"] > 0.5
    assert "FLAG: The output jumps" in capsys.readouterr().out
