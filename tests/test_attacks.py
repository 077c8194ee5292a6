"""The attack stays in its threat model, increases its loss, and leaves the model unchanged."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nrat_scale.attacks import (
    INITS,
    SPACES,
    ThreatSpec,
    apply_noise,
    fraction_text,
    in_space,
    inside_ball,
    parse_fraction,
    pgd,
    project,
    start_noise,
    threat_text,
)
from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import BN_MODES
from nrat_scale.losses import LOSSES
from nrat_scale.objectives import build

THREAT = ThreatSpec(8 / 255, 2 / 255, 5)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images in [0, 1], about a third of whose pixels are exactly 0 or 1."""
    return (torch.rand(shape, generator=_generator(seed), dtype=dtype) * 1.4 - 0.2).clamp(0, 1)


def _labels(count: int, num_classes: int = 5) -> Tensor:
    return torch.arange(count) % num_classes


def _start(x: Tensor, threat: ThreatSpec, generator: torch.Generator | None = None) -> Tensor:
    return apply_noise(x, start_noise(x.shape, threat.init, x, generator), threat)


def _cross_entropy(y: Tensor):
    return lambda logits: LOSSES["ce"](logits, y)


class AnyShape(nn.Module):
    """A convolution and BatchNorm for any number of channels and any size: [B, C, H, W] -> [B, 5]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).tanh().mean((2, 3))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    eps=st.one_of(st.just(0.0), st.floats(1e-4, 0.99)),
    step=st.one_of(st.just(0.0), st.floats(1e-4, 0.99)),
    num_steps=st.integers(0, 3),
    init=st.sampled_from(INITS),
    bn=st.sampled_from(BN_MODES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6)),
    seed=st.integers(0, 2**32 - 1),
)
def test_result_is_within_eps_and_the_unit_box(eps, step, num_steps, init, bn, dtype, shape, seed):
    """For any threat, start, size and precision x_adv is finite, in [0, 1], within eps and detached; x is unchanged."""
    x = _images(*shape, seed=seed, dtype=dtype)
    kept = x.clone()
    model = AnyShape(shape[1]).to(dtype)
    threat = ThreatSpec(eps, step, num_steps, init, bn)
    x_adv = pgd(model, x, _cross_entropy(_labels(shape[0])), threat, generator=_generator(seed))
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    assert x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1
    rounding = 2.0**-23 if dtype == torch.float32 else 1e-12
    assert (x_adv.double() - x.double()).abs().max() <= eps + rounding
    assert torch.equal(x, kept) and x_adv.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("init", INITS)
def test_zero_steps_give_the_projected_start(make_net, init):
    """With num_steps = 0 the result is the random start, projected onto the ball and [0, 1]."""
    x = _images(4, 3, 8, 8)
    threat = ThreatSpec(8 / 255, 2 / 255, 0, init)
    x_adv = pgd(make_net(), x, _cross_entropy(_labels(4)), threat, generator=_generator(1))
    assert torch.equal(x_adv, project(_start(x, threat, _generator(1)), x, threat.eps))


@pytest.mark.parametrize("name", ["pgd_at", "nrat", "mart", "dm_at"])
def test_attack_raises_the_inner_loss(make_net, name):
    """The attack increases the inner loss of every image and moves most pixels by more than half of eps."""
    net, x, y = make_net().eval(), _images(6, 3, 8, 8), _labels(6)
    objective = build(name)
    inner = objective.inner(net(x), y)
    start = x + 0.001 * torch.randn(x.shape, generator=_generator(0), dtype=x.dtype)
    x_adv = pgd(net, x, inner, ThreatSpec(8 / 255, 2 / 255, 10), start=start)
    assert (inner(net(x_adv)) > inner(net(start))).all()
    assert ((x_adv - x).abs() > 4 / 255).double().mean() > 0.5


def test_one_step_is_the_signed_gradient(make_net):
    """x <- clamp(project_eps(x + step * sign(grad)), 0, 1), from the given start."""
    net, x, y = make_net().eval(), _images(4, 3, 8, 8), _labels(4)
    start = (x + 0.05 * torch.randn(x.shape, generator=_generator(0), dtype=x.dtype)).requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES["ce"](net(start), y).mean(), start)
    threat = ThreatSpec(0.03, 0.02, 1)
    expected = start.detach() + 0.02 * gradient.sign()
    expected = torch.max(torch.min(expected, x + 0.03), x - 0.03).clamp(0, 1)
    kept = start.detach().clone()
    x_adv = pgd(net, x, _cross_entropy(y), threat, start=start.detach())
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)
    assert torch.equal(start.detach(), kept)


def test_given_start_replaces_the_random_one(make_net):
    """With `start` no random number is drawn, and another start gives another result."""
    net, x, y = make_net().eval(), _images(4, 3, 8, 8), _labels(4)
    drawn = _generator(3)
    before = drawn.get_state()
    one = pgd(net, x, _cross_entropy(y), THREAT, start=x.clone(), generator=drawn)
    assert torch.equal(drawn.get_state(), before)
    zero = pgd(net, x, _cross_entropy(y), dataclasses.replace(THREAT, init="zero"))
    assert torch.equal(one, zero)
    assert not torch.equal(one, pgd(net, x, _cross_entropy(y), THREAT, start=x + 0.01))


def test_generator_decides_the_random_start(make_net):
    """Equal generators give equal images, different ones different images; the global state is not used."""
    net, x, inner = make_net().eval(), _images(4, 3, 8, 8), _cross_entropy(_labels(4))
    state = torch.get_rng_state()
    first, again, other = (pgd(net, x, inner, THREAT, generator=_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_uniform_start():
    """U(-eps, eps) in every pixel, then clamped to [0, 1]."""
    threat = ThreatSpec(0.1, 0.01, 1, "uniform")
    inside = torch.full((100, 1, 30, 30), 0.5, dtype=torch.float64)
    noise = _start(inside, threat, _generator(0)) - inside
    assert noise.abs().max() <= 0.1 and noise.abs().max() > 0.0999
    assert abs(noise.mean()) < 1e-3 and noise.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=1e-2)
    edge = _start(torch.zeros(100, 1, 30, 30), threat, _generator(0))
    assert edge.min() == 0 and (edge == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_normal_start():
    """x + 0.001 N(0, 1) and, as in TRADES, neither projected nor clamped."""
    start = _start(torch.zeros(100, 1, 30, 30), ThreatSpec(0.0005, 0.01, 1, "normal"), _generator(0))
    assert start.std().item() == pytest.approx(0.001, rel=1e-2) and abs(start.mean()) < 1e-5
    assert start.min() < -0.002 and start.max() > 0.002


def test_normal01_start():
    """Algorithm 1 taken literally: x + N(0, 1), projected, so that nearly all pixels start on the surface of the ball."""
    x = torch.full((100, 1, 30, 30), 0.5, dtype=torch.float64)
    noise = _start(x, ThreatSpec(0.1, 0.01, 1, "normal01"), _generator(0)) - x
    assert noise.abs().max() <= 0.1 + 1e-12
    surface = (noise.abs() > 0.1 - 1e-12).double().mean().item()
    assert surface == pytest.approx(math.erfc(0.1 / math.sqrt(2)), abs=0.01)


def test_zero_start():
    """The start is a copy of the natural image."""
    x = _images(2, 3, 4, 4)
    threat = dataclasses.replace(THREAT, init="zero")
    for start in (_start(x, threat), apply_noise(x, torch.ones_like(x), threat)):
        assert torch.equal(start, x) and start.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("init", INITS)
def test_start_from_sliced_noise_equals_the_start_of_the_whole(init):
    """Noise of the global batch, sliced by rank as in training, gives the starts of a single process."""
    x, threat = _images(6, 3, 4, 4), dataclasses.replace(THREAT, init=init)
    whole = _start(x, threat, _generator(5))
    noise = start_noise(x.shape, init, x, _generator(5))
    assert noise.dtype == x.dtype
    parts = [apply_noise(x[rows], noise[rows], threat) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("bn", BN_MODES)
def test_model_is_left_as_it_was(make_net, bn, space, fails):
    """Gradients, flags, modes, parameters and BatchNorm buffers are unchanged, also if the attack raises."""
    net = make_net().train()
    net.bn.eval()  # as if the user had frozen its statistics
    net.fc.bias.requires_grad_(False)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    before = copy.deepcopy(net)

    def inner(logits: Tensor) -> Tensor:
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert not net.training and net.bn.training == (bn == "batch")
        if fails:
            raise RuntimeError("interrupted")
        return LOSSES["ce"](logits, _labels(4))

    threat = ThreatSpec(8 / 255, 2 / 255, 2, bn=bn, space=space)
    if fails:
        with pytest.raises(RuntimeError, match="interrupted"):
            pgd(net, _images(4, 3, 8, 8), inner, threat)
    else:
        pgd(net, _images(4, 3, 8, 8), inner, threat)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in before.parameters()]
    assert net.bn.track_running_stats
    for name, value in net.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["conv.weight"]
    assert torch.equal(net.conv.weight.grad, torch.ones_like(net.conv.weight))


@pytest.mark.parametrize("training", [False, True])
def test_batch_mode_uses_the_statistics_of_the_batch(make_net, training):
    """`batch` attacks with batch statistics, `eval` with running ones, whatever mode the model is in."""
    net, x = make_net().train(training), _images(4, 3, 8, 8)
    batch, running = copy.deepcopy(net).train()(x), copy.deepcopy(net).eval()(x)
    assert (batch - running).abs().max() > 0.1
    for bn, expected in (("batch", batch), ("eval", running)):
        seen = []

        def inner(logits: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(logits.detach())
            return LOSSES["ce"](logits, _labels(4))

        pgd(net, x, inner, ThreatSpec(8 / 255, 2 / 255, 1, bn=bn), start=x)
        torch.testing.assert_close(seen[0], expected.detach(), rtol=0, atol=1e-12)


def test_attack_needs_no_surrounding_gradient(make_net):
    """Under no_grad, as in evaluation, the attack still computes its gradients."""
    net, x, inner = make_net().eval(), _images(4, 3, 8, 8), _cross_entropy(_labels(4))
    expected = pgd(net, x, inner, THREAT, start=x)
    with torch.no_grad():
        assert torch.equal(pgd(net, x, inner, THREAT, start=x), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_model_is_an_error(make_net, value):
    """sign(NaN) is 0 and would silently disable the attack."""
    net = make_net().eval()
    with torch.no_grad():
        net.fc.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        pgd(net, _images(4, 3, 8, 8), _cross_entropy(_labels(4)), THREAT)


def test_non_finite_gradient_of_one_step_is_an_error(make_net):
    """A NaN in any step of the attack is an error, not only in the last."""
    net, calls = make_net().eval(), []

    def inner(logits: Tensor) -> Tensor:
        calls.append(None)
        return LOSSES["ce"](logits, _labels(4)) * (math.nan if len(calls) == 2 else 1.0)

    with pytest.raises(FloatingPointError, match="not finite"):
        pgd(net, _images(4, 3, 8, 8), inner, THREAT)


def test_infinite_loss_with_a_finite_gradient_is_an_error(make_net):
    """If logits overflow, the margin's gradient may still be +-1, but the attack is meaningless."""
    with pytest.raises(FloatingPointError, match="not finite"):
        pgd(make_net().eval(), _images(4, 3, 8, 8), lambda logits: logits.amax(1) + math.inf, THREAT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 8}, r"threat\.eps is 8; .*Write 8/255"),
        ({"step": 2.0}, r"threat\.step is 2; .*Write 2/255"),
        ({"eps": -0.1}, r"threat\.eps is -0\.1; .*\[0, 1\)"),
        ({"step": -0.1}, r"threat\.step"),
        ({"eps": math.nan}, r"threat\.eps is nan"),
        ({"num_steps": -1}, r"threat\.num_steps is -1; it must be 0 or more"),
        ({"init": "normal1"}, "Did you mean 'normal"),
        ({"init": "gauss"}, "Known: normal, normal01, per_class, uniform, zero"),
        ({"bn": "train"}, r"threat\.bn is 'train'. Known: batch, eval"),
        ({"space": "pixels"}, "Did you mean 'pixel'"),
    ],
)
def test_threat_of_the_wrong_unit_or_name_is_refused(arguments, message):
    """eps: 8 instead of 8/255, and mistyped names, are refused with the right form."""
    with pytest.raises(UserError, match=message):
        ThreatSpec(**{"eps": 8 / 255, "step": 2 / 255, "num_steps": 10, **arguments})


