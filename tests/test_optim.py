"""The optimizer's groups, skipped steps, and learning rate and momentum by epoch and by step."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.models import WideResNet
from nrat_scale.optim import (
    OPTIMIZERS,
    OptimSpec,
    align_gradients,
    build_optimizer,
    learning_rates,
    schedule_table,
    set_rates,
    zero_momentum,
)

# ---- parameter groups -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One layer of each kind that has a bias or normalises; a weight that two layers share, and one in no layer."""

    def __init__(self) -> None:
        super().__init__()
        batch_norms = [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)]
        other_norms = [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4)]
        self.norms = nn.ModuleList([*batch_norms, *other_norms])
        self.others = nn.ModuleList(
            [
                nn.Linear(4, 4),
                nn.Conv1d(4, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.ConvTranspose2d(4, 4, 1),
                nn.Bilinear(4, 4, 4),
                nn.MultiheadAttention(4, 1, add_bias_kv=True),
            ]
        )
        self.bn_bias = nn.Linear(4, 4)  # named like what it is not
        self.tied = nn.Linear(4, 4)
        self.tied.weight, self.tied.bias = self.bn_bias.weight, self.bn_bias.bias
        self.scale = nn.Parameter(torch.ones(4))


def decays(model: nn.Module, spec: OptimSpec) -> dict[str, float]:
    optimizer = build_optimizer(model, spec)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: decay[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_every_parameter_is_optimised_exactly_once(name, decay_norms, decay_biases):
    """For all combinations of groups, and with a weight that two layers share."""
    for model in (WideResNet(10, 1), Mixed()):
        optimizer = build_optimizer(model, OptimSpec(name, decay_norms=decay_norms, decay_biases=decay_biases))
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_groups_go_by_the_type_of_the_layer(decay_norms, decay_biases):
    """All parameters of norm layers, biases of all other layers; attribute names do not matter."""
    found = decays(Mixed(), OptimSpec(weight_decay=5e-4, decay_norms=decay_norms, decay_biases=decay_biases))
    norms = {name for name in found if name.startswith("norms.")}
    ends = ("bias", "bias_k", "bias_v")
    biases = {name for name in found if name.endswith(ends)} - norms
    assert len(norms) == 2 * 7 - 1  # RMSNorm has no bias
    assert len(biases) == 5 + 4 + 1  # attention has four, the tied one counts once
    for name, value in found.items():
        kept = decay_norms if name in norms else decay_biases if name in biases else True
        assert value == (5e-4 if kept else 0.0), name


def test_published_decay():
    """DM_AT: weight decay on convolutions and the last layer (bias too), none on BatchNorm. The tables: on everything."""
    model = WideResNet(10, 1)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    found = decays(model, OptimSpec(weight_decay=5e-4, decay_norms=False))
    undecayed = {name for name, value in found.items() if value == 0.0}
    assert undecayed == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert len(undecayed) == 2 * 7 and found["logits.bias"] == 5e-4
    assert set(decays(model, OptimSpec(weight_decay=5e-4)).values()) == {5e-4}


def test_model_without_norms_has_one_group():
    """No empty group is made."""
    optimizer = build_optimizer(nn.Linear(2, 2), OptimSpec(decay_norms=False))
    assert len(optimizer.param_groups) == 1


# ---- steps ----------------------------------------------------------------------------------------------------------

STEPPED = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in OPTIMIZERS for dtype in (torch.float32, torch.float64)]
)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, *, skipped: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if skipped:
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    if skipped:
        del optimizer.found_inf


def plain_loop(model: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """Torch's optimizer of `spec` without fused or foreach kernels."""
    common = {"weight_decay": spec.weight_decay, "foreach": False}
    if spec.name == "sgd":
        return torch.optim.SGD(model.parameters(), spec.lr, spec.momentum, nesterov=spec.nesterov, **common)
    return torch.optim.AdamW(model.parameters(), spec.lr, (spec.momentum, 0.999), **common)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        found += [value.clone() for _, value in sorted(optimizer.state[parameter].items())]
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@STEPPED
def test_a_skipped_step_changes_nothing(name, dtype):
    """A step with `found_inf` keeps parameters, momentum and step counts, bit for bit; the next step is unaffected."""
    model = WideResNet(10, 1).to(dtype)
    twin = WideResNet(10, 1).to(dtype)
    twin.load_state_dict(model.state_dict())
    spec = OptimSpec(name, lr=0.05, nesterov=name == "sgd", decay_norms=False)
    optimizer, other = build_optimizer(model, spec), build_optimizer(twin, spec)
    for seed in range(2):
        stepped(model, optimizer, seed)
        stepped(twin, other, seed)
    before = state(model, optimizer)
    stepped(model, optimizer, 5, skipped=True)
    assert same(state(model, optimizer), before)
    stepped(model, optimizer, 6)
    stepped(twin, other, 6)
    assert same(state(model, optimizer), state(twin, other))


@STEPPED
def test_the_first_step_can_be_skipped(name, dtype):
    """As under fp16, whose loss scaling overflows at once: after `zero_momentum` no momentum is uninitialised."""
    junk = [torch.full((4, 4), 1e30, dtype=dtype) for _ in range(100)]  # what fresh memory would hold
    del junk
    model, twin = Mixed().to(dtype), Mixed().to(dtype)
    twin.load_state_dict(model.state_dict())
    optimizer, other = (build_optimizer(m, OptimSpec(name, lr=0.05)) for m in (model, twin))
    zero_momentum(optimizer)
    stepped(model, optimizer, 0, skipped=True)
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])
    stepped(model, optimizer, 1)
    stepped(twin, other, 1)
    assert same(state(model, optimizer), state(twin, other))


