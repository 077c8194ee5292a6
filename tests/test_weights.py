"""AWP perturbs the weights and subtracts the perturbation; the EMA averages parameters and copies buffers."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
from nrat_scale.objectives import build
from nrat_scale.weights import AwpSpec, EmaSpec, awp, build_ema, perturbable

PERTURBED = ("conv.weight", "fc.weight")  # of SmallNet: biases and BatchNorm's vectors are not perturbed
GAMMA = 0.01


def _batch(seed: int = 0, count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Natural images, adversarial images, labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype)
    x_adv = (x + 0.05 * torch.randn(x.shape, generator=generator, dtype=dtype)).clamp(0, 1)
    return x, x_adv, torch.arange(count) % 5


def _outer(x: Tensor, x_adv: Tensor, y: Tensor):
    objective = build("trades")
    return lambda model: objective.loss(model(x), model(x_adv), y)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _gradients(model: nn.Module, loss_fn) -> dict[str, Tensor]:
    """Of the loss in training mode, by a plain backward on a copy."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    loss_fn(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _assert_shifted(model: nn.Module, before: dict[str, Tensor], gradients: dict[str, Tensor], gamma: float) -> None:
    """Inside `awp`: w + gamma ||w|| g / ||g|| for the perturbable weights, everything else untouched."""
    for name, value in model.state_dict().items():
        w = before[name]
        if name in PERTURBED:
            g = gradients[name]
            expected = w + gamma * w.square().sum().sqrt() * g / g.square().sum().sqrt()
            assert not torch.equal(value, w)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)
        else:
            assert torch.equal(value, w), name


# ---- AWP ------------------------------------------------------------------------------------------------------------


def test_perturbable_weights(make_net):
    """Parameters called `weight` with more than one dimension: no bias and no BatchNorm vector."""
    net = make_net()
    net.register_parameter("table", nn.Parameter(torch.zeros(2, 2)))
    assert [name for name, _ in perturbable(net)] == list(PERTURBED)
    assert all(parameter is dict(net.named_parameters())[name] for name, parameter in perturbable(net))


@pytest.mark.parametrize("training", [True, False])
def test_awp_perturbs_by_gamma_and_undoes_it(make_net, training):
    """The direction is the gradient in training mode; inside, the loss is higher; on exit the weights are restored."""
    net, loss_fn = make_net().train(training), _outer(*_batch())
    before, gradients = _state(net), _gradients(net, loss_fn)
    with torch.no_grad():
        loss = loss_fn(copy.deepcopy(net).train())
    with awp(net, loss_fn, GAMMA):
        _assert_shifted(net, before, gradients, GAMMA)
        assert net.training == net.bn.training == training
        assert loss_fn(copy.deepcopy(net).train()) > loss
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-15)


def test_awp_does_not_change_gradients_and_batchnorm(make_net):
    """`.grad` and every BatchNorm buffer, also its counter, are unchanged inside and after."""
    net = make_net().train()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    buffers = {name: value.clone() for name, value in net.named_buffers()}

    def check() -> None:
        assert all(torch.equal(p.grad, torch.full_like(p, 0.25)) for p in net.parameters())
        assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
        assert all(p.requires_grad for p in net.parameters()) and net.bn.track_running_stats

    with awp(net, _outer(*_batch()), GAMMA):
        check()
    check()


def test_a_change_made_inside_stays(make_net):
    """v is subtracted after the optimizer's step instead of restoring a copy, so weight decay acts on w + v."""
    net, loss_fn = make_net(), _outer(*_batch())
    before = _state(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
    with awp(net, loss_fn, GAMMA):
        moved = _state(net)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for name, parameter in net.named_parameters():
        shift = moved[name] - before[name]
        expected = before[name] - 0.1 * (1 + 0.5 * (before[name] + shift))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_weights_are_restored_after_an_error(make_net):
    """An interrupted step must not leave the model at w + v."""
    net = make_net()
    before = _state(net)
    with pytest.raises(KeyboardInterrupt), awp(net, _outer(*_batch()), GAMMA):
        raise KeyboardInterrupt
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-15)


