"""Modes of an attack: only BatchNorm is ever in training mode, so dropout and stochastic depth are off."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.core.modes import attack_mode
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import convert
from nrat_scale.weights import awp


class Functional(nn.Module):
    """Dropout without a layer, a training branch, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm2d(3), nn.Linear(3 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.bn(x).flatten(1), 0.5, self.training)
        return self.head(x) * (2 if self.training else 1)


def _layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.Flatten(), nn.AlphaDropout(0.5))


def _stochastic_depth() -> nn.Module:
    return timm.create_model("test_efficientnet", num_classes=4, drop_rate=0.5, drop_path_rate=0.9)


MODELS = [Functional, _layers, _stochastic_depth]
X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("way", ["attack mode", "attack model"])
def test_an_attack_sees_no_dropout(make: type[nn.Module], bn: str, way: str) -> None:
    """Two forwards are equal; BatchNorm uses the batch in `batch` mode and changes no buffer; training is as before."""
    torch.manual_seed(0)
    model = make().train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    attacked = AttackModel(model, bn).module if way == "attack model" else model
    with torch.no_grad(), attack_mode(model, bn):
        first, second = attacked(X), attacked(X)
        assert torch.equal(first, second)
        training = {type(layer) for layer in attacked.modules() if layer.training}
        assert all(issubclass(kind, _BatchNorm) for kind in training) and bool(training) == (bn == "batch")
        alone = attacked(X[:2])
    assert torch.allclose(first[:2], alone, atol=1e-4) == (bn == "eval")
    assert all(map(torch.equal, buffers, model.buffers())) and all(layer.training for layer in model.modules())
    with torch.no_grad():
        assert not torch.equal(model(X), model(X))


def test_the_attacks_of_images_and_of_weights_draw_no_random_numbers() -> None:
    """PGD from a given start, and AWP's perturbation, are the same twice and leave torch's generator as it was."""
    torch.manual_seed(0)
    model, y = Functional().train(), torch.arange(6) % 4

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, y, reduction="none")

    before = torch.get_rng_state()
    images, weights = [], []
    for _ in range(2):
        images.append(pgd(model, X, loss, ThreatSpec(0.1, 0.05, 2, bn="batch"), start=X.clone()))
        with awp(model, lambda net: loss(net(X)).mean(), 0.01):
            weights.append(model.head.weight.detach().clone())
    assert torch.equal(*images) and torch.equal(*weights)
    assert torch.equal(before, torch.get_rng_state())


def test_synchronised_batchnorm_keeps_timms_activations() -> None:
    """timm's BatchNorm layers contain the activation, which torch's own conversion would drop."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4).eval()
    expected = model(X)
    converted = convert(model, "sync", None)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
    torch.testing.assert_close(converted(X), expected)
