"""Whether attacks can follow the gradient of a model's logits."""

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.modes import frozen
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.measures import Images

_IMAGES_PER_LOGIT, _MOST_LOGITS = 4, 16  # to find logits without a gradient: one backward pass for each logit
_SAME_LOGITS = 1e-3  # relative difference that kernels may cause for another batch size


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether logits of the same shape differ by more than rounding."""
    one, other = one.float(), other.float()  # bool has no difference
    return bool((one - other).abs().max() > _SAME_LOGITS * (1 + one.abs().max()))


def are_probabilities(logits: Tensor) -> bool:
    """Whether each row is non-negative and sums to 1."""
    return bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-5).all())


def check_differentiable(model: nn.Module, images: Images, what: str) -> None:
    """Raise `UserError` if attacks cannot follow the gradient of `model`; `what` names it."""
    x = to_float(images.pixels.to(next(model.parameters()).device))
    if (sentence := without_gradient(model, x, what)) is not None:
        raise UserError(sentence)


def without_gradient(model: nn.Module, x: Tensor, what: str) -> str | None:
    """The sentence about a model that attacks cannot follow the gradient of, with those that still mean something; else None.

    Args:
        x: images [B, C, H, W] in [0, 1], on the device of the model.
        what: names the model.
    """
    if (reason := _missing_gradient(model, x)) is None:
        return None
    return (
        f"The output of {what} does not depend differentiably on its input ({reason}): attacks that follow gradients cannot "
        "work. natural, aa:square and attacks made on another model (--transfer-from) still mean something."
    )


def _missing_gradient(model: nn.Module, x: Tensor) -> str | None:
    detached = "no gradient reaches the image: an arg-max, detach, torch.no_grad or NumPy inside"
    with frozen(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        try:
            logits = model(x)
            if not logits.is_floating_point():
                return f"it returns {logits.dtype}"
            if not logits.requires_grad:
                return detached
            weights = torch.linspace(1, 2, logits.shape[1], device=logits.device)  # probabilities have a constant sum
            (gradient,) = torch.autograd.grad((logits * weights).sum(), x, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation without a derivative, or one that refuses tensors with a gradient
            return f"PyTorch: {first_line(error)}"
    return detached if gradient is None else None


def logits_without_gradient(model: nn.Module, x: Tensor) -> list[str]:
    """A flag if logits have no gradient although they differ between images: detached ones, or rounded ones."""
    with frozen(model), torch.enable_grad():
        x = x[:_IMAGES_PER_LOGIT].detach().requires_grad_()
        logits = model(x)
        step = -(-logits.shape[1] // _MOST_LOGITS)
        varying = [k for k in range(0, logits.shape[1], step) if len(x) > 1 and differ(logits[1:, k], logits[:-1, k])]
        gradients = (torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True, allow_unused=True) for k in varying)
        dead = sum(gradient is None or not bool(gradient.any()) for (gradient,) in gradients)
    if dead == 0 or are_probabilities(logits):
        return []
    return [
        f"{dead} of {len(varying)} logits do not depend differentiably on the image: attacks that follow gradients do not see "
        "them. Rely on Square and on attacks made on another model."
    ]