def test_both_call_forms_of_the_loss(make_net):
    """`loss_fn(model)` and `loss_fn()` give the same perturbation."""
    x, x_adv, y = _batch()
    states = []
    for with_argument in (True, False):
        net = make_net()
        loss_fn = _outer(x, x_adv, y)
        with awp(net, loss_fn if with_argument else lambda loss_fn=loss_fn, net=net: loss_fn(net), GAMMA):
            states.append(_state(net))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("pieces", [2, 3])
def test_micro_batches_equal_the_full_batch(make_net, pieces):
    """Accumulated micro-batches perturb the weights like their whole batch (without BatchNorm)."""
    x, x_adv, y = _batch()
    net = make_net()
    net.bn = nn.GroupNorm(2, 6).double()  # statistics of a micro-batch would differ
    gradients, before = _gradients(net, _outer(x, x_adv, y)), _state(net)
    parts = [_outer(*part) for part in zip(x.chunk(pieces), x_adv.chunk(pieces), y.chunk(pieces), strict=True)]
    with awp(net, parts, GAMMA):
        _assert_shifted(net, before, gradients, GAMMA)


def test_reduce_is_applied_before_the_norm(make_net):
    """The gradient is averaged over ranks first; the length of v is gamma ||w|| for any gradients."""
    net, batches = make_net(), [_batch(0), _batch(1)]
    before = _state(net)
    by_rank = [_gradients(net, _outer(*batch)) for batch in batches]
    mean = {name: (by_rank[0][name] + by_rank[1][name]) / 2 for name in by_rank[0]}
    other_rank = iter([by_rank[1][name] for name in PERTURBED])
    with awp(net, _outer(*batches[0]), GAMMA, reduce=lambda gradient: (gradient + next(other_rank)) / 2):
        _assert_shifted(net, before, mean, GAMMA)
    with awp(net, _outer(*batches[0]), GAMMA, reduce=lambda gradient: 1000 * gradient):
        _assert_shifted(net, _state(make_net()), by_rank[0], GAMMA)


def test_gamma_zero_does_nothing(make_net):
    """No weight changes by a bit."""
    net = make_net()
    before = _state(net)
    with awp(net, _outer(*_batch()), 0.0):
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_gradient_of_zero_does_not_perturb(make_net):
    """||g|| = 0 does not divide by zero."""
    net = make_net()
    before = _state(net)
    with awp(net, lambda model: 0.0 * sum(p.sum() for p in model.parameters()), GAMMA):
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def _partly_bad(bad: dict[str, float]):
    """A loss whose gradient is finite except for the weights of `bad`, whose value it has in one element."""

    def loss(model: nn.Module) -> Tensor:
        total = sum(parameter.square().sum() for parameter in model.parameters())
        for name, value in bad.items():
            total = total + model.get_parameter(name).flatten()[1] * value
        return total

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad", [PERTURBED[:1], PERTURBED[1:], PERTURBED])
def test_no_perturbation_without_a_finite_gradient(make_net, value, bad):
    """Adding NaN cannot be undone: such a weight keeps its bits inside and after; the others are perturbed and restored."""
    net = make_net()
    before = _state(net)
    loss_fn = _partly_bad(dict.fromkeys(bad, value))
    with awp(net, loss_fn, GAMMA):
        for name, parameter in net.state_dict().items():
            assert torch.equal(parameter, before[name]) == (name in bad or name not in PERTURBED), name
            assert parameter.isfinite().all(), name
    for name, parameter in net.state_dict().items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0 if name in bad else 1e-15)


