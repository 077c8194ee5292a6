"""AutoAttack has the outcome of a direct call of its package, image for image."""

import gzip
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from torch import nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.evaluate.measures import Images, correct_under
from nrat_scale.loading.load import load
from tests.support.digits import as_images, trained_cnn

FASHION = Path("/usr/share/datasets/fashion-mnist")


def direct(
    model: nn.Module, images: Images, eps: float, seed: int, size: int, norm: str = "Linf", parts: str | None = None
) -> np.ndarray:
    """Survivors of pyautoattack itself, block by block."""
    outcome = []
    for start in range(0, len(images), size):
        x, y = images.pixels[start : start + size].float() / 255, images.labels[start : start + size]
        attack = pyautoattack.AutoAttack(model, eps=eps, norm=norm, seed=seed, device="cpu", version="standard")
        attack.attacks_to_run = attack.attacks_to_run if parts is None else parts.split("+")
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=size)
        outcome.append(model(x_adv).argmax(1).eq(y).numpy())
    return np.concatenate(outcome)


@pytest.mark.medium
def test_the_standard_version_on_digits(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """All four parts, over two blocks of which the last is short; the global random state is not used."""
    some = images.take(np.arange(4))
    state = torch.random.get_rng_state()
    ours = correct_under("aa", model, some, threat, seed=3, batch_size=3)
    assert torch.equal(state, torch.random.get_rng_state())
    expected = direct(model, some, threat.eps, 3, 3)
    assert np.array_equal(ours, expected)
    assert 0 < expected.sum() < correct_under("natural", model, some, threat).sum()


@pytest.mark.medium
def test_parts_in_l2_on_digits(model: nn.Module, images: Images) -> None:
    """Named parts in their order, in the l_2 norm."""
    some, parts = images.take(np.arange(8)), "apgd-ce+fab-t"
    threat = ThreatSpec(0.8, 0.2, 1, norm="l2")
    ours = correct_under(f"aa:{parts}", model, some, threat, seed=3, batch_size=5)
    expected = direct(model, some, 0.8, 3, 5, "L2", parts)
    assert np.array_equal(ours, expected)
    assert 0 < expected.sum() < correct_under("natural", model, some, threat).sum()


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_standard_version_on_fashion_mnist() -> None:
    """The same on real images of 28 x 28 pixels."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION / f"{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)

    pixels = read("t10k-images-idx3", 16).reshape(-1, 28, 28, 1)
    labels = read("t10k-labels-idx1", 8).astype(np.int64)
    model = trained_cnn(pixels[2000:4000], labels[2000:4000], 0.05)
    some = as_images(pixels[:6], labels[:6])
    ours = correct_under("aa", model, some, ThreatSpec(0.05, 0.02, 1), seed=0, batch_size=4)
    expected = direct(model, some, 0.05, 0, 4)
    assert np.array_equal(ours, expected) and expected.any()


@pytest.mark.slow
def test_apgd_on_a_resnet() -> None:
    """The standard (not robust) ResNet-18 in the wheel of pyautoattack, on synthetic images with the labels it gives them.

    This says nothing about its accuracy on CIFAR-10.
    """
    path = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    model = load(path, arch="resnet18_cifar", mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (3, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    pixels = np.clip(coarse + generator.integers(-20, 20, (3, 32, 32, 3)), 0, 255).astype(np.uint8)
    some = as_images(pixels, np.zeros(3, np.int64))
    with torch.no_grad():
        some = Images(some.pixels, model(some.pixels / 255).argmax(1), some.ids)
    ours = correct_under("aa-apgd", model, some, ThreatSpec(8 / 255, 2 / 255, 1), seed=1, batch_size=2)
    assert np.array_equal(ours, direct(model, some, 8 / 255, 1, 2, parts="apgd-ce+apgd-t"))
