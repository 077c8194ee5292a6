"""Starts per class (`threat.init: per_class`): a perturbation for each label, from which the attack of its images starts.

FGSM-CUAP (Pan et al., "Adversarial Initialization with Universal Adversarial Perturbation", AAAI 2024), read in its authors'
code (github.com/fzjcdt/FastAT_Benchmark, fast_at/fgsm_cuap.py): with g_i the attack's gradient at the start of image i and
|g| the sum of |g_i| over all images and pixels of the batch, after each step and for each class c in the batch

    momentum_c <- mean of g_i / |g| over the images of class c + 0.3 momentum_c
    start_c    <- clamp(start_c + u sign(momentum_c), -u, u)

with u = 10/255 at eps = 8/255, then clamped to eps. start_c is always -u, 0 or u, so u = eps gives the same starts. The code
begins with random signs. Ours differs in three points: more than one step may follow; the class is the label trained on, so
with label noise it is the noisy one; and the paper's other parts (10 x MSE between the logits at the start and at x_adv, label
smoothing) are not part of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nrat_scale.core.seeds import torch_generator

_DECAY = 0.3  # of the momentum


class ClassStarts(nn.Module):
    """The perturbations of a run in units of eps, -1, 0 or 1, and their momentum; its buffers belong in checkpoints.

    Args:
        num_classes: K.
        shape: [C, H, W] of an image.
        seed: of the run, for the random signs.
        dtype: float32 or float64, as the images.
    """

    starts: Tensor  # [K, C, H, W]
    momentum: Tensor  # float64 [K, C, H, W]; sums over ranks in float64 hardly depend on their number

    def __init__(self, num_classes: int, shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch_generator("cpu", seed, "class_starts")
        signs = torch.randint(0, 2, (num_classes, *shape), generator=generator) * 2 - 1
        self.register_buffer("starts", signs.to(dtype))
        self.register_buffer("momentum", torch.zeros_like(self.starts, dtype=torch.float64))
        self._sums: Tensor | None = (
            None  # float64, of this step: gradients by class, then images by class, then the sum of |g|
        )

    def noise(self, y: Tensor) -> Tensor:
        """The unit perturbation [B, C, H, W] of each label in `y`, int64 [B], for `attacks.apply_noise`."""
        return self.starts[y]

    @torch.no_grad()
    def add(self, gradient: Tensor, y: Tensor) -> None:
        """Add the gradients [B, C, H, W] at the starts of a micro-batch with labels `y`, int64 [B]."""
        gradient = gradient.double()
        # A product instead of index_add_, which is not deterministic on GPUs.
        label = nn.functional.one_hot(y, len(self.starts)).to(gradient.dtype)
        sums = torch.cat([(label.T @ gradient.flatten(1)).flatten(), label.sum(0), gradient.abs().sum()[None]])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the starts after the micro-batches of a step; `reduce` sums a tensor over ranks."""
        added = self._sums
        assert added is not None, "the attack comes first"
        num_classes, sums = len(self.starts), reduce(added)
        self._sums = None
        gradients = sums[: -num_classes - 1].view_as(self.momentum)
        counts, total = sums[-num_classes - 1 : -1].view(-1, 1, 1, 1), sums[-1]
        mean = gradients / counts.clamp(min=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        momentum = mean + _DECAY * self.momentum
        seen = counts > 0
        self.starts.copy_(torch.where(seen, (self.starts + momentum.sign().to(self.starts)).clamp(-1, 1), self.starts))
        self.momentum.copy_(torch.where(seen, momentum, self.momentum))
