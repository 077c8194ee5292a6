"""BatchNorm by groups of the global batch, and running statistics that are equal on all ranks."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nrat_scale.core.errors import UserError
from nrat_scale.core.modes import attack_mode
from nrat_scale.train.batchnorm import GroupedBatchNorm, RunningStatistics, check_batchnorm, convert

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = [(nn.BatchNorm1d, (3,)), (nn.BatchNorm1d, (3, 5)), (nn.BatchNorm2d, (3, 4, 4)), (nn.BatchNorm3d, (3, 2, 2, 2))]
LAYERS = pytest.mark.parametrize(("kind", "shape"), KINDS, ids=["1d", "1d-long", "2d", "3d"])


def layer_of(kind: type[_BatchNorm], seed: int = 0, **options: object) -> _BatchNorm:
    """In training mode, double, three channels; parameters and statistics differ from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    layer = kind(3, **options).double().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(3, generator=generator, dtype=torch.float64), alpha=0.5)
        if layer.track_running_stats:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
    return layer


def grouped(layer: _BatchNorm, group_size: int) -> GroupedBatchNorm:
    """A layer by groups that shares no tensor with `layer`."""
    copied = type(layer)(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    copied.double().load_state_dict(layer.state_dict())
    return GroupedBatchNorm.of(copied.train(layer.training), group_size)


def inputs(count: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Samples of different mean and scale, so that every grouping has other statistics."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    offset, scale = torch.rand(2, count, *[1] * len(shape), generator=generator, dtype=torch.float64)
    return x * (0.5 + scale) + 3 * offset


def close(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return torch.allclose(found, wanted, rtol=1e-11, atol=1e-12)


def differentiated(layer: _BatchNorm, x: Tensor) -> list[Tensor]:
    """Output, and gradients for the input and the parameters of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    output = layer(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output)
    wanted = [x, *layer.parameters()]
    return [output.detach(), *torch.autograd.grad((output.square() * weights).sum(), wanted)]


# ---- one layer ------------------------------------------------------------------------------------------------------


@LAYERS
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("affine", [True, False])
def test_one_group_is_batchnorm(kind, shape, momentum, affine):
    """Outputs, gradients and, after three steps, running statistics are those of torch's layer."""
    plain = layer_of(kind, momentum=momentum, affine=affine)
    layer = grouped(plain, 6)
    for seed in range(3):
        x = inputs(6, shape, seed)
        for found, wanted in zip(differentiated(layer, x), differentiated(plain, x), strict=True):
            assert close(found, wanted)
        layer.commit(1)
        assert close(layer.running_mean, plain.running_mean)
        assert close(layer.running_var, plain.running_var)
        assert torch.equal(layer.num_batches_tracked, plain.num_batches_tracked)


@LAYERS
@pytest.mark.parametrize("num_groups", [2, 3])
def test_groups_are_separate_batches(kind, shape, num_groups):
    """Outputs and gradients are those of torch's layer run on each group of consecutive samples."""
    plain = layer_of(kind)
    layer, x = grouped(plain, 4), inputs(4 * num_groups, shape)
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)

    def run(forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
        images = x.clone().requires_grad_()
        output = forward(images)
        return [output.detach(), *torch.autograd.grad((output.square() * weights).sum(), [images, *parameters])]

    found = run(layer, list(layer.parameters()))
    wanted = run(lambda images: torch.cat([plain(group) for group in images.split(4)]), list(plain.parameters()))
    assert all(close(one, two) for one, two in zip(found, wanted, strict=True))
    assert not close(found[0], grouped(plain, len(x))(x).detach())


def test_statistics_do_not_change_before_the_end_of_the_step():
    """A second forward of a step is normalised and recorded like the first; only `commit` updates the buffers."""
    layer = grouped(layer_of(nn.BatchNorm2d), 2)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    for _ in range(2):
        layer(inputs(4, (3, 4, 4)))
        assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    layer.commit(1)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 2
    after = {name: value.clone() for name, value in layer.named_buffers()}
    layer.commit(1)  # a step without a forward
    assert all(torch.equal(value, after[name]) for name, value in layer.named_buffers())


@settings(max_examples=60, deadline=None)
@given(
    group_size=st.integers(2, 4),
    per_piece=st.integers(1, 3),
    pieces=st.integers(1, 4),
    calls=st.integers(1, 3),
    momentum=st.one_of(st.none(), st.floats(0, 1)),
)
def test_running_statistics_do_not_depend_on_accumulation(group_size, per_piece, pieces, calls, momentum):
    """Over two steps of several forwards each (natural, adversarial): the running statistics move once per forward, by
    the average over all groups of the global batch, whether they came at once or in micro-batches."""
    plain = layer_of(nn.BatchNorm1d, momentum=momentum)
    at_once, in_pieces = grouped(plain, group_size), grouped(plain, group_size)
    mean, variance, moves = plain.running_mean.clone(), plain.running_var.clone(), 0
    count = group_size * per_piece * pieces
    for step in range(2):
        batches = [inputs(count, (3,), 10 * step + call) for call in range(calls)]
        for batch in batches:
            at_once(batch)
            moves += 1
            rate = 1 / moves if momentum is None else momentum
            by_group = batch.view(-1, group_size, 3)
            mean = (1 - rate) * mean + rate * by_group.mean(1).mean(0)
            variance = (1 - rate) * variance + rate * by_group.var(1).mean(0)
        for piece in zip(*(batch.chunk(pieces) for batch in batches), strict=True):
            for part in piece:
                in_pieces(part)
        at_once.commit(1)
        in_pieces.commit(pieces)
        for layer in (at_once, in_pieces):
            assert close(layer.running_mean, mean)
            assert close(layer.running_var, variance)
            assert layer.num_batches_tracked == moves


def test_forwards_of_micro_batches_must_match():
    """Three forwards cannot come from two micro-batches with the same forwards each."""
    layer = grouped(layer_of(nn.BatchNorm2d), 2)
    for _ in range(3):
        layer(inputs(4, (3, 4, 4)))
    with pytest.raises(AssertionError, match="same forwards"):
        layer.commit(2)


def test_training_takes_whole_groups_only():
    """`check_batchnorm` refuses other recipes, so a remainder is a bug."""
    with pytest.raises(AssertionError, match="whole groups"):
        grouped(layer_of(nn.BatchNorm2d), 4)(inputs(6, (3, 4, 4)))


@LAYERS
def test_evaluation_is_plain(kind, shape):
    """In evaluation mode the layer uses running statistics, for any number of samples, and records nothing."""
    plain = layer_of(kind).eval()
    layer, x = grouped(plain, 4), inputs(5, shape)
    assert torch.equal(layer(x), plain(x))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer.commit(1)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_attacks_do_not_change_statistics(bn):
    """A forward of an attack between those of the step is not recorded."""
    layer, x = grouped(layer_of(nn.BatchNorm2d), 2), inputs(4, (3, 4, 4))
    undisturbed = grouped(layer_of(nn.BatchNorm2d), 2)
    undisturbed(x)
    with attack_mode(layer, bn):
        layer(inputs(4, (3, 4, 4), 5))
    layer(x)
    with attack_mode(layer, bn):
        layer(inputs(4, (3, 4, 4), 6))
    layer.commit(1)
    undisturbed.commit(1)
    for name, value in layer.named_buffers():
        assert torch.equal(value, undisturbed.get_buffer(name)), name


def test_without_running_statistics():
    """A layer without them has nothing to commit."""
    plain = layer_of(nn.BatchNorm2d, track_running_stats=False)
    layer, x = grouped(plain, 4), inputs(4, (3, 4, 4))
    assert close(layer(x), plain(x))
    layer.commit(1)
    assert list(layer.named_buffers()) == []


# ---- conversion -----------------------------------------------------------------------------------------------------


def test_converted_model_has_the_same_state(make_net):
    """Names, parameters and buffers are those of the plain model, so checkpoints, optimizers and releases fit both."""
    net = make_net()
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    names = list(net.state_dict())
    converted = convert(net, "groups", 2)
    assert isinstance(converted.bn, GroupedBatchNorm) and converted.bn.group_size == 2
    assert list(converted.state_dict()) == names
    assert all(p is parameters[name] for name, p in converted.named_parameters())
    assert all(b is buffers[name] for name, b in converted.named_buffers())
    plain = make_net(1)
    plain.load_state_dict(converted.state_dict())
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.eval()(x), converted.eval()(x))


def test_converted_layers_keep_their_settings():
    """eps, momentum, affine, mode; layers at any depth."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3, 1e-3, None, False)), nn.BatchNorm1d(3, momentum=0.01)).eval()
    deep, flat = convert(model, "groups", 4)[0][0], model[1]
    assert (deep.eps, deep.momentum, deep.affine, deep.weight) == (1e-3, None, False, None)
    assert (flat.eps, flat.momentum, flat.affine) == (1e-5, 0.01, True)
    assert all(type(layer) is GroupedBatchNorm and not layer.training for layer in (deep, flat))


@pytest.mark.parametrize("layer", [BatchNormAct2d(3), nn.SyncBatchNorm(3)], ids=lambda layer: type(layer).__name__)
def test_layers_that_do_more_are_refused_by_name(layer):
    """timm's BatchNormAct2d contains an activation, which a replacement by BatchNorm would drop."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), layer))
    with pytest.raises(UserError, match=rf"0\.1 is a {type(layer).__name__}\. Use local, or sync"):
        convert(model, "groups", 2)
    assert model[0][1] is layer


def test_the_other_kinds(make_net):
    """`local` changes nothing, `sync` is torch's own conversion."""
    net = make_net()
    layer = net.bn
    assert convert(net, "local", None) is net and net.bn is layer
    assert isinstance(convert(net, "sync", None).bn, nn.SyncBatchNorm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sync", None, 8, CPU), r"model\.bn is 'sync', which needs GPUs\. Use groups"),
        (("groups", 3, 8, CPU), r"bn_group_size is 3; it must divide the 8 images"),
        (("groups", 16, 8, CPU), r"bn_group_size is 16; .*divide the 8 images"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    """The message names the key and the way out."""
    with pytest.raises(UserError, match=message):
        check_batchnorm(*arguments)


def test_valid_settings_pass():
    """Every kind, and group sizes that divide the images of a process."""
    for arguments in (("local", None, 7, CPU), ("sync", None, 7, GPU), ("groups", 4, 8, CPU), ("groups", 8, 8, GPU)):
        check_batchnorm(*arguments)


# ---- several ranks --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """BatchNorm in two precisions, by groups or not, and a layer that is none."""

    def __init__(self, group_size: int | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer_of(nn.BatchNorm1d, 1), layer_of(nn.BatchNorm1d, 2, momentum=None).float()])
        self.fc = nn.Linear(3, 3)
        self.register_buffer("constant", torch.ones(2))
        if group_size is not None:
            convert(self, "groups", group_size)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


@pytest.mark.parametrize("group_size", [None, 2], ids=["local", "groups"])
def test_only_statistics_are_averaged(group_size):
    """`mean` gets running means and variances, one tensor per type, and no counter; the buffers change in place."""
    model, alone = Mixed(group_size), Mixed(group_size)
    seen: list[Tensor] = []

    def mean(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return (tensor + 7) / 2

    memory = [buffer.data_ptr() for buffer in model.buffers()]
    for one, statistics in ((model, RunningStatistics(model, mean)), (alone, RunningStatistics(alone))):
        for call in range(2):
            one(inputs(4, (3,), call))
        statistics.end_step(1)
    assert memory == [buffer.data_ptr() for buffer in model.buffers()]
    assert {(tensor.dtype, tensor.numel()) for tensor in seen} == {(torch.float64, 6), (torch.float32, 6)}
    for (name, buffer), (_, wanted) in zip(model.named_buffers(), alone.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, (wanted + 7) / 2 if "running" in name else wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("pieces", [1, 2])
def test_two_processes_have_the_statistics_of_one(pieces):
    """Groups of the global batch: the average over two ranks equals the statistics of one rank with the whole batch."""
    batches = [inputs(16, (3,), seed) for seed in range(2)]

    def run(parts: list[Tensor], mean: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
        model = nn.Sequential(GroupedBatchNorm.of(layer_of(nn.BatchNorm1d), 4))
        statistics = RunningStatistics(model, mean)
        for piece in zip(*(part.chunk(pieces) for part in parts), strict=True):
            for x in piece:
                model(x)
        statistics.end_step(pieces)
        return model

    sent: list[Tensor] = []
    run([batch[8:] for batch in batches], lambda tensor: sent.append(tensor.clone()) or tensor)
    rank = run([batch[:8] for batch in batches], lambda tensor: (tensor + sent.pop(0)) / 2)
    whole = run(batches)
    for (name, found), (_, wanted) in zip(rank.named_buffers(), whole.named_buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14, msg=name)


def test_a_layer_with_two_names_is_converted_under_both():
    """Otherwise the forward could use the plain one, and training would depend on the number of processes."""
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"norm": norm, "body": nn.Sequential(norm)})
    convert(model, "groups", 2)
    assert isinstance(model["norm"], GroupedBatchNorm)
    assert model["body"][0] is model["norm"]


def test_without_parameters_and_running_statistics():
    """Without parameters and statistics, dtype and device come from the input."""
    layer = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    model = convert(nn.Sequential(layer), "groups", 2).train()
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), torch.cat([layer(x[:2]), layer(x[2:])]))
