"""Evaluation attacks by name, and what they do to the images of a block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.core.errors import UserError
from nrat_scale.core.seeds import torch_generator
from nrat_scale.evaluate.attacks import ATTACKS, Attack, AttackKind, Block, attack_title, margin, parse_attack
from nrat_scale.evaluate.measures import Images, block_outcome, correct_under
from nrat_scale.evaluate.results import read_arrays
from nrat_scale.models import ModelSpec, create, model_arguments
from tests.support.digits import digits, trained_cnn


def test_attacks_by_name() -> None:
    """Every documented form is parsed; mistyped names are refused."""
    assert parse_attack("pgd50x10").steps == 50 and parse_attack("pgd50x10").restarts == 10
    assert parse_attack("cw20").kind == "cw"
    assert parse_attack("aa").components == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert parse_attack("aa-apgd").components == ("apgd-ce", "apgd-t")
    assert parse_attack("aa:square+fab").components == ("square", "fab")
    for wrong in ("pgd", "pgd0", "pgd20x0", "cw-20", "AA", "aa:", "aa:squares", "natural1", "pgd20x", ""):
        with pytest.raises(UserError, match=r"Unknown attack|AutoAttack has no component 'squares'|Known"):
            parse_attack(wrong)
    for wrong, meant in {
        "PGD-20": "pgd20",
        "CW-40": "cw40",
        "AutoAttack": "aa",
        "AA": "aa",
        "pgd": "pgd20",
        "clean": "natural",
    }.items():
        with pytest.raises(UserError, match=f"Did you mean {meant}\\?"):
            parse_attack(wrong)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("natural", "natural"),
        ("fgsm", "FGSM"),
        ("pgd20", "PGD-20"),
        ("cw20x5", "CW-20, 5 starts"),
        ("pgd3x1", "PGD-3"),
        ("aa", "AutoAttack"),
        ("aa-apgd", "APGD"),
        ("aa:square", "aa:square"),
        ("transfer-pgd20", "PGD-20, transferred"),
        ("worst", "worst case"),
        ("someone else's", "someone else's"),
    ],
)
def test_titles(name: str, title: str) -> None:
    """Each attack has one title; a name of another version is shown as it is."""
    assert attack_title(name) == title


@pytest.mark.medium
def test_an_attack_is_added_by_one_entry(
    run: Path, images: Images, measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An entry of `ATTACKS` is enough for the command line, its help, results, outcomes per image and titles."""

    def gaussian(attack: Attack, block: Block) -> Tensor:
        noise = torch.randn(block.x.shape, generator=torch_generator("cpu", block.seed, "gaussian", block.restart))
        return (block.x + block.threat.eps * noise.sign()).clamp(0, 1)

    entry = AttackKind(
        "gaussianN (N draws)",
        "gaussian([1-9][0-9]*)",
        lambda match: {"title": f"Gaussian noise, {match[1]} draws", "restarts": int(match[1])},
        gaussian,
    )
    monkeypatch.setitem(ATTACKS, "gaussian", entry)
    record = measured("--attacks", "natural,gaussian5", "--checkpoint", "best")["checkpoints"]["best"]
    found, natural = (record["attacks"][name] for name in ("gaussian5", "natural"))
    assert found["restarts"] == 5 and found["n"] == len(images) and 0 < found["correct"] < natural["correct"]
    assert record["worst"]["correct"] == found["correct"]
    assert read_arrays(run / "results.json")["best/gaussian5"][1].sum() == found["correct"]
    assert attack_title("gaussian5") == "Gaussian noise, 5 draws"
    with pytest.raises(SystemExit):
        measured("--help")
    assert "gaussianN (N draws)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("attack", ["fgsm", "pgd5", "cw5"])
def test_outcomes_do_not_depend_on_batches_or_order(
    model: nn.Module, images: Images, threat: ThreatSpec, attack: str
) -> None:
    """Random starts belong to the image: with other blocks, or in another order, each image has the same outcome."""
    whole = correct_under(attack, model, images, threat)
    assert np.array_equal(correct_under(attack, model, images, threat, batch_size=7), whole)
    order = np.random.default_rng(0).permutation(len(images))
    assert np.array_equal(correct_under(attack, model, images.take(order), threat), whole[order])


