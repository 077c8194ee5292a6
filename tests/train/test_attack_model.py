"""The attack model: the model's results up to rounding and its memory; the model itself does not change."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from nrat_scale.core.modes import attack_mode, batchnorms
from nrat_scale.models import ResNet18, WideResNet
from nrat_scale.train.attack_model import AttackModel
from nrat_scale.train.batchnorm import convert
from tests.support.foldable_networks import Aliased, Chain, Unfoldable


def settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`model` in training mode with statistics and affine parameters far from their initial values."""
    model = model.to(dtype).train()
    shaken(model, 0)
    return model


def shaken(model: nn.Module, seed: int) -> None:
    """Change weights and statistics of `model` in place, as a training step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.05)
        for layer in batchnorms(model):
            if layer.running_mean is not None and layer.running_var is not None:
                shift, scale = torch.rand(2, layer.num_features, generator=generator, dtype=torch.float64)
                layer.running_mean.add_(shift - 0.5)
                layer.running_var.mul_(0.5 + scale)


def images(dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(9), dtype=dtype)


def results(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a loss for the images."""
    x = x.clone().requires_grad_()
    logits = forward(x)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(len(x))), x)
    return logits.detach(), gradient


def assert_equal_in_eval_mode(model: nn.Module, attack: AttackModel, x: Tensor) -> None:
    """To 1e-12 of the largest value: the same as an attack on the model itself."""
    with attack_mode(model, "eval"):
        expected = results(model, x)
    for found, wanted in zip(results(attack.forward, x), expected, strict=True):
        assert wanted.abs().max() > 0
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# In a WideResNet the second BatchNorm of every block is the only user of a convolution's result. The first one of all is, too,
# if the first block has a convolution as its shortcut.
FOLDED = [
    (ResNet18, 20),
    (lambda: WideResNet(10, 1, "silu"), 3),
    (lambda: WideResNet(10, 1, "relu"), 3),
    (lambda: WideResNet(10, 2, "silu"), 4),
    (lambda: WideResNet(10, 2, "relu"), 4),
    (lambda: WideResNet(16, 1, "silu"), 6),
    (Chain, 3),
]
NAMES = ["resnet18", "wrn10-1-silu", "wrn10-1-relu", "wrn10-2-silu", "wrn10-2-relu", "wrn16-1-silu", "chain"]
EVERY_MODEL = pytest.mark.parametrize(("make", "num_folded"), FOLDED, ids=NAMES)

# ---- evaluation mode ------------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_the_folded_model_equals_the_model(make, num_folded):
    """Logits and image gradients are the model's in evaluation mode, although it is in training mode; all BatchNorm layers
    that can be folded are; the model keeps its mode and every bit."""
    model = settled(make())
    before = state(model)
    attack = AttackModel(model, "eval")
    assert attack.num_folded == num_folded
    assert len(batchnorms(attack.module)) == len(batchnorms(model)) - num_folded
    assert_equal_in_eval_mode(model, attack, images())
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in attack.module.modules() if not isinstance(module, nn.Identity))
    assert_same_state(model, before)


@pytest.mark.medium
@EVERY_MODEL
def test_refresh_follows_the_model(make, num_folded):
    """After steps that change weights and statistics in place, and after parameters get new memory, as in
    DistributedDataParallel."""
    model = settled(make())
    attack = AttackModel(model, "eval")
    assert attack.num_folded == num_folded
    for seed in (1, 2):
        shaken(model, seed)
        attack.refresh()
        assert_equal_in_eval_mode(model, attack, images())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    attack.refresh()
    for seed in (3, 4):
        shaken(model, seed)
        attack.refresh()
        assert_equal_in_eval_mode(model, attack, images())


def test_refresh_follows_buffers_that_are_replaced(make_net):
    """Buffers of folded layers, of other layers, and of the model itself."""
    for fold in (True, False):
        model = make_net()
        attack = AttackModel(model, "eval", fold=fold)
        model.bn.running_mean = model.bn.running_mean + 1
        model.bn.running_var = model.bn.running_var * 2
        model.mean = model.mean / 2
        attack.refresh()
        assert_equal_in_eval_mode(model, attack, images())


def test_weights_that_are_not_folded_follow_at_once():
    """Unfolded weights share memory with the model, so they need no refresh."""
    model = settled(Chain())
    attack = AttackModel(model, "eval", fold=False)
    shaken(model, 1)
    assert_equal_in_eval_mode(model, attack, images())