@STEPPED
def test_fused_steps_are_the_steps_of_the_formula(name, dtype):
    """Fused kernels and torch's plain loop give the same weights and state."""
    model, twin = Mixed().to(dtype), Mixed().to(dtype)
    twin.load_state_dict(model.state_dict())
    spec = OptimSpec(name, lr=0.05, momentum=0.8, weight_decay=0.01)
    optimizer, other = build_optimizer(model, spec), plain_loop(twin, spec)
    assert all(group["fused"] for group in optimizer.param_groups)
    for seed in range(4):
        stepped(model, optimizer, seed)
        stepped(twin, other, seed)
    torch.testing.assert_close(state(model, optimizer), state(twin, other))


@STEPPED
def test_fused_steps_of_channels_last_weights(name, dtype):
    """Gradients of another memory format than their weights, as after DistributedDataParallel: once aligned, the fused
    optimizer steps like torch's plain loop."""
    model, twin = WideResNet(10, 1).to(dtype), WideResNet(10, 1).to(dtype)
    twin.load_state_dict(model.state_dict())
    model = model.to(memory_format=torch.channels_last)
    spec = OptimSpec(name, lr=0.05, momentum=0.8, weight_decay=0.01, nesterov=name == "sgd")
    optimizer, other = build_optimizer(model, spec), plain_loop(twin, spec)
    assert all(group["fused"] for group in optimizer.param_groups)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=dtype)
            two.grad = one.grad.clone()
        assert any(p.grad is not None and p.grad.stride() != p.stride() for p in model.parameters())
        align_gradients(model.parameters())
        optimizer.step()
        other.step()
    torch.testing.assert_close(state(model, optimizer), state(twin, other))
    assert model.init_conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_aligning_changes_the_memory_format_only():
    """In both directions; an aligned gradient stays the same tensor, and a missing one stays missing."""
    channels_last = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    contiguous = nn.Conv2d(3, 4, 3, bias=False)
    unused, linear = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    values = torch.arange(108.0).view(4, 3, 3, 3)
    channels_last.weight.grad = values.clone()
    contiguous.weight.grad = values.to(memory_format=torch.channels_last, copy=True)
    linear.weight.grad = torch.ones(2, 2)
    kept = linear.weight.grad
    align_gradients(layer.weight for layer in (channels_last, contiguous, unused, linear))
    for layer in (channels_last, contiguous):
        gradient = layer.weight.grad
        assert torch.equal(gradient, values) and gradient.stride() == layer.weight.stride()
        assert not gradient.requires_grad
    assert linear.weight.grad is kept and torch.equal(kept, torch.ones(2, 2))
    assert unused.weight.grad is None


def test_devices_without_fused_kernels():
    """On devices other than CPU and CUDA the optimizer is not fused."""
    optimizer = build_optimizer(nn.Linear(2, 2, device="meta"), OptimSpec())
    assert not optimizer.param_groups[0]["fused"]


# ---- constants ------------------------------------------------------------------------------------------------------


