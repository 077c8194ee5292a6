"""`nrat_scale.attack`: adversarial images of one's own tensors, as evaluation makes them."""

from typing import Any

import pytest
import torch
from torch import nn

import nrat_scale
from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.measures import Images, correct_under


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["pgd", "cw", "fgsm"])
def test_images_are_in_the_ball_and_break_the_model(model: nn.Module, images: Images, norm: str, attack: str) -> None:
    """In [0, 1], within eps, and the predictions are those that evaluation counts."""
    x, y, eps = to_float(images.pixels), images.labels, 0.15 if norm == "linf" else 1.0
    training = model.training
    x_adv = nrat_scale.attack(model, x, y, eps=eps, steps=8, norm=norm, attack=attack)
    assert x_adv.shape == x.shape and not x_adv.requires_grad and model.training is training
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    size = (x_adv - x).flatten(1)
    assert float((size.abs().amax(1) if norm == "linf" else size.norm(dim=1)).max()) <= eps + 1e-5
    with torch.no_grad():
        right = model(x_adv).argmax(1).eq(y).numpy()
    step = eps if attack == "fgsm" else eps / 4
    name = attack if attack == "fgsm" else f"{attack}8"
    expected = correct_under(name, model, images, ThreatSpec(eps, step, 8, norm=norm))
    assert (right == expected).mean() > 0.97 and right.mean() < 0.9
    again = nrat_scale.attack(model, x, y, eps=eps, steps=8, norm=norm, attack=attack)
    assert torch.equal(x_adv, again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attack": "pgdd"}, "pgd"),
        ({"norm": "l1"}, "linf"),
        ({"eps": 8}, "8/255"),
        ({"x": 255.0}, r"\[0, 1\]"),
        ({"y": 17}, "10 classes"),
    ],
)
def test_mistakes_are_sentences(model: nn.Module, images: Images, change: dict[str, Any], words: str) -> None:
    """Unknown names, a radius in grey levels, images in grey levels, labels of other classes."""
    x, y = to_float(images.pixels[:4]) * change.pop("x", 1.0), images.labels[:4] * 0 + change.pop("y", 1)
    with pytest.raises(UserError, match=words):
        nrat_scale.attack(model, x, y, **{"eps": 0.1, "steps": 2, **change})
