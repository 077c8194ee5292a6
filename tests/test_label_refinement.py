"""ADR, temporal ensembling, SGLR and NoiLIn against their formulas written a second time; every contradiction is a sentence."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.label_refinement import (
    LabelRefinement,
    RefineSpec,
    changed_labels,
    cosine,
    ensemble_distance,
    rectified_labels,
)
from nrat_scale.objectives import OBJECTIVES, build, preset
from nrat_scale.recipe import load_recipe, to_yaml
from tests.support.formulas import random_logits, softmax, tensors
from tests.support.runs import RECIPE


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """A recipe whose data are never read."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", "real").replace("GENERATED", "generated"))
    return path


# ---- ADR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_rectified_labels(share: float) -> None:
    """Row by row in numpy: the share falls by the teacher's doubt in the label, and stays in [0, 1]."""
    z, _, y = random_logits(3, 7, 4.0, 40)
    expected = np.zeros_like(z)
    for row, (logits, label) in enumerate(zip(z, y, strict=True)):
        p = softmax(logits / 2.5)
        own = min(1.0, max(0.0, share - (max(p) - p[label])))
        expected[row] = own * p
        expected[row, label] += 1 - own
    found = rectified_labels(*tensors(z, y), temperature=2.5, share=share)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, atol=1e-12)


def test_the_label_keeps_the_largest_probability_at_the_published_shares() -> None:
    """At shares up to one half it always does; at 0.7 where the teacher doubts it by 0.3 at most."""
    z, _, y = random_logits(5, 10, 3.0, 200)
    teacher, labels = tensors(z, y)
    assert rectified_labels(teacher, labels, 2.0, 0.5).argmax(1).eq(labels).all()


def test_cosine_goes_from_the_first_value_to_the_last() -> None:
    """Step t of n has the value that the authors' table has at t: last + (first - last) (1 + cos(pi t / n)) / 2."""
    values = [cosine(2.5, 2.0, step / 8) for step in range(9)]
    assert values[0] == 2.5 and values[-1] == pytest.approx(2.0) and values == sorted(values, reverse=True)
    assert cosine(0.7, 0.95, 0.25) == pytest.approx(0.95 - 0.25 * math.cos(math.pi / 8) ** 2)


# ---- predictions that are remembered ----------------------------------------------------------------------------------


def test_weight_of_temporal_ensembling() -> None:
    """In a schedule of 200 epochs, epoch e (from 1) has the weight 300 exp(-5 (1 - (e - 90) / 60)^2) from 90 to 150."""
    spec = RefineSpec("te")
    for epoch in (1, 89, 90, 100, 149, 150, 151, 200):
        expected = 0.0 if epoch < 90 else 300 * math.exp(-5 * max(0.0, 1 - (epoch - 90) / 60) ** 2)
        assert spec.te_weight_at(epoch / 200) == pytest.approx(expected), epoch
        assert spec.starts_by(epoch / 200) == (epoch >= 90)


def test_distance_is_a_mean_over_classes() -> None:
    """The mean over images and classes of (p - h)^2, as torch's MSE of the two matrices."""
    z, other, _ = random_logits(1, 10, 2.0, 6)
    logits, history = tensors(z, np.stack([softmax(row) for row in other]))
    expected = torch.nn.functional.mse_loss(logits.softmax(1), history)
    torch.testing.assert_close(ensemble_distance(logits, history).mean(), expected)


def test_rows_of_temporal_ensembling_and_sglr() -> None:
    """TE begins with zeros, so that the normalised first row is the prediction; SGLR begins with the label."""
    z, z_adv, y = random_logits(2, 4, 2.0, 3)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    images = torch.tensor([5, 0, 2])
    te, sglr = (LabelRefinement(RefineSpec(kind), 4, 6).double() for kind in ("te", "sglr"))
    row = te.updated(te.rows(images, labels), logits)
    torch.testing.assert_close(row / row.sum(1, keepdim=True), logits.softmax(1))
    te.remember(images, row)
    again = te.updated(te.rows(images, labels), logits_adv)
    torch.testing.assert_close(again, 0.9 * 0.1 * logits.softmax(1) + 0.1 * logits_adv.softmax(1))
    assert te.history is not None and te.history[[1, 3, 4]].abs().sum() == 0

    onehot = torch.eye(4, dtype=torch.float64)[labels]
    torch.testing.assert_close(sglr.rows(images, labels), onehot)
    new = sglr.updated(sglr.rows(images, labels), logits, logits_adv)
    torch.testing.assert_close(new, 0.9 * onehot + 0.1 * (0.2 * logits.softmax(1) + 0.8 * logits_adv.softmax(1)))
    sglr.remember(images, new)
    torch.testing.assert_close(sglr.rows(images, (labels + 1) % 4), new)


