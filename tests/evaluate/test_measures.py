"""Numbers that can be trusted: outcomes per image, intervals, AutoAttack as if called directly, results that name what they measured."""

import json
import math
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import nrat_scale
from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate.attacks import margin
from nrat_scale.evaluate.measures import Images, correct_under
from nrat_scale.evaluate.statistics import wilson
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.release import bundle
from tests.support.run_folders import write_run

THREAT = ThreatSpec(0.06, 0.02, 1)
NAMES = tuple("0123456789")


def pictures(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 12, 12, 1] with one bright row for the class, and labels."""
    labels = np.arange(n) % 10
    images = np.random.default_rng(seed).integers(0, 120, (n, 12, 12, 1))
    images[np.arange(n), labels + 1] += 110
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small model, trained for a moment: right on most images, broken on some by an attack."""
    torch.manual_seed(0)
    net = create("cnn4", model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 16}), 10, 1, (0.3,), (0.3,)))
    images, labels = pictures(400, 1)
    x, y = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255).float(), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def images() -> Images:
    pixels, labels = pictures(60, 2)
    return Images(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels), np.arange(60))


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_wilson_known_values() -> None:
    """The interval of the textbook, also at 0 and 1 where the usual one collapses."""
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_estimate(counts: tuple[int, int]) -> None:
    """0 <= low <= p <= high <= 1."""
    low, high = wilson(*counts)
    p = counts[0] / counts[1]
    assert 0 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1


def test_margin_is_positive_where_misclassified() -> None:
    """The CW loss changes sign exactly at the decision boundary."""
    logits, y = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 7
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


# ---- outcomes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["fgsm", "pgd5", "cw5"])
def test_outcomes_do_not_depend_on_batches_or_order(model: nn.Module, images: Images, attack: str) -> None:
    """Random starts belong to the image: other batches, or another order, give the same images the same outcome."""
    whole = correct_under(attack, model, images, THREAT)
    assert np.array_equal(correct_under(attack, model, images, THREAT, batch_size=7), whole)
    order = np.random.default_rng(0).permutation(60)
    assert np.array_equal(correct_under(attack, model, images.take(order), THREAT), whole[order])


def test_stronger_attacks_break_more(model: nn.Module, images: Images) -> None:
    """Attacks break some images, never repair one, and more steps break no fewer here."""
    natural = correct_under("natural", model, images, THREAT)
    fgsm, pgd, none = (
        correct_under(a, model, images, t)
        for a, t in (("fgsm", THREAT), ("pgd20", THREAT), ("pgd20", ThreatSpec(0.0, 0.0, 1)))
    )
    assert not (pgd & ~natural).any()
    assert natural.sum() > fgsm.sum() >= pgd.sum() > 0
    assert np.array_equal(none, natural)


def test_released_code_space_is_another_threat(model: nn.Module, images: Images) -> None:
    """`released_code` runs, and is not the pixel threat under another name."""
    released = ThreatSpec(0.06, 0.02, 1, space="released_code")
    assert not np.array_equal(
        correct_under("pgd20", model, images, released), correct_under("pgd20", model, images, THREAT)
    )


def test_nan_is_no_prediction(images: Images) -> None:
    """NaN logits are an error: their argmax would pass for class 0."""
    broken = create("cnn4", model_arguments(ModelSpec(kwargs={"width": 4}), 10, 1, (0.3,), (0.3,))).eval()
    nn.init.constant_(broken.get_parameter("classifier.bias"), math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        correct_under("natural", broken, images, THREAT)


def test_unknown_attack(model: nn.Module, images: Images) -> None:
    """A mistyped attack is named."""
    with pytest.raises(UserError, match="pgd0"):
        correct_under("pgd0", model, images, THREAT)


def test_autoattack_equals_a_direct_call(model: nn.Module, images: Images) -> None:
    """Image for image the outcome of pyautoattack on the same block with the same seed; no global randomness is spent."""
    block = images.take(np.arange(20))
    threat = ThreatSpec(0.12, 0.02, 1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    outcome = correct_under("aa", model, block, threat, seed=3, batch_size=20)
    assert torch.equal(before, torch.random.get_rng_state())
    attack = pyautoattack.AutoAttack(model, eps=0.12, norm="Linf", seed=3, device="cpu", version="standard")
    x, y = block.pixels.float().div(255), block.labels
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=20)
    assert np.array_equal(outcome, model(x_adv).argmax(1).eq(y).numpy())


# ---- evaluate and release over a run directory ----------------------------------------------------------------------


@pytest.fixture
def run(model: nn.Module, tmp_path: Path) -> Path:
    """A run directory whose EMA is `model` and whose raw weights are not."""
    test_images, labels = pictures(60, 2)
    test = write_shards(LabelledArrays(test_images, labels, "custom", NAMES), tmp_path / "test", progress=False)
    arguments = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 16}), 10, 1, (0.3,), (0.3,))
    train = f"{test.parent}/secret/train"
    return write_run(tmp_path / "run", model, arguments, 12, threat="eps: 0.06, step: 0.02", train=train)


