"""Adding a loss or a divergence from outside takes one entry in one table."""

from pathlib import Path

import torch
from torch import Tensor

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.objectives import DIVERGENCES, LOSSES, OBJECTIVES, Objective, ObjectiveSpec, build
from nrat_scale.recipe import load_recipe
from tests.support.formulas import assert_close, random_logits, tensors

QUICK = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def _total_variation(logits: Tensor, logits_adv: Tensor, y: Tensor | None = None) -> Tensor:
    return 0.5 * (logits.softmax(1) - logits_adv.softmax(1)).abs().sum(1)


def _margin(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def test_an_added_divergence_is_an_outer_and_an_inner_loss(monkeypatch):
    """One entry in `DIVERGENCES` is enough for both, also in a recipe."""
    monkeypatch.setitem(DIVERGENCES, "tv", _total_variation)
    monkeypatch.setitem(OBJECTIVES, "tv_at", ObjectiveSpec("tv_at", "trades", "ce", "tv", lam=2.0, inner="tv"))
    z, z_adv, y = random_logits(0, 10, 2.0)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    objective, distance = build("tv_at"), _total_variation(logits, logits_adv)
    assert_close(objective.inner(logits, labels)(logits_adv), distance)
    assert_close(objective.per_sample(logits, logits_adv, labels), LOSSES["ce"](logits, labels) + 2 * distance)
    recipe = load_recipe(QUICK, ["objective.name=mart", "objective.inner=tv"])
    assert_close(Objective(recipe.objective).inner(logits, labels)(logits_adv), distance)


def test_an_added_loss_trains(monkeypatch, make_net):
    """One entry in `LOSSES` serves as classification loss and as inner loss: a training step lowers it."""
    monkeypatch.setitem(LOSSES, "margin", _margin)
    monkeypatch.setitem(OBJECTIVES, "margin_at", ObjectiveSpec("margin_at", "at", "margin", inner="margin"))
    objective, net = build("margin_at"), make_net()
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(8) % 5
    x_adv = pgd(net, x, objective.inner(None, y), ThreatSpec(0.1, 0.05, 3, init="zero"))
    assert _margin(net.eval()(x_adv), y).mean() > _margin(net(x), y).mean()
    before = objective.loss(None, net(x_adv), y)
    before.backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    assert objective.loss(None, net(x_adv), y) < before
