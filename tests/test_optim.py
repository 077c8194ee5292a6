"""The optimizer's groups, and learning rate and momentum by epoch."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nrat_scale.errors import UserError
from nrat_scale.models import WideResNet
from nrat_scale.optim import OPTIMIZERS, OptimSpec, build_optimizer, schedule_table, set_epoch

# ---- parameter groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_batchnorm", [True, False])
def test_every_parameter_is_optimised_exactly_once(name, decay_batchnorm):
    """No parameter is forgotten or stepped twice, however the groups are cut."""
    model = WideResNet(10, 1)
    spec = OptimSpec(name, weight_decay=5e-4, decay_batchnorm=decay_batchnorm)
    optimizer = build_optimizer(model, spec)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}


def test_batchnorm_is_not_decayed_unless_wanted():
    """DM_AT: weight decay on convolutions and the last layer (bias too), none on BatchNorm. The tables: on everything."""
    model = WideResNet(10, 1)
    normalised = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    for decay_batchnorm in (False, True):
        optimizer = build_optimizer(model, OptimSpec(weight_decay=5e-4, decay_batchnorm=decay_batchnorm))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert len(normalised) == 2 * 7
        for identity, value in decay.items():
            assert value == (0.0 if identity in normalised and not decay_batchnorm else 5e-4)


def test_model_without_batchnorm_has_one_group():
    """An empty group would only confuse optimizers and checkpoints."""
    optimizer = build_optimizer(nn.Linear(2, 2), OptimSpec(decay_batchnorm=False))
    assert len(optimizer.param_groups) == 1


def test_constants_reach_the_optimizer():
    """SGD as the recipes have it (momentum 0.9, no Nesterov unless asked), AdamW with momentum as its first beta."""
    (group,) = build_optimizer(nn.Linear(2, 2), OptimSpec(lr=0.2, momentum=0.8, nesterov=True)).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["dampening"]) == (0.2, 0.8, True, 0)
    adamw = build_optimizer(nn.Linear(2, 2), OptimSpec("adamw", lr=0.01, momentum=0.8, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["betas"], adamw.param_groups[0]["weight_decay"]) == ((0.8, 0.999), 0.1)
    spec = OptimSpec()
    assert (spec.name, spec.lr, spec.momentum, spec.weight_decay, spec.nesterov) == ("sgd", 0.1, 0.9, 5e-4, False)
    assert isinstance(build_optimizer(nn.Linear(2, 2), spec), torch.optim.SGD)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_set_epoch_reaches_all_groups(name):
    """Learning rate and momentum change in every group, weight decay in none."""
    optimizer = build_optimizer(WideResNet(10, 1), OptimSpec(name, decay_batchnorm=False))
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    set_epoch(optimizer, 0.03, 0.87)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert group["lr"] == 0.03
        assert group["betas"] == (0.87, 0.999) if name == "adamw" else group["momentum"] == 0.87
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_constant_schedule():
    """The same learning rate and momentum in every epoch."""
    assert schedule_table(OptimSpec(lr=0.3, schedule="constant", milestones=[1, 2]), 5) == [(0.3, 0.9)] * 5


def test_multistep_schedule():
    """The paper's tables: divided by 10 at 100 and 150 of 200 epochs, counted from 0."""
    table = schedule_table(OptimSpec(lr=0.1, schedule="multistep", milestones=[100, 150]), 200)
    for epoch, (lr, momentum) in enumerate(table):
        assert lr == pytest.approx(0.1 * 0.1 ** ((epoch >= 100) + (epoch >= 150)), rel=1e-12)
        assert momentum == 0.9
    assert len(table) == 200
    halved = schedule_table(OptimSpec(lr=1.0, milestones=[1], gamma=0.5, schedule="multistep"), 3)
    assert [lr for lr, _ in halved] == [1.0, 0.5, 0.5]


def test_onecycle_schedule_is_a_cosine_up_and_down():
    """Peak after `pct_start` of the epochs; momentum 0.95 -> 0.85 -> 0.95 against it (torch's formula by hand)."""
    epochs, peak, pct_start = 50, 0.2, 0.1
    table = schedule_table(OptimSpec(lr=peak, schedule="onecycle", pct_start=pct_start), epochs)

    def between(start: float, end: float, fraction: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))

    top = pct_start * epochs - 1
    for epoch, (lr, momentum) in enumerate(table):
        if epoch <= top:
            expected = between(peak / 25, peak, epoch / top), between(0.95, 0.85, epoch / top)
        else:
            fraction = (epoch - top) / (epochs - 1 - top)
            expected = between(peak, peak / 25 / 1e4, fraction), between(0.85, 0.95, fraction)
        assert (lr, momentum) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert max(table)[0] == table[4][0] == pytest.approx(peak)


@pytest.mark.parametrize("schedule", ["constant", "multistep", "onecycle"])
def test_run_of_one_epoch(schedule):
    """A one-cycle schedule of one epoch has no cycle: the peak learning rate."""
    assert schedule_table(OptimSpec(lr=0.2, schedule=schedule, milestones=[1]), 1) == [(0.2, 0.9)]


@pytest.mark.parametrize("pct_start", [0.025, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5])
def test_onecycle_of_any_length(pct_start):
    """Also where the warm-up is exactly the first epoch, at which torch's own scheduler divides by zero."""
    spec = OptimSpec(lr=0.2, schedule="onecycle", pct_start=pct_start)
    for epochs in range(1, 61):
        table = schedule_table(spec, epochs)
        assert len(table) == epochs
        assert all(0 < lr <= 0.2 + 1e-12 and 0.85 - 1e-12 <= momentum <= 0.95 for lr, momentum in table)
    exact = schedule_table(spec, round(1 / pct_start)) if (1 / pct_start).is_integer() else [(0.2, 0.85)]
    assert exact[0] == pytest.approx((0.2, 0.85))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"optim\.lr is 0\.0; it must be greater than 0"),
        ({"lr": -0.1}, r"optim\.lr"),
        ({"lr": math.nan}, r"optim\.lr"),
        ({"name": "agd"}, "Did you mean 'sgd'"),
        ({"name": "lion"}, "Known: adamw, sgd"),
        ({"schedule": "onecyle"}, "Did you mean 'onecycle'"),
        ({"pct_start": 0.0}, r"optim\.pct_start is 0\.0.*\(0, 1\)"),
        ({"pct_start": 1.0}, r"optim\.pct_start"),
        ({"momentum": 1.0}, r"optim\.momentum is 1\.0; .*\[0, 1\)"),
        ({"momentum": -0.1}, r"optim\.momentum"),
        ({"weight_decay": -1e-4}, r"optim\.weight_decay is -0\.0001; it must be 0 or more"),
        ({"weight_decay": math.nan}, r"optim\.weight_decay"),
        ({"nesterov": True, "momentum": 0.0}, r"optim\.nesterov needs optim\.momentum"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    """A spec is checked where it enters and not inside torch."""
    with pytest.raises(UserError, match=message):
        OptimSpec(**arguments)


def test_spec_is_frozen():
    """Values are never changed after they were checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimSpec().lr = 1.0


def test_cosine_goes_from_the_rate_to_almost_nothing() -> None:
    """Epoch e of E trains at lr (1 + cos(pi e / E)) / 2; the value 0 would come after the last one."""
    table = schedule_table(OptimSpec(lr=0.4, schedule="cosine"), 10)
    expected = [0.4 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert [lr for lr, _ in table] == pytest.approx(expected, abs=1e-12)
