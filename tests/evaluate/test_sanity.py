"""Evaluations that would be meaningless are refused, doubtful ones flagged, sound ones neither."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrat_scale.attacks import RELEASED_CODE_WARNING, ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.measures import Images, correct_under
from nrat_scale.evaluate.results import Outcome
from nrat_scale.evaluate.sanity import check_model, contradictions


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
            {"pgd20": outcome(100, 50), "aa": outcome(100, 51)},
            "accuracy is 51.0 % under AutoAttack and 50.0 % under PGD-20",
        ),
        ({"cw20": outcome(200, 50), "aa": outcome(100, 51)}, "it failed"),
        ({"natural": outcome(100, 90), "fgsm": outcome(100, 50), "pgd20": outcome(100, 50)}, "one step"),
        ({"pgd20": outcome(100, 50), "pgd50": outcome(100, 46)}, "converged"),
        ({"cw20": outcome(100, 50), "cw20x10": outcome(100, 40)}, "restarts"),
    ],
)
def test_contradictions_are_flagged(outcomes: dict[str, Outcome], words: str) -> None:
    """Two outcomes on the same images that cannot both be valid."""
    (flag,) = contradictions(outcomes)
    assert words in flag


@pytest.mark.parametrize(
    "outcomes",
    [
        {"pgd20": outcome(100, 50), "aa": outcome(100, 50)},
        {"pgd20": outcome(100, 50), "an attack of another version": outcome(100, 60)},
        {"pgd20": (np.arange(100, 200), np.arange(100) < 50), "aa": outcome(100, 60)},  # no common images
        {"natural": outcome(100, 90), "fgsm": outcome(100, 90), "pgd20": outcome(100, 90)},  # eps = 0
        {"natural": outcome(100, 90), "fgsm": outcome(100, 0), "pgd20": outcome(100, 0)},  # no gradient left to mask
        {"pgd20": outcome(100, 50), "pgd50": outcome(100, 48)},
        {"natural": outcome(100, 90), "aa": outcome(100, 50), "fgsm": outcome(100, 70), "pgd20": outcome(100, 55)},
    ],
)
def test_consistent_outcomes_are_not_flagged(outcomes: dict[str, Outcome]) -> None:
    """Outcomes of sound evaluations."""
    assert contradictions(outcomes) == []