def test_constants_reach_the_optimizer():
    """SGD with momentum 0.9 and no Nesterov by default, AdamW with momentum as its first beta."""
    (group,) = build_optimizer(nn.Linear(2, 2), OptimSpec(lr=0.2, momentum=0.8, nesterov=True)).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["dampening"]) == (0.2, 0.8, True, 0)
    adamw = build_optimizer(nn.Linear(2, 2), OptimSpec("adamw", lr=0.01, momentum=0.8, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["betas"], adamw.param_groups[0]["weight_decay"]) == ((0.8, 0.999), 0.1)
    spec = OptimSpec()
    assert (spec.name, spec.lr, spec.momentum, spec.weight_decay, spec.nesterov) == ("sgd", 0.1, 0.9, 5e-4, False)
    assert isinstance(build_optimizer(nn.Linear(2, 2), spec), torch.optim.SGD)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_set_rates_reaches_all_groups(name):
    """Learning rate and momentum change in all groups, weight decay in none."""
    optimizer = build_optimizer(WideResNet(10, 1), OptimSpec(name, decay_norms=False))
    before = [group["weight_decay"] for group in optimizer.param_groups]
    set_rates(optimizer, 0.03, 0.87)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert group["lr"] == 0.03
        assert group["betas"] == (0.87, 0.999) if name == "adamw" else group["momentum"] == 0.87
    assert [group["weight_decay"] for group in optimizer.param_groups] == before


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
    """Has the peak learning rate, one-cycle too."""
    assert schedule_table(OptimSpec(lr=0.2, schedule=schedule, milestones=[1]), 1) == [(0.2, 0.9)]


@pytest.mark.parametrize("pct_start", [0.025, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5])
def test_onecycle_of_any_length(pct_start):
    """Also if the warm-up is exactly the first epoch, for which torch's scheduler divides by zero."""
    spec = OptimSpec(lr=0.2, schedule="onecycle", pct_start=pct_start)
    for epochs in range(1, 61):
        table = schedule_table(spec, epochs)
        assert len(table) == epochs
        assert all(0 < lr <= 0.2 + 1e-12 and 0.85 - 1e-12 <= momentum <= 0.95 for lr, momentum in table)
    exact = schedule_table(spec, round(1 / pct_start)) if (1 / pct_start).is_integer() else [(0.2, 0.85)]
    assert exact[0] == pytest.approx((0.2, 0.85))


def test_cosine_goes_from_the_rate_to_almost_nothing() -> None:
    """Epoch e of E trains at lr (1 + cos(pi e / E)) / 2; the value 0 would come after the last one."""
    table = schedule_table(OptimSpec(lr=0.4, schedule="cosine"), 10)
    expected = [0.4 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert [lr for lr, _ in table] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "multistep", "onecycle", "cosine"])
def test_rates_by_epoch_are_constant_within_it(schedule):
    """`per: epoch`, the default."""
    spec = OptimSpec(lr=0.3, schedule=schedule, milestones=[2, 4], pct_start=0.3)
    rates, table = learning_rates(spec, 6, 7), schedule_table(spec, 6)
    assert rates == [table[step // 7] for step in range(42)]


@pytest.mark.parametrize("schedule", ["constant", "multistep"])
def test_schedules_that_change_between_epochs_only(schedule):
    """`per: step` does not change them; milestones are epochs."""
    spec = OptimSpec(lr=0.3, schedule=schedule, milestones=[2, 4])
    assert learning_rates(dataclasses.replace(spec, per="step"), 6, 7) == learning_rates(spec, 6, 7)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(50, 8), (400, 98), (1, 1)])
def test_cosine_by_step(epochs, steps_per_epoch):
    """lr (1 + cos(pi t / T)) / 2 at step t of T."""
    total = epochs * steps_per_epoch
    rates = learning_rates(OptimSpec(lr=0.4, schedule="cosine", per="step"), epochs, steps_per_epoch)
    expected = [0.4 * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]
    assert len(rates) == total
    assert [lr for lr, _ in rates] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(50, 8), (400, 98)])
def test_onecycle_by_step(epochs, steps_per_epoch):
    """Torch's scheduler stepped once per step: the peak is after `pct_start` of all steps, momentum cycles against the
    rate, and there are as many entries as steps."""
    total, pct_start = epochs * steps_per_epoch, 0.025
    spec = OptimSpec(lr=0.2, schedule="onecycle", per="step", pct_start=pct_start)
    rates = learning_rates(spec, epochs, steps_per_epoch)
    assert len(rates) == total
    assert rates == schedule_table(spec, total)
    top = round(pct_start * total) - 1
    assert rates[0] == pytest.approx((0.2 / 25, 0.95)) and rates[-1] == pytest.approx((0.2 / 25e4, 0.95))
    assert rates[top] == max(rates) == pytest.approx((0.2, 0.85))
    assert rates == learning_rates(spec, epochs, steps_per_epoch), "a second call gives the same"


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
        ({"per": "steps"}, "Did you mean 'step'"),
        ({"pct_start": 0.0}, r"optim\.pct_start is 0\.0.*\(0, 1\)"),
        ({"pct_start": 1.0}, r"optim\.pct_start"),
        ({"momentum": 1.0}, r"optim\.momentum is 1\.0; .*\[0, 1\)"),
        ({"momentum": -0.1}, r"optim\.momentum"),
        ({"weight_decay": -1e-4}, r"optim\.weight_decay is -0\.0001; it must be 0 or more"),
        ({"weight_decay": math.nan}, r"optim\.weight_decay"),
        ({"nesterov": True, "momentum": 0.0}, r"optim\.nesterov needs optim\.momentum"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    """When the spec is made, not inside torch."""
    with pytest.raises(UserError, match=message):
        OptimSpec(**arguments)


def test_spec_is_frozen():
    """Values cannot change after they were checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimSpec().lr = 1.0