def test_no_perturbation_from_images_that_are_not_finite(make_net):
    """NaN in one image makes every gradient NaN; no weight changes."""
    net, (x, x_adv, y) = make_net(), _batch()
    x_adv[0, 0, 0, 0] = math.nan
    before = _state(net)
    with awp(net, _outer(x, x_adv, y), GAMMA):
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_another_rank_may_have_the_bad_gradient(make_net):
    """The average over ranks counts: no rank perturbs these weights."""
    net = make_net()
    before = _state(net)
    with awp(net, _outer(*_batch()), GAMMA, reduce=lambda gradient: gradient + math.nan):
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_awp_is_off_unless_asked_for():
    """gamma is 0 by default; TRADES-AWP perturbs from its tenth epoch on, after nine."""
    assert (AwpSpec().gamma, AwpSpec().warmup_epochs) == (0.0, 9)


# ---- EMA ------------------------------------------------------------------------------------------------------------


def _decay(step: int, total_steps: int, final: float, fraction: float) -> float:
    warmup = int(-(-fraction * total_steps // 1))
    t = step - warmup
    return 0.0 if t < 0 else min(final, (1 + t) / (10 + t))


@pytest.mark.parametrize(("total_steps", "fraction"), [(400, 0.025), (1000, 0.05), (37, 0.1), (10, 0.0)])
def test_decay_rule(total_steps, fraction):
    """0 during the warm-up, then min(decay, (1 + t) / (10 + t)) with t counted from its end."""
    ema = build_ema(nn.Linear(1, 1), EmaSpec(0.9, fraction), total_steps)
    for step in range(1, total_steps):
        assert ema.get_decay(step) == pytest.approx(_decay(step, total_steps, 0.9, fraction), abs=1e-12), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_are_averaged_and_buffers_copied(make_net, dtype):
    """Ten updates by the rule, in float32 and float64; BatchNorm's buffers are always the model's latest, as copies."""
    net, total_steps = make_net(dtype=dtype).train(), 120
    ema = build_ema(net, EmaSpec(0.8, 0.025), total_steps)
    generator = torch.Generator().manual_seed(0)
    average = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    for step in range(1, 60):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += torch.randn(parameter.shape, generator=generator, dtype=dtype)
            net(torch.rand(4, 3, 8, 8, generator=generator, dtype=dtype))
        ema.update(net, step=step)
        decay = _decay(step, total_steps, 0.8, 0.025)
        average = {n: decay * average[n] + (1 - decay) * p.detach().double() for n, p in net.named_parameters()}
    for name, parameter in ema.module.named_parameters():
        assert parameter.dtype == dtype
        torch.testing.assert_close(
            parameter.detach().double(), average[name], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
        )
        assert not torch.equal(parameter, dict(net.named_parameters())[name])
    sources = dict(net.named_buffers())
    assert sources["bn.num_batches_tracked"] == 59
    for name, buffer in ema.module.named_buffers():
        assert torch.equal(buffer, sources[name]), name
        assert buffer.data_ptr() != sources[name].data_ptr(), name
    assert not ema.module.training and net.training


def test_the_averaged_model_shares_no_tensor(make_net):
    """A change of the model does not change the EMA."""
    net = make_net()
    ema = build_ema(net, EmaSpec(0.9), 100)
    kept = _state(ema.module)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(value, kept[name]) for name, value in ema.module.state_dict().items())


# ---- specs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (EmaSpec, {"decay": 1.0}, r"ema\.decay is 1\.0; it must be in \[0, 1\)"),
        (EmaSpec, {"warmup_fraction": -0.1}, r"ema\.warmup_fraction is -0\.1"),
        (AwpSpec, {"gamma": math.nan}, r"awp\.gamma is nan; it must be in \[0, 1\)"),
        (AwpSpec, {"warmup_epochs": -1}, r"awp\.warmup_epochs is -1; it must be 0 or more"),
    ],
)
def test_wrong_settings_are_refused(spec, arguments, message):
    """When the spec is made."""
    with pytest.raises(UserError, match=message):
        spec(**arguments)