def test_stronger_attacks_break_more(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """No attack repairs an image, iterated attacks break at least as many as FGSM here, and eps = 0 breaks none."""
    natural, fgsm, pgd20 = (correct_under(name, model, images, threat) for name in ("natural", "fgsm", "pgd20"))
    assert not (pgd20 & ~natural).any()
    assert natural.sum() > fgsm.sum() >= pgd20.sum() > 0
    assert np.array_equal(correct_under("pgd20", model, images, ThreatSpec(0.0, 0.0, 1)), natural)


def test_restarts_are_the_worst_of_their_starts(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """pgdNx1 is pgdN, more restarts break a superset, and a later start is a different one."""
    one, same, five = (correct_under(name, model, images, threat) for name in ("pgd3", "pgd3x1", "pgd3x5"))
    assert np.array_equal(one, same)
    assert not (five & ~one).any()
    assert five.sum() < one.sum(), "five starts break more than one on these images"


def test_broken_images_are_not_attacked(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """Images that an earlier attack broke count as wrong, and the outcome of the others does not change."""
    alone = correct_under("cw5", model, images, threat)
    broken = np.arange(len(images)) % 3 == 0
    outcome = block_outcome(parse_attack("cw5"), model, images, threat, broken=broken)
    assert not outcome[broken].any()
    assert np.array_equal(outcome[~broken], alone[~broken])


def test_a_transfer_attack_perturbs_on_another_model(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """The images are made on the source and classified by the model; with the model as source it is the ordinary attack."""
    pixels, labels = digits()
    other, attack = trained_cnn(pixels[:600], labels[:600], 0.02, steps=60), parse_attack("pgd10")
    own = block_outcome(attack, model, images, threat)
    assert np.array_equal(block_outcome(attack, model, images, threat, source=model), own)
    moved = block_outcome(attack, model, images, threat, source=other)
    assert own.sum() < moved.sum() <= correct_under("natural", model, images, threat).sum()


def test_released_code_space_is_another_threat(model: nn.Module, images: Images) -> None:
    """`released_code` runs, and gives other outcomes than the pixel threat."""
    pixel, released = (ThreatSpec(0.06, 0.02, 1, space=space) for space in ("pixel", "released_code"))
    assert not np.array_equal(
        correct_under("pgd20", model, images, released), correct_under("pgd20", model, images, pixel)
    )


def test_nan_logits_are_refused(images: Images, threat: ThreatSpec) -> None:
    """The argmax of NaN is 0 and must not count as a prediction of class 0."""
    broken = create("cnn4", model_arguments(ModelSpec(kwargs={"width": 4}), 10, 1, (0.3,), (0.3,))).eval()
    nn.init.constant_(broken.get_parameter("classifier.bias"), np.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        correct_under("natural", broken, images, threat)


def test_margin_is_positive_if_misclassified() -> None:
    """The CW loss changes its sign exactly at the decision boundary."""
    logits, y = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 7
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


def test_l2_attacks_stay_in_their_ball(model: nn.Module, images: Images) -> None:
    """The l_2 attack is bounded by its radius and [0, 1], uses the radius, breaks more as it grows, and none at 0."""
    x, y = images.pixels / 255, images.labels
    threat = ThreatSpec(1.5, 0.4, 20, norm="l2")
    x_adv = pgd(model, x, lambda logits: nn.functional.cross_entropy(logits, y, reduction="none"), threat)
    lengths = (x_adv.double() - x.double()).flatten(1).norm(dim=1)
    assert float(lengths.max()) <= 1.5 * (1 + 1e-5) and float(lengths.min()) > 0.5
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    counts = [
        correct_under("pgd20", model, images, ThreatSpec(eps, eps / 4, 1, norm="l2")).sum()
        for eps in (0.0, 0.7, 1.5, 2.5)
    ]
    natural = correct_under("natural", model, images, threat).sum()
    assert counts[0] == natural and counts == sorted(counts, reverse=True) and counts[-1] < counts[1]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_the_l2_step_is_the_normalised_gradient(scale: float) -> None:
    """One step on a linear model is w / ||w|| times the step, for gradients of any size."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(scale * torch.tensor([3.0, 4.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) * self.weight).sum(1, keepdim=True)

    x = torch.full((1, 1, 1, 2), 0.5)
    x_adv = pgd(Linear(), x, lambda logits: logits[:, 0], ThreatSpec(0.2, 0.1, 1, "zero", norm="l2"))
    torch.testing.assert_close(x_adv - x, torch.tensor([[[[0.06, 0.08]]]]))


def test_the_terminal_names_the_norm(run: Path, measured: Callable[..., dict[str, Any]], capsys: Any) -> None:
    """An evaluation in l_2 of a run that was trained in l_inf."""
    measured("--attacks", "natural", "--checkpoint", "best")
    assert "digits, l_inf, eps = 0.15, " in capsys.readouterr().out
    options = ("--norm", "l2", "--eps", "0.5", "--out", str(run / "l2.json"))
    measured("--attacks", "natural", "--checkpoint", "best", *options)
    assert "digits, l_2, eps = 0.5, " in capsys.readouterr().out
    with pytest.raises(UserError, match="names no l_2 radius"):
        measured("--attacks", "natural", "--norm", "l2", "--out", str(run / "other.json"))