def test_an_image_twice_in_a_batch_keeps_the_row_of_its_first_place() -> None:
    """Whatever the order in which a device writes; ranks are concatenated first."""
    refinement = LabelRefinement(RefineSpec("te"), 2, 4)
    images, rows = torch.tensor([3, 1, 3]), torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    refinement.remember(images[:1], rows[:1], lambda _: (images, rows))
    assert refinement.history is not None
    assert refinement.history.tolist() == [[0, 0], [0.5, 0.5], [0, 0], [1, 0]]


# ---- NoiLIn ---------------------------------------------------------------------------------------------------------


def test_rate_follows_validation() -> None:
    """Against a list of the last ten accuracies, 120 epochs long: it grows when their sum falls, at first up to one half."""
    accuracies = [0.4 + 0.1 * math.sin(epoch / 5) - 0.001 * epoch for epoch in range(120)]
    refinement, rate, last = LabelRefinement(RefineSpec("noilin")), 0.05, [0.0] * 10
    for epoch, accuracy in enumerate(accuracies):
        before = sum(last)
        last[epoch % 10] = accuracy
        if before > sum(last):
            rate = min(rate * 1.05, 0.6)
        if epoch <= 90:
            rate = min(0.3, rate)
        refinement.validated(accuracy, (epoch + 1) / 120)
        assert float(refinement.rate or 0) == pytest.approx(rate), epoch
    assert rate > 0.25
    refinement.validated(math.nan, 1.0)
    assert float(refinement.rate or 0) == pytest.approx(rate)


def test_changed_labels_are_others() -> None:
    """A share `rate` of them, to each other class equally often; none at rate 0, all at 1."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (20_000,), generator=generator)
    draws, shifts = torch.rand(20_000, generator=generator), torch.randint(1, 5, (20_000,), generator=generator)
    assert changed_labels(y, draws, shifts, 0.0, 5).equal(y)
    assert changed_labels(y, draws, shifts, 1.0, 5).ne(y).all()
    changed = changed_labels(y, draws, shifts, torch.tensor(0.3), 5)
    assert float(changed.ne(y).float().mean()) == pytest.approx(0.3, abs=0.02)
    counts = torch.bincount(changed[(y == 2) & changed.ne(y)], minlength=5)
    assert counts[2] == 0 and counts[[0, 1, 3, 4]].min() > 0.8 * counts.sum() / 4


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_presets_set_their_method_and_names_say_it(recipe_path: Path) -> None:
    """One line each; ADR brings its EMA along; a method on top of another preset is part of the title."""
    kinds = {name: spec.refine.kind for name, spec in OBJECTIVES.items() if spec.refine.kind != "none"}
    assert kinds == {"adr": "adr", "trades_adr": "adr", "te": "te", "trades_te": "te", "sglr": "sglr",
                     "noilin": "noilin", "trades_noilin": "noilin"}  # fmt: skip
    path = recipe_path.with_name("bare.yaml")
    path.write_text(recipe_path.read_text().replace("ema: {decay: 0.9, warmup_fraction: 0.25}\n", ""))
    recipe = load_recipe(path, ["objective.name=adr"])
    assert (recipe.ema.decay, recipe.objective.title) == (0.995, "adr")
    assert load_recipe(path, ["objective.name=trades"]).ema.decay == 0
    path.write_text(to_yaml(recipe))
    assert load_recipe(path) == recipe
    mixed = load_recipe(recipe_path, ["objective.name=nrat", "objective.refine.kind=adr"])
    assert mixed.objective.title == "nrat + refine=adr"
    assert build("nrat", refine=RefineSpec("te")).spec.title == "nrat + refine=te"


def test_another_objective_drops_the_method_of_a_stored_recipe(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resolved recipe of an ADR run with `objective.name=trades` is TRADES without a teacher; a changed method is named."""
    path = recipe_path.with_name("stored.yaml")
    text = recipe_path.read_text().replace("ema: {decay: 0.9, warmup_fraction: 0.25}\n", "")
    path.write_text(text)
    path.write_text(to_yaml(load_recipe(path, ["objective.name=adr"])))
    other = load_recipe(path, ["objective.name=trades"])
    assert (other.objective.title, other.ema.decay) == ("trades", 0)
    assert load_recipe(path, ["objective.name=te"]).objective.title == "te"
    assert "refine" not in capsys.readouterr().err
    path.write_text(text)
    path.write_text(to_yaml(load_recipe(path, ["objective.name=pgd_at", "objective.refine.kind=te"])))
    assert load_recipe(path, ["objective.name=trades"]).objective.title == "trades"
    assert "is that of 'pgd_at' and is not used" in capsys.readouterr().err
    kept = ["objective.name=trades", "objective.refine.kind=te"]
    assert load_recipe(path, kept).objective.title == "trades + refine=te"