@pytest.mark.parametrize(
    "case",
    [
        "order",
        "activation between",
        "convolution twice",
        "norm twice",
        "result used elsewhere",
        "result used by two norms",
        "other layers",
        "other class",
        "parametrised convolution",
        "parametrised norm",
        "untracked",
        "untraceable",
    ],
)
def test_unsafe_pairs_are_not_folded(case):
    """A convolution with other users, other classes of layers, a model that torch.fx cannot trace: the results are equal."""
    model = settled(Unfoldable(case))
    attack = AttackModel(model, "eval")
    assert attack.num_folded == 0
    assert (attack.untraced is not None) == (case == "untraceable"), "a run prints the reason"
    assert_equal_in_eval_mode(model, attack, images())
    shaken(model, 1)
    attack.refresh()
    assert_equal_in_eval_mode(model, attack, images())


@pytest.mark.parametrize("tied", [False, True], ids=["two names", "tied weight"])
def test_layers_that_are_used_elsewhere_are_not_folded(tied):
    """The other use would read the wrong weights, or apply BatchNorm twice."""
    model = settled(Aliased(tied))
    attack = AttackModel(model, "eval")
    assert attack.num_folded == 0
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_equal_in_eval_mode(model, attack, x)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("before", [False, True])
def test_hooked_layers_are_not_folded(place, before):
    """If its layer were folded, a hook would not be called, or see another value."""
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)))
    if before:
        model[place].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        model[place].register_forward_hook(lambda module, inputs, output: output * 2)
    attack = AttackModel(model, "eval")
    assert attack.num_folded == 0
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_equal_in_eval_mode(model, attack, x)


def test_grouped_batchnorm_is_folded_too():
    """In evaluation mode it is plain BatchNorm."""
    model = settled(convert(ResNet18(), "groups", 2), torch.float64)
    attack = AttackModel(model, "eval")
    assert attack.num_folded == 20
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_equal_in_eval_mode(model, attack, x)


def test_the_same_network_without_an_obstacle_is_folded():
    """The network of the unsafe cases is folded if nothing is in the way."""
    model = settled(Unfoldable("none"))
    attack = AttackModel(model, "eval")
    assert attack.num_folded == 1
    assert_equal_in_eval_mode(model, attack, images())


def test_folding_can_be_switched_off():
    """`train.fold_batchnorm: false`: bit for bit the model in evaluation mode."""
    model = settled(WideResNet(10, 1), torch.float32)
    attack = AttackModel(model, "eval", fold=False)
    assert attack.num_folded == 0
    with attack_mode(model, "eval"):
        expected = results(model, images(torch.float32))
    assert all(map(torch.equal, results(attack.forward, images(torch.float32)), expected))


def test_float32_differs_by_rounding_only():
    """Folding changes the rounding, in float32 in the sixth digit."""
    model = settled(ResNet18(), torch.float32)
    attack = AttackModel(model, "eval")
    with attack_mode(model, "eval"):
        expected = results(model, images(torch.float32))[0]
    torch.testing.assert_close(attack.forward(images(torch.float32)), expected, rtol=1e-4, atol=1e-4)


# ---- batch statistics -----------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_batch_mode_equals_an_attack_on_the_model_bit_for_bit(make, num_folded):
    """Batch statistics, nothing folded, and no forward changes a buffer of the model."""
    model = settled(make(), torch.float32).eval()
    attack = AttackModel(model, "batch")
    assert attack.num_folded == 0
    for seed in (1, 2):
        shaken(model, seed)
        before = state(model)
        attack.refresh()
        found = results(attack.forward, images(torch.float32))
        assert_same_state(model, before)
        with attack_mode(model, "batch"):
            expected = results(model, images(torch.float32))
        assert all(map(torch.equal, found, expected))
    assert not any(module.training for module in model.modules())
    assert all(layer.track_running_stats for layer in batchnorms(model))


def test_unknown_mode_is_a_bug():
    """Recipes are checked earlier, so another mode is a programming error."""
    with pytest.raises(AssertionError, match="train"):
        AttackModel(nn.Linear(1, 1), "train")


