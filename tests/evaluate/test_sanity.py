"""Evaluations that would be meaningless are refused, doubtful ones flagged, sound ones neither."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrat_scale.attacks import RELEASED_CODE_WARNING, ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.measures import Images, correct_under
from nrat_scale.evaluate.results import Outcome
from nrat_scale.evaluate.sanity import check_model, contradictions
from nrat_scale.models import create
from tests.support.digits import CNN_ARGUMENTS


class Wrapped(nn.Module):
    """A model with changed logits."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits + 0.1 * torch.randn_like(logits), "different logits for the same images"),
        (lambda logits: logits - logits.mean(0), "depend on the other images"),
        (lambda logits: logits / 0, "not finite"),
        (lambda logits: logits[:, 0], "expected logits"),
        (lambda logits: logits.sqrt().nan_to_num(), "gradients that are not finite"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused(
    model: nn.Module, images: Images, threat: ThreatSpec, change: Callable[[Tensor], Tensor], message: str
) -> None:
    """Randomness, dependence on the batch, NaN, other shapes, broken gradients."""
    with pytest.raises(UserError, match=message):
        check_model(Wrapped(model, change), images, threat, "the model")


def test_training_mode_is_refused(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """One module in training mode is enough, and it is named."""
    wrapped = Wrapped(model, nn.Identity())
    wrapped.change.train()
    with pytest.raises(UserError, match=r"training mode \(change\)"):
        check_model(wrapped, images, threat, "the model")


def test_masked_gradients_are_flagged(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """Saturated logits, probabilities and the released code's threat are flagged, the plain model is not."""
    assert check_model(model, images, threat, "m") == []
    (flag,) = check_model(Wrapped(model, lambda logits: logits * 1e4), images, threat, "m")
    assert "vanishes" in flag
    softmax = Wrapped(model, lambda logits: logits.softmax(1))
    assert any("probabilities" in flag for flag in check_model(softmax, images, threat, "m"))
    released = ThreatSpec(0.15, 0.04, 1, space="released_code")
    assert check_model(model, images, released, "m") == [RELEASED_CODE_WARNING]


def test_one_class_for_all_images_is_flagged_as_that(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """A collapsed model resists every attack; that is not masking."""
    favoured = torch.zeros(10).index_fill(0, torch.tensor([3]), 1e3)
    (flag,) = check_model(Wrapped(model, lambda logits: 1e-3 * logits + favoured), images, threat, "m")
    assert "predicts class 3 for all" in flag and "masked" not in flag


def test_a_sound_model_contradicts_nothing(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """Measured outcomes of an adversarially trained model raise no flag."""
    names = ("natural", "fgsm", "pgd20", "pgd50x2")
    assert contradictions({name: (images.ids, correct_under(name, model, images, threat)) for name in names}) == []


def outcome(n: int, right: int) -> Outcome:
    return np.arange(n), np.arange(n) < right


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        (
            {"pgd20": outcome(100, 50), "aa": outcome(100, 56)},
            "accuracy is 56.0 % under AutoAttack and 50.0 % under PGD-20",
        ),
        ({"cw20": outcome(200, 50), "aa": outcome(100, 60)}, "it failed"),
        ({"pgd50x10": outcome(200, 50), "aa": outcome(200, 60)}, "it failed"),
        ({"pgd20": outcome(200, 50), "aa:apgd-ce": outcome(200, 60)}, "it failed"),
        ({"cw20": outcome(200, 50), "aa-apgd": outcome(200, 60)}, "it failed"),
        ({"aa:square": outcome(200, 50), "aa": outcome(200, 60)}, "it failed"),
        ({"natural": outcome(500, 450), "fgsm": outcome(500, 50), "pgd20": outcome(500, 50)}, "one step"),
        ({"fgsm": outcome(100, 50), "pgd20": outcome(100, 56)}, "one step"),
        ({"pgd20": outcome(100, 50), "pgd50": outcome(100, 44)}, "converged"),
        ({"cw20": outcome(100, 50), "cw20x10": outcome(100, 40)}, "restarts"),
    ],
)
def test_contradictions_are_flagged(outcomes: dict[str, Outcome], words: str) -> None:
    """Two outcomes on the same images that cannot both be valid, beyond what chance explains."""
    (flag,) = contradictions(outcomes)
    assert words in flag


@pytest.mark.parametrize(
    "outcomes",
    [
        {"pgd20": outcome(100, 50), "aa": outcome(100, 50)},
        {"pgd20": outcome(100, 50), "aa": outcome(100, 51)},  # one image
        {"pgd20": outcome(100, 50), "an attack of another version": outcome(100, 60)},
        {"pgd20": (np.arange(100, 200), np.arange(100) < 50), "aa": outcome(100, 60)},  # no common images
        {"natural": outcome(100, 90), "fgsm": outcome(100, 90), "pgd20": outcome(100, 90)},  # eps = 0
        {"natural": outcome(100, 90), "fgsm": outcome(100, 0), "pgd20": outcome(100, 0)},  # no gradient left to mask
        {"natural": outcome(100, 90), "fgsm": outcome(100, 50), "pgd20": outcome(100, 50)},  # chance at n = 100
        {"natural": outcome(10_000, 9000), "fgsm": outcome(10_000, 8900), "pgd20": outcome(10_000, 8900)},  # tiny eps
        {"natural": outcome(10_000, 9000), "fgsm": outcome(10_000, 5500), "pgd20": outcome(10_000, 5400)},
        {"pgd20": outcome(100, 50), "pgd50": outcome(100, 48)},
        {"pgd20": outcome(100, 50), "pgd50": outcome(100, 46)},  # four images
        {"natural": outcome(100, 90), "aa": outcome(100, 50), "fgsm": outcome(100, 70), "pgd20": outcome(100, 55)},
        # Single parts of AutoAttack may break less than PGD and CW.
        {
            "pgd20": outcome(500, 200),
            "cw20": outcome(500, 190),
            "fgsm": outcome(500, 250),
            "aa:square": outcome(500, 350),
        },
        {"pgd20": outcome(500, 200), "cw20": outcome(500, 190), "aa:fab-t": outcome(500, 300)},
        {"pgd20": outcome(500, 200), "aa:apgd-t": outcome(500, 230)},  # another loss
        {"cw20": outcome(500, 200), "aa:apgd-ce": outcome(500, 230)},
        {"pgd100x10": outcome(500, 200), "aa:apgd-ce": outcome(500, 230)},  # ten times its steps
        {"aa:square": outcome(500, 300), "aa:fab": outcome(500, 200)},
    ],
)
def test_consistent_outcomes_are_not_flagged(outcomes: dict[str, Outcome]) -> None:
    """Outcomes of sound evaluations."""
    assert contradictions(outcomes) == []


def test_images_are_paired() -> None:
    """Equal accuracies on different images are no contradiction; fewer broken images among many that differ are chance."""
    ids, weak, strong = np.arange(1000), np.arange(1000) < 500, np.arange(1000) < 500
    strong[:100], strong[500:610] = False, True  # 100 images only AutoAttack breaks, 110 only PGD
    assert contradictions({"pgd20": (ids, weak), "aa": (ids, strong)}) == []
    strong[500:650] = True
    assert len(contradictions({"pgd20": (ids, weak), "aa": (ids[::-1], strong[::-1])})) == 1


class Undifferentiable(nn.Module):
    """A model whose logits have no gradient."""

    def __init__(self, model: nn.Module, way: str) -> None:
        super().__init__()
        self.model, self.way = model, way
        self.scale = nn.Parameter(torch.ones(()))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                x = self.model(x)
            return x * self.scale
        if self.way == "inference":
            with torch.inference_mode():
                return self.model(x)
        if self.way == "numpy":
            return self.model(torch.from_numpy(x.numpy().copy()))
        logits = self.model(x)
        best = logits.argmax(1, keepdim=True)
        ways = {
            "detach": lambda: logits.detach() * self.scale,
            "arg-max": lambda: torch.zeros_like(logits).scatter(1, best, 1.0) * self.scale,
            "integers": lambda: torch.zeros_like(logits, dtype=torch.int64).scatter(1, best, 1),
            "bool": lambda: logits == logits.amax(1, keepdim=True),
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["detach", "no_grad", "inference", "numpy", "arg-max", "integers", "bool"])
def test_a_model_without_gradient_is_refused(model: nn.Module, images: Images, threat: ThreatSpec, way: str) -> None:
    """The sentence names the attacks that still mean something, and these can be run, with a flag."""
    broken, some = Undifferentiable(model, way), images.take(np.arange(4))
    with pytest.raises(UserError, match=r"does not depend differentiably .* natural, aa:square and .*--transfer-from"):
        check_model(broken, images, threat, "the model")
    flags = check_model(broken, images, threat, "the model", follows_gradient=False)
    assert "upper bounds" in flags[-1]
    natural = correct_under("natural", broken, some, threat)
    assert np.array_equal(natural, correct_under("natural", model, some, threat))


@pytest.mark.medium
def test_square_runs_without_gradient(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """Square needs no gradient, and no floating-point outputs."""
    some = images.take(np.arange(2))
    square = correct_under("aa:square", Undifferentiable(model, "integers"), some, threat)
    assert not (square & ~correct_under("natural", model, some, threat)).any()


def test_partly_detached_logits_are_flagged(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """Logits without gradient, or rounded ones; logits that are constant are no reason for doubt."""

    def detached(logits: Tensor) -> Tensor:
        return torch.cat([logits[:, :4].detach(), logits[:, 4:]], 1)

    assert any("4 of 10 logits" in flag for flag in check_model(Wrapped(model, detached), images, threat, "m"))
    rounded = check_model(Wrapped(model, lambda logits: (10 * logits).round()), images, threat, "m")
    assert any("10 of 10 logits" in flag for flag in rounded)
    constant = Wrapped(model, lambda logits: torch.cat([logits, torch.full_like(logits[:, :1], -50.0)], 1))
    assert check_model(constant, images, threat, "m") == []


def test_one_logit_is_refused(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """The arg-max of one logit is always 0; a tuple is not logits."""
    for change in (lambda logits: logits[:, :1], lambda logits: (logits, logits)):
        with pytest.raises(UserError, match="expected logits"):
            check_model(Wrapped(model, change), images, threat, "the model")


def test_the_command_refuses_a_model_without_gradient(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line: gradient attacks are refused before anything is measured, natural images are not."""
    kind = type(create("cnn4", CNN_ARGUMENTS))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x).detach())
    for attacks in ("natural,pgd3", "aa", "aa:square+fab-t"):
        with pytest.raises(UserError, match="does not depend differentiably"):
            measured("--attacks", attacks, "--checkpoint", "best")
    record = measured("--attacks", "natural", "--checkpoint", "best")["checkpoints"]["best"]
    assert record["flags"] == []