def test_old_recipes_keep_their_identity(recipe_path: Path) -> None:
    """Keys at their defaults do not count; a method or a constant of it does."""
    usual = load_recipe(recipe_path, ["objective.name=pgd_at"]).identity
    assert load_recipe(recipe_path, ["objective.name=pgd_at", "objective.refine.kind=none"]).identity == usual
    others = {
        load_recipe(recipe_path, ["objective.name=te", *more]).identity
        for more in ([], ["objective.refine.te_weight=30"])
    }
    assert len(others | {usual}) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["objective.refine.kind=arr"], r"objective\.refine\.kind is 'arr'.*adr"),
        (["objective.name=mart", "objective.refine.kind=adr"], "the family 'mart' of mart does not have. Use none or noilin"),
        (["objective.name=trades", "objective.refine.kind=sglr"], "which the family 'trades' of trades does not have"),
        (["objective.name=natural", "objective.refine.kind=te"], "which the family 'natural' of natural does not have"),
        (["objective.name=adr", "ema.decay=0"], r"teacher is the EMA, but ema\.decay is 0\. Set ema\.decay=0\.995"),
        (["objective.name=te", "data.augment.cutmix=0.5"], r"not defined for mixed images\. Set data\.augment\.cutmix=0"),
        (["objective.name=sglr", "awp.gamma=0.01"], r"not published with weight perturbation\. Set awp\.gamma=0"),
        (["objective.name=dm_at", "objective.refine.kind=adr"], r"softens labels; set objective\.smoothing=0"),
        (["objective.name=trades_ikl", "objective.refine.kind=noilin"], "IKL weighs by the given label"),
        (["objective.name=adr", "objective.refine.te_weight=30"], r"te_weight is 30.*Choose objective\.refine\.kind=te, or"),
        (["objective.name=trades", "objective.refine.momentum=0.5"], r"kind is 'none'\. Choose objective\.refine\.kind=te"),
        (["objective.name=adr", "objective.refine.adr_temperature_last=0"], "finite and greater than 0"),
        (["objective.name=te", "objective.refine.te_full=0.4"], r"must be above te_start 0\.45"),
        (["objective.name=noilin", "objective.refine.noilin_most=0.01"], r"below noilin_first 0\.05"),
        (["objective.name=noilin", "objective.refine.noilin_first=0"], r"noilin_first is 0\.0; it must be in \(0, 1\]"),
        (["objective.name=te", "objective.refine.momentum=1"], r"momentum is 1\.0; it must be in \[0, 1\)"),
        (["objective.name=noilin", "objective.refine.noilin_window=0"], "at least 1"),
        (["objective.name=sglr", "objective.refine.sglr_natural=2"], r"in \[0, 1\]"),
        (["objective.refine=adr"], r"objective\.refine is 'adr'; it must be a mapping.*objective\.refine\.kind=adr"),
    ],
)  # fmt: skip
def test_contradictions_are_sentences(recipe_path: Path, changes: list[str], sentence: str) -> None:
    """Each names the key, what is wrong, and a way out."""
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe(recipe_path, changes)
    assert "\n" not in str(caught.value)


def test_constants_of_the_presets() -> None:
    """The values of the authors' configuration files for CIFAR-10 and ResNet-18."""
    adr, te, sglr, noilin = (preset(name).refine for name in ("adr", "te", "sglr", "noilin"))
    assert (adr.adr_temperature_first, adr.adr_temperature_last) == (2.5, 2.0)
    assert (adr.adr_share_first, adr.adr_share_last) == (0.7, 0.95)
    assert (te.momentum, te.te_weight, te.te_start, te.te_full) == (0.9, 300, 90 / 200, 150 / 200)
    assert (sglr.momentum, sglr.sglr_natural, sglr.sglr_start) == (0.9, 0.2, 90 / 200)
    assert (noilin.noilin_first, noilin.noilin_most, noilin.noilin_growth, noilin.noilin_window) == (
        0.05,
        0.6,
        0.05,
        10,
    )
    assert preset("trades_noilin").refine.noilin_most == 0.4