def results_of(run: Path, *options: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    evaluate_cli.main([str(run), "--data", str(run.parent / "test"), *options])
    return json.loads((run / "results.json").read_text())


def test_results_say_what_was_measured(run: Path, model: nn.Module, images: Images) -> None:
    """Counts, n, interval, weights, data and threat stand in results.json; best = last is measured once."""
    results = results_of(run, "--attacks", "natural,pgd3")
    best, last = results["checkpoints"]["best"], results["checkpoints"]["last"]
    assert best == last
    assert best["weights"] == "ema"
    pgd = best["attacks"]["pgd3"]
    assert pgd["correct"] == int(correct_under("pgd3", model, images, THREAT).sum())
    assert (pgd["n"], pgd["accuracy"]) == (60, pgd["correct"] / 60)
    assert pgd["low"] < pgd["accuracy"] < pgd["high"]
    assert results["threat"] == {"norm": "linf", "eps": 0.06, "step": 0.02, "space": "pixel"}


def test_results_are_reused_only_for_the_same_question(run: Path) -> None:
    """What is known is not measured again (tests/test_evaluate.py: nor overwritten)."""
    first = results_of(run, "--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]
    again = results_of(run, "--attacks", "pgd3,natural")["checkpoints"]["best"]["attacks"]
    assert again["pgd3"] == first, "the seconds too: it was not run again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacks", "natural,pgdx"], "pgdx"),
        (["--eps", "8"], "8/255"),
        (["--eps", "a/b"], "--eps"),
        (["--images", "0"], "images is 0"),
        (["--checkpoint", "worst"], "worst"),
    ],
)
def test_bad_options(run: Path, options: list[str], message: str) -> None:
    """A wrong option is named and nothing is written."""
    with pytest.raises(UserError, match=message):
        results_of(run, *options)
    assert not (run / "results.json").exists()


def test_training_data_are_no_test_data(run: Path) -> None:
    """Evaluating on what was trained or selected on is refused."""
    fingerprint = open_shards(run.parent / "test").fingerprint
    (run / "data.json").write_text(json.dumps({"real": {"fingerprint": fingerprint}}))
    with pytest.raises(UserError, match="real training data"):
        results_of(run)


def test_other_data_do_not_fit(run: Path, tmp_path: Path) -> None:
    """A model of ten classes is not measured on three."""
    other = write_shards(
        LabelledArrays(np.zeros((9, 12, 12, 1), np.uint8), np.arange(9) % 3, "x", ("a", "b", "c")), tmp_path / "o"
    )
    with pytest.raises(UserError, match="3 classes"):
        evaluate_cli.main([str(run), "--data", str(other)])


def test_release_is_the_evaluated_model(run: Path, model: nn.Module, tmp_path: Path) -> None:
    """The folder loads through nrat_scale and timm with the EMA's logits, names no local path, and is made once."""
    results_of(run, "--attacks", "natural,pgd3")
    folder = bundle.release(run, tmp_path / "out" / "mine")
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        "config.json",
        "curves.png",
        "manifest.json",
        "model.safetensors",
        "model_info.json",
        "new_model_issue.md",
        "recipe.yaml",
        "results.json",
        "results.npz",
    ]
    x = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded, through_timm = nrat_scale.load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(through_timm(x), model(x))
    assert not any(str(tmp_path) in p.read_text() for p in folder.rglob("*.*") if p.suffix in (".md", ".json", ".yaml"))
    card, record = (folder / "README.md").read_text(), json.loads((run / "results.json").read_text())
    pgd = record["checkpoints"]["best"]["attacks"]["pgd3"]
    assert f"{100 * pgd['accuracy']:.1f}" in card
    assert "n = 60" in card
    assert bundle.release(run, folder) == folder
    evaluate_cli.main(
        [str(folder), "--data", str(run.parent / "test"), "--attacks", "pgd3", "--out", str(tmp_path / "again.json")]
    )
    again = json.loads((tmp_path / "again.json").read_text())["checkpoints"]["release"]["attacks"]["pgd3"]
    assert again["correct"] == pgd["correct"]


def test_release_refuses(run: Path, tmp_path: Path) -> None:
    """No results, or those of other weights, are not passed off as these; nothing foreign is overwritten."""
    with pytest.raises(UserError, match="no results"):
        bundle.release(run, tmp_path / "out")
    card = (bundle.release(run, tmp_path / "bare", unevaluated=True) / "README.md").read_text()
    assert "Not evaluated" in card
    results_of(run, "--attacks", "natural")
    results = json.loads((run / "results.json").read_text())
    for record in results["checkpoints"].values():
        record["sha256"] = "0" * 64
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="no results"):
        bundle.release(run, tmp_path / "out")
    (tmp_path / "full").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "full" / "model.safetensors")
    with pytest.raises(UserError, match="exists already"):
        bundle.release(run, tmp_path / "full", unevaluated=True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["model.safetensors"]
