"""The project's numbers against those of the reference implementations, in float64 to 1e-9 (docs/objectives.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.losses import DIVERGENCES, LOSSES
from nrat_scale.models import WideResNet
from nrat_scale.objectives import build
from nrat_scale.optim import OptimSpec, schedule_table
from nrat_scale.weights import EmaSpec, awp, build_ema

DATA = Path(__file__).parents[1] / "golden"
CIFAR10_THREAT = ThreatSpec(8 / 255, 2 / 255, 10)
ATTACKS = {"trades_kl": "trades", "nrat_kl": "nrat", "mart_ce": "mart"}  # golden name -> preset


def _load(name: str) -> dict[str, Tensor]:
    with np.load(DATA / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Inputs and outputs of the reference implementations."""
    return _load("objectives_float64.npz")


def _state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def _assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.detach(), expected.reshape(actual.shape), rtol=0, atol=1e-9)


# ---- losses and objectives ------------------------------------------------------------------------------------------

ON_NATURAL = {"nce": ("nce", 0.0), "rce": ("rce", 0.0), "nce_rce": ("nce_rce", 0.0), "smooth_ce_0.1": ("ce", 0.1)}
# Golden name -> preset: the constants (lam 6 or 5) are the presets' own.
PRESETS = {
    "nrat_6": "nrat",
    "trades_6": "trades",
    "trades_apl_6": "trades_apl",
    "mart_5": "mart",
    "mart_apl_5": "mart_apl",
}


def _scalar(name: str, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    if name in ON_NATURAL:
        loss, smoothing = ON_NATURAL[name]
        return LOSSES[loss](logits, y, smoothing).mean()
    if name == "sym_kl":
        return DIVERGENCES["sym_kl"](logits, logits_adv).mean()
    return build(PRESETS[name]).loss(logits, logits_adv, y)


@pytest.mark.parametrize("case", ["mild", "sharp"])
@pytest.mark.parametrize("name", [*ON_NATURAL, "sym_kl", *PRESETS])
def test_losses_and_their_gradients(golden, case, name):
    """Value and both gradients of every published loss, on mild and on nearly one-hot logits."""
    logits = golden[f"{case}/logits_nat"].clone().requires_grad_()
    logits_adv = golden[f"{case}/logits_adv"].clone().requires_grad_()
    loss = _scalar(name, logits, logits_adv, golden[f"{case}/y"])
    loss.backward()
    _assert_equal(loss, golden[f"{case}/{name}/loss"])
    for leaf, kind in ((logits, "grad_nat"), (logits_adv, "grad_adv")):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        _assert_equal(gradient, golden[f"{case}/{name}/{kind}"])


def test_every_golden_loss_is_compared(golden):
    """The tests above cover every loss of the reference file."""
    recorded = {key.split("/")[1] for key in golden if key.startswith("mild/") and key.endswith("/loss")}
    assert recorded == {*ON_NATURAL, "sym_kl", *PRESETS}


# ---- attack and weight perturbation ---------------------------------------------------------------------------------


class Tiny(nn.Module):
    """The small network of the reference file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        return self.fc(silu(self.conv2(silu(self.conv1(x)))).flatten(1))


@pytest.fixture
def tiny(golden) -> Tiny:
    """The reference file's network with its weights."""
    model = Tiny().double()
    model.load_state_dict(_state(golden, "tiny/state/"))
    return model


def test_tiny_network_is_the_reference_network(golden, tiny):
    """The attack and AWP comparisons below start from the same model."""
    _assert_equal(tiny(golden["tiny/x"]), golden["tiny/logits"])


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_and_loss_on_its_result(golden, tiny, name):
    """Ten steps of PGD end at the reference's images, and the outer loss there is the reference's."""
    x, y, objective = golden["tiny/x"], golden["tiny/y"], build(ATTACKS[name])
    inner = objective.inner(tiny(x), y)
    x_adv = pgd(tiny, x, inner, CIFAR10_THREAT, start=x + 0.001 * golden["tiny/noise"])
    _assert_equal(x_adv, golden[f"attack/{name}/x_adv"])
    _assert_equal(objective.loss(tiny(x), tiny(x_adv), y), golden[f"attack/{name}/loss"])


def test_weight_perturbation(golden, tiny):
    """AWP moves the weights by gamma along the reference's ascent direction, and moves no bias."""
    x, y, x_adv = golden["tiny/x"], golden["tiny/y"], golden["attack/trades_kl/x_adv"]
    objective, gamma = build("trades"), 0.005
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    perturbed, diff = _state(golden, "awp/perturbed/"), _state(golden, "awp/diff/")
    assert set(perturbed) == set(before) and set(diff) == {"conv1.weight", "conv2.weight", "fc.weight"}
    with awp(tiny, lambda: objective.loss(tiny(x), tiny(x_adv), y), gamma):
        for name, value in tiny.state_dict().items():
            _assert_equal(value, perturbed[name])
            if name in diff:
                _assert_equal((value - before[name]) / gamma, diff[name])


# ---- WideResNet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "activation"), [("swish", "silu"), ("relu", "relu")])
def test_wide_resnet(prefix, activation):
    """Logits in both modes, and the running mean after one training forward, equal those of RobustBench's model."""
    golden = {key.removeprefix(f"{prefix}/"): value for key, value in _load("wide_resnet_float64.npz").items()}
    model = WideResNet(10, 1, activation).double()
    model.load_state_dict(_state(golden, "state/"))
    x = golden["x"]
    _assert_equal(model.eval()(x), golden["logits_eval"])
    _assert_equal(model.train()(x), golden["logits_train"])
    _assert_equal(model.batchnorm.running_mean, golden["bn_mean_after"])


def test_wide_resnet_28_10_state_names():
    """RobustBench's WRN-28-10 checkpoints load here, and ours there: 155 names, order and shapes."""
    expected = json.loads((DATA / "wrn28_10_state_names.json").read_text())
    with torch.device("meta"):
        state = WideResNet(28, 10).state_dict()
    assert list(state) == list(expected) and len(expected) == 155
    assert {name: list(value.shape) for name, value in state.items()} == expected


# ---- the generated-data recipe --------------------------------------------------------------------------------------

FACTS = json.loads((DATA / "dm_recipe_facts.json").read_text())


@pytest.mark.parametrize(("step", "decay"), FACTS["ema_decay"])
def test_ema_decay_by_step(step, decay):
    """No averaging in the first 2.5 % of 400 x 98 steps, then min(0.995, (1 + t) / (10 + t))."""
    ema = build_ema(nn.Linear(1, 1), EmaSpec(decay=0.995), total_steps=400 * 98)
    assert ema.get_decay(step) == pytest.approx(decay, rel=0, abs=1e-9)


def test_learning_rate_and_momentum_by_epoch():
    """The one-cycle schedule stepped once per epoch, momentum cycling against it."""
    spec = OptimSpec(lr=0.2, nesterov=True, decay_norms=False, schedule="onecycle")
    table = schedule_table(spec, 400)
    assert len(table) == 400
    for epoch, expected in FACTS["lr_momentum_by_epoch"].items():
        assert table[int(epoch)] == pytest.approx(expected, rel=0, abs=1e-9), epoch
