"""scikit-learn's digits, and small CNNs that are trained adversarially in a second."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.evaluate.measures import Images
from nrat_scale.models import ModelSpec, create, model_arguments

DIGIT_NAMES = tuple("0123456789")
CNN_ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 8, "hidden": 32}), 10, 1, (0.3,), (0.3,))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8, 1], and labels."""
    found = load_digits()
    return (found.images * 15.9).astype(np.uint8)[..., None], found.target.astype(np.int64)


def as_images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    """Images to evaluate, with ids 0, 1, 2, ..."""
    pixels = pixels.transpose(0, 3, 1, 2).copy()
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), np.arange(len(labels)))


def trained_cnn(pixels: np.ndarray, labels: np.ndarray, eps: float, steps: int = 240) -> nn.Module:
    """A CNN with `CNN_ARGUMENTS` after short adversarial training: right on most images, robust on some."""
    torch.manual_seed(0)
    model = create("cnn4", CNN_ARGUMENTS)
    x, y = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 255).float(), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = nn.functional.cross_entropy
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        batch, target = x[rows], y[rows]
        inner = lambda logits, target=target: loss(logits, target, reduction="none")  # noqa: E731
        x_adv = pgd(model, batch, inner, ThreatSpec(eps, eps / 2, 3))
        optimizer.zero_grad()
        (loss(model(x_adv), target) + loss(model(batch), target)).backward()
        optimizer.step()
    return model.eval()