# ---- memory and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_unfolded_parameters_share_memory(bn):
    """Only folded convolutions have weights of their own; all others share the model's memory, also after it was
    re-allocated."""
    model = settled(ResNet18())
    attack = AttackModel(model, bn)
    for move in (False, True):
        if move:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            attack.refresh()
        theirs = dict(model.named_parameters())
        own = {name for name, p in attack.module.named_parameters() if name not in theirs}
        own |= {n for n, p in attack.module.named_parameters() if n in theirs and p.data_ptr() != theirs[n].data_ptr()}
        convolutions = [name for name, layer in attack.module.named_modules() if isinstance(layer, nn.Conv2d)]
        folded = {f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")}
        assert own == (folded if bn == "eval" else set())
    buffers = dict(model.named_buffers())
    assert all(buffer is buffers[name] for name, buffer in attack.module.named_buffers())


def test_layers_that_share_a_weight_share_it_in_the_attack_model():
    """A weight that two layers share is not copied."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    attack = AttackModel(model, "eval").module
    assert isinstance(attack, nn.Sequential) and attack[1].weight is attack[0].weight
    assert attack[0].weight.data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_only_the_model_needs_gradients(bn):
    """The attack model's parameters have no `requires_grad`; the model's keep theirs and get no gradient."""
    model = settled(Chain())
    model.fc.bias.requires_grad_(False)
    wanted = {name: name != "fc.bias" for name, _ in model.named_parameters()}
    attack = AttackModel(model, bn)
    for move in (False, True):
        if move:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        shaken(model, 1)
        attack.refresh()
        attack.forward(images().requires_grad_()).sum().backward()
        assert not any(parameter.requires_grad for parameter in attack.module.parameters())
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
        assert all(parameter.grad is None for m in (model, attack.module) for parameter in m.parameters())


@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("make", [Chain, lambda: WideResNet(10, 1)], ids=["chain", "wrn"])
def test_an_attack_in_the_middle_of_a_graph(bn, make):
    """The model's forward, then an attack, then backward: gradients and buffers equal those without the attack, bit for
    bit (DM_AT's order, and that of accumulated micro-batches)."""

    def gradients(model: nn.Module, attack: AttackModel | None) -> list[Tensor]:
        logits = model(images())
        if attack is not None:
            attack.refresh()
            x = images()
            for _ in range(2):
                x = (x + 0.01 * results(attack.forward, x)[1].sign()).clamp(0, 1)
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = settled(make())
    undisturbed = copy.deepcopy(model)
    expected = gradients(undisturbed, None)
    found = gradients(model, AttackModel(model, bn))
    assert len(found) == len(expected) == len(list(model.parameters()))
    assert all(map(torch.equal, found, expected))
    assert_same_state(model, state(undisturbed))


@pytest.mark.medium
def test_channels_last_weights_stay_channels_last():
    """Folded weights keep the memory format, too, after every refresh."""
    model = settled(ResNet18()).to(memory_format=torch.channels_last)
    attack = AttackModel(model, "eval")
    x = images(torch.float64, 16).contiguous(memory_format=torch.channels_last)
    for move in (False, True):
        if move:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        shaken(model, 1)
        attack.refresh()
        for name, parameter in attack.module.named_parameters():
            assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last), name
            if not name.endswith("bias"):
                assert parameter.stride() == model.get_parameter(name).stride(), name
    with attack_mode(model, "eval"):
        expected = model(x)
    torch.testing.assert_close(attack.forward(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.medium
@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("name", ["wrn", "resnet18_cifar", "vit"])
def test_weights_in_the_compute_type_change_no_bit(name, bn):
    """Under autocast, logits and gradients of the images equal those of weights that every forward casts anew."""
    torch.manual_seed(0)
    model = {
        "wrn": lambda: timm.create_model("wrn28_10_silu", depth=10, width=1),
        "resnet18_cifar": lambda: timm.create_model("resnet18_cifar"),
        "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    }[name]()
    attack = AttackModel(model, bn, compute=torch.bfloat16)
    assert attack.low is not attack.module
    types = {weight.dtype for weight in attack.low.parameters() if weight.ndim == 4}
    assert types == {torch.bfloat16}
    for _ in range(2):
        shaken(model, 1)
        attack.refresh()
        x = torch.rand(8, 3, 32, 32, requires_grad=True)
        found = []
        for forward in (attack.forward, attack.low_forward):
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(x)
            found.append((logits, *torch.autograd.grad(logits.float().square().sum(), x)))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


def test_a_weight_with_two_holders_is_not_cast():
    """Tied layers keep one weight."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.free = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.free(self.two(self.one(x)))

    attack = AttackModel(Tied(), "eval", compute=torch.bfloat16)
    assert attack.low.one.weight is attack.low.two.weight is attack.module.one.weight
    assert attack.low.free.weight.dtype == torch.bfloat16
