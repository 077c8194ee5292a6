"""Models whose gradients mislead attacks, made of a sound one."""

import copy
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


class Changed(nn.Module):
    """A model with changed images and changed logits."""

    def __init__(self, model: nn.Module, before: Change | None = None, after: Change | None = None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


class WithGradient(nn.Module):
    """The function of a model, with another gradient: `backward` maps (images, the true gradient) to it."""

    def __init__(self, model: nn.Module, backward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.backward_pass = model, backward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        model, backward_pass = self.model, self.backward_pass

        class Surrogate(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                with torch.no_grad():
                    return model(x)

            @staticmethod
            def backward(ctx, outer):
                (x,) = ctx.saved_tensors
                with torch.enable_grad():
                    inner = x.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(model(inner), inner, outer)
                return backward_pass(x, gradient)

        return Surrogate.apply(x)


def noise_of(x: Tensor, key: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Normal noise for each image, seeded by the bytes of `key` of it: the same image always gets the same noise."""
    digests = [hashlib.sha256(key(image).detach().numpy().tobytes()).digest() for image in x]
    seeds = [int.from_bytes(digest[:7], "little") for digest in digests]
    return torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class NoisyLogits(nn.Module):
    """A model whose logits have noise that is a function of the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + noise_of(x)[:, 0].flatten(1)[:, : logits.shape[1]]


class MeanSparse(nn.Module):
    """Replaces activations within `threshold` standard deviations of their channel's mean by it (Amini et al. 2024)."""

    def __init__(self, mean: Tensor, deviation: Tensor, threshold: float, masks: bool) -> None:
        super().__init__()
        self.mean, self.width, self.masks = mean, threshold * deviation, masks

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        kept = centred.abs() >= self.width
        return self.mean + (centred * kept if self.masks else torch.where(kept, centred, torch.zeros_like(centred)))


def mean_sparse(model: nn.Module, x: Tensor, threshold: float, masks: bool = False) -> nn.Module:
    """A copy of a `Cnn4` with `MeanSparse` before each ReLU, whose means are those of images `x`."""
    model = copy.deepcopy(model)
    layers, hidden = list[nn.Module](), model.normalise(x)
    with torch.no_grad():
        for layer in model.features:
            if isinstance(layer, nn.ReLU):
                dims = (0, 2, 3) if hidden.ndim == 4 else (0,)
                mean, deviation = hidden.mean(dims, keepdim=True), hidden.std(dims, keepdim=True)
                layers.append(MeanSparse(mean, deviation, threshold, masks))
                hidden = layers[-1](hidden)
            layers.append(layer)
            hidden = layer(hidden)
    model.features = nn.Sequential(*layers)
    return model.eval()
