"""The baseline: one training step as public code writes it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Textbook:
    """One model that switches between modes, SGD, a loop over parameters for the EMA, and `.item()` in every step.

    Attributes:
        autocast: compute forwards and losses under bf16 autocast.
    """

    def __init__(self, model: nn.Module, ema: nn.Module, objective: str) -> None:
        self.model, self.ema, self.objective, self.autocast = model, ema, objective, False
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def _precision(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast)

    def attack(self, x: Tensor, noise: Tensor) -> Tensor:
        """TRADES' attack: maximise KL(p || p') with the natural prediction p computed once, ten steps."""
        kept = [b.clone() for b in self.model.buffers()]
        self.model.train(self.objective == "dm_at")
        with torch.no_grad():
            natural = F.softmax(self.model(x), dim=1)
        eps, step = 8 / 255, 2 / 255
        x_adv = (x + eps * noise).clamp(0, 1) if self.objective == "dm_at" else x + 0.001 * noise
        for _ in range(10):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.kl_div(F.log_softmax(self.model(x_adv), dim=1), natural, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + step * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)  # DM_AT does not update the running statistics while attacking
        self.model.train()
        return x_adv

    def outer(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        """The outer loss."""
        log_p, log_p_adv = F.log_softmax(logits, 1), F.log_softmax(logits_adv, 1)
        kl = F.kl_div(log_p_adv, log_p.exp(), reduction="batchmean")
        if self.objective == "trades":
            return F.cross_entropy(logits, y) + 6 * kl
        if self.objective == "dm_at":
            return F.cross_entropy(logits, y, label_smoothing=0.1) + 5 * kl
        one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        nce = (-log_p.gather(1, y[:, None]).squeeze(1) / -log_p.sum(1)).mean()
        rce = -(log_p.exp().clamp(1e-7, 1) * one_hot.clamp(1e-4, 1).log()).sum(1).mean()
        return nce + rce + 6 * (kl + F.kl_div(log_p, log_p_adv.exp(), reduction="batchmean")) / 2

    def step(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, float]:
        """One step; returns the adversarial images and the loss."""
        with self._precision(x):
            x_adv = self.attack(x, noise)
            self.optimizer.zero_grad()
            loss = self.outer(self.model(x), self.model(x_adv), y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.mul_(0.995).add_(value, alpha=0.005)
            for buffer, source in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                buffer.copy_(source)
        return x_adv, loss.item()