def test_threat_is_frozen_and_in_pixels_by_default():
    """A checked spec cannot be changed, and the default space is pixels."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        THREAT.eps = 0.5
    assert (THREAT.init, THREAT.bn, THREAT.space) == ("uniform", "eval", "pixel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_violation_of_the_ball_is_seen(dtype):
    """A single pixel beyond eps, below 0, above 1 or NaN is detected."""
    x = torch.full((2, 3, 4, 4), 0.5, dtype=dtype)
    assert inside_ball(x, x, 0.0, around=True)
    for value, eps in ((0.5625, 0.06), (0.4375, 0.06), (-0.0078125, 0.9), (1.0078125, 0.9), (math.nan, 0.9)):
        broken = x.clone()
        broken[1, 2, 3, 0] = value
        assert not inside_ball(broken, x, eps, around=True)
    moved = x.clone()
    moved[0, 0, 0, 0] = 0.5625
    assert inside_ball(moved, x, 0.0625, around=True)
    assert not inside_ball(moved, x, 0.06, around=True) and inside_ball(moved, x, 0.06, around=False)


def test_the_ball_is_checked_for_every_result(make_net, monkeypatch):
    """An attack whose projection is wrong fails its assertion."""
    monkeypatch.setattr("nrat_scale.attacks.project", lambda x_adv, x, eps, norm: x_adv.clamp(0, 1))
    with pytest.raises(AssertionError, match="exceeds eps"):
        pgd(make_net(), _images(4, 3, 8, 8), _cross_entropy(_labels(4)), dataclasses.replace(THREAT, step=0.5))


def test_released_code_space_is_that_of_the_released_code(make_net):
    """As in that code, images are normalised first; eps, step and clamp(0, 1) then act in normalised units."""
    net, x, y = make_net().eval(), _images(4, 3, 8, 8), _labels(4)
    normalised = (x - net.mean) / net.std
    z = normalised + 0.001 * torch.randn(x.shape, generator=_generator(0), dtype=x.dtype)
    threat = dataclasses.replace(THREAT, space="released_code")
    x_adv = pgd(net, x, _cross_entropy(y), threat, start=z)
    for _ in range(threat.num_steps):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net.core(z), y), z)
        z = z.detach() + threat.step * gradient.sign()
        z = torch.min(torch.max(z, normalised - threat.eps), normalised + threat.eps)
        z = torch.clamp(z, 0.0, 1.0)
    torch.testing.assert_close(x_adv, z * net.std + net.mean, rtol=0, atol=1e-12)
    # Its numbers are not comparable: the clamp moves nearly all dark pixels to the mean, far outside eps.
    assert (x_adv - x).abs().max() > 0.3
    pixel = pgd(net, x, _cross_entropy(y), THREAT, start=x)
    assert (pixel - x).abs().max() <= THREAT.eps + 1e-12


@pytest.mark.parametrize("init", INITS)
def test_released_code_random_start_is_in_its_own_units(make_net, init):
    """The random start is drawn around the normalised image too."""
    net, x = make_net().eval(), _images(4, 3, 8, 8)
    threat = dataclasses.replace(THREAT, space="released_code", init=init, num_steps=0)
    _, encode, decode = in_space(net, "released_code")
    start = _start(encode(x), threat, _generator(2))
    x_adv = pgd(net, x, _cross_entropy(_labels(4)), threat, generator=_generator(2))
    torch.testing.assert_close(x_adv, decode(project(start, encode(x), threat.eps)), rtol=0, atol=1e-12)
    torch.testing.assert_close(decode(encode(x)), x, rtol=0, atol=1e-12)


def test_released_code_space_needs_the_constants_of_the_model():
    """A model without mean and std has no normalised units and is refused."""
    threat = dataclasses.replace(THREAT, space="released_code")
    with pytest.raises(UserError, match="`mean` and `std` buffers"):
        pgd(AnyShape(3), _images(4, 3, 8, 8, dtype=torch.float32), _cross_entropy(_labels(4)), threat)


@given(st.floats(0, 3, allow_subnormal=False))
def test_a_printed_radius_parses_to_the_same_number(value):
    """fraction_text and parse_fraction are exact inverses."""
    assert parse_fraction(fraction_text(value)) == value


def test_multiples_of_a_grey_level_are_printed_as_fractions():
    """8/255 is printed as a fraction, other numbers as decimals."""
    assert [fraction_text(value) for value in (8 / 255, 128 / 255, 0.3, 0.0, 1.0, 0.0314)] == [
        "8/255", "128/255", "0.3", "0.0", "1.0", "0.0314",
    ]  # fmt: skip
    assert threat_text("linf", 8 / 255) == "l_inf, eps = 8/255"
    assert threat_text("l2", 0.5) == "l_2, eps = 0.5"


@pytest.mark.parametrize("text", ["", "8/", "/255", "8/0", "8/2/5", "a/b", "inf", "nan", "eight"])
def test_text_that_is_not_a_number_is_refused(text):
    """The error quotes the text and shows both accepted forms."""
    with pytest.raises(ValueError, match=r"is not a number; write 8/255 or 0\.03"):
        parse_fraction(text)
