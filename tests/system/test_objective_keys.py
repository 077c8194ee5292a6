"""`objective.loss` and `objective.divergence`, runs of older versions, and CutMix, through training, evaluation and release."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.losses import LOSSES
from nrat_scale.recipe import load_recipe
from nrat_scale.release import bundle
from nrat_scale.report.page import write_report
from nrat_scale.report.run import read_runs
from nrat_scale.train.__main__ import main as train_cli
from nrat_scale.train.setup import start
from nrat_scale.train.step import attacked, micro_batches
from tests.support.accelerate import fresh_process  # noqa: F401  (autouse in this module)
from tests.support.runs import RECIPE, digest, make_shards

QUICK = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with its shards, and test images beside them."""
    folder = tmp_path_factory.mktemp("objectives")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    make_shards(folder / "test", 40, 2)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


# ---- loss and divergence of a recipe ------------------------------------------------------------------------------------


def test_another_loss_and_divergence_are_trained_and_stamped(
    recipe_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They replace C and D of the preset; progress, results, report and card name them after the preset."""
    run, title = tmp_path / "run", "nrat + loss=nfl_rce + divergence=lse"
    keys = ["objective.loss=nfl_rce", "objective.divergence=lse", "train.epochs=1"]
    train_cli([str(recipe_path), *keys, f"run_dir={run}"])
    assert f"tiny: {title} on" in capfd.readouterr().out
    evaluate_cli.main([str(run), "--data", str(recipe_path.parent / "test"), "--attacks", "natural,pgd2"])
    results = json.loads((run / "results.json").read_text())
    assert {record["objective"] for record in results["checkpoints"].values()} == {title}
    assert title in write_report(read_runs([run])).read_text()
    card = (bundle.release(run, tmp_path / "release") / "README.md").read_text()
    assert f"trained with **{title}**" in card
    assert "a variation of ours of nrat (published: NRAT 2024)" in card


def _loss(recipe_path: Path, run: Path, *overrides: str) -> tuple[Any, ...]:
    """Natural and adversarial logits, labels and the outer loss of the first batch."""
    state = start(load_recipe(recipe_path, ["precision=fp64", *overrides, f"run_dir={run}"]))
    (part,) = micro_batches(state, next(state.data.batches(0, 1)))
    part = attacked(state, part)
    assert part.x_adv is not None
    logits, logits_adv = state.base(part.x), state.base(part.x_adv)
    return logits, logits_adv, part.y, state.objective.loss(logits, logits_adv, part.y)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_ablation_of_equation_15(recipe_path: Path, tmp_path: Path, loss: str) -> None:
    """NRAT with any C: the same lam times symmetric KL, and C alone differs."""
    logits, logits_adv, y, value = _loss(recipe_path, tmp_path / "run", f"objective.loss={loss}")
    p, q = logits.softmax(1), logits_adv.softmax(1)
    sym_kl = 0.5 * ((p - q) * (p / q).log()).sum(1)
    torch.testing.assert_close(value, (LOSSES[loss](logits, y) + 6 * sym_kl).mean(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.loss=nfl_rse"], "objective.loss is 'nfl_rse'. Did you mean 'nfl_rce'"),
        (["objective.divergence=symkl"], "objective.divergence is 'symkl'. Did you mean 'sym_kl'"),
        (["objective.name=pgd_at", "objective.divergence=kl"], "the family 'at' has none"),
        (["objective.name=trades_ikl", "objective.lam=6"], "Remove objective.lam"),
        (["objective.divergence=ikl", "objective.lam=2"], "Remove objective.lam"),
        (["objective.ikl_beta=10"], "neither objective.divergence nor objective.inner is ikl"),
        (["objective.name=nrat_ikl", "objective.ikl_temperature=0"], "greater than 0"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    """A wrong name gets the nearest one, and a key without effect or with two meanings is refused."""
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(QUICK, overrides)


def test_ikl_in_another_preset_needs_no_lam() -> None:
    """`objective.divergence` to and from IKL brings the weights that the new divergence has."""
    ikl = load_recipe(QUICK, ["objective.name=trades", "objective.divergence=ikl"]).objective
    cold = ["objective.name=nrat_ikl", "objective.divergence=sym_kl", "objective.warm_start=0"]
    kl = load_recipe(QUICK, cold).objective
    assert (ikl.lam, ikl.ikl_alpha, ikl.ikl_beta, ikl.title) == (1.0, 4.0, 20.0, "trades + divergence=ikl")
    assert (kl.lam, kl.title) == (6.0, "nrat_ikl + divergence=sym_kl")


def test_new_keys_leave_identities_as_they_were() -> None:
    """A preset's own losses, IKL's constants and the warm-up of an AWP that is off decide nothing new."""
    same = ["objective.loss=nce_rce", "objective.divergence=sym_kl", "objective.ikl_alpha=4", "awp.warmup_epochs=10"]
    identity = load_recipe(QUICK, ["objective.name=nrat"]).identity
    assert load_recipe(QUICK, ["objective.name=nrat", *same]).identity == identity
    other = ["objective.loss=ce", "objective.divergence=kl", "awp.gamma=0.005"]
    assert identity not in [load_recipe(QUICK, ["objective.name=nrat", key]).identity for key in other]
    awp = [load_recipe(QUICK, ["awp.gamma=0.005", f"awp.warmup_epochs={n}"]).identity for n in (9, 10)]
    assert awp[0] != awp[1] and load_recipe(QUICK, ["awp.gamma=0.005"]).identity == awp[0]


# ---- runs of older versions -----------------------------------------------------------------------------------------


def _older(recipe_path: Path, run: Path, objective: str, *overrides: str, **changes: Any) -> Path:
    """The recipe.yaml of a run that an older version began: every key that it had, and no other."""
    recipe = load_recipe(recipe_path, ["objective.name=trades", *overrides, f"run_dir={run}"])
    values = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.structured(recipe)))
    former = ("name", "lam", "inner", "smoothing", "smoothing_mode", "a", "b")
    values["objective"] = {key: values["objective"][key] for key in former} | {"name": objective} | changes
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    return run / "recipe.yaml"


@pytest.mark.parametrize(
    ("objective", "overrides", "changes", "message"),
    [
        ("trades_ikl", [], {}, "weighed IKL by lam"),
        ("nrat_ikl", [], {}, "weighed IKL by lam"),
        ("trades", [], {"inner": "ikl"}, "weighed IKL by lam"),
        ("trades", [], {"inner": "nfl_rce"}, "gradient of nfl_rce"),
        ("dm_at", ["data.augment.cutmix=1"], {"smoothing": 0.1, "smoothing_mode": "mixed"}, "labels of CutMix"),
    ],
)
def test_a_run_whose_loss_has_changed_is_not_resumed(
    recipe_path: Path, tmp_path: Path, objective: str, overrides: list[str], changes: dict[str, Any], message: str
) -> None:
    """Neither by its stored recipe nor by the user's; the recipe still loads for evaluation, and the folder is unchanged."""
    stored = _older(recipe_path, tmp_path / "run", objective, *overrides, **changes)
    before = stored.read_bytes()
    assert load_recipe(stored).objective.name == objective
    for recipe in (stored, recipe_path):
        with pytest.raises(UserError, match=f"run of an older version, in which .*{message}.* run_dir=PATH"):
            train_cli([str(recipe), f"run_dir={tmp_path / 'run'}"])
    assert stored.read_bytes() == before and [path.name for path in stored.parent.iterdir()] == ["recipe.yaml"]


def test_an_older_ikl_recipe_says_how_it_is_read(
    recipe_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its lam weighed both terms, without a temperature."""
    spec = load_recipe(_older(recipe_path, tmp_path / "run", "trades_ikl", lam=5.0)).objective
    assert (spec.lam, spec.ikl_alpha, spec.ikl_beta, spec.ikl_temperature) == (1.0, 5.0, 5.0, 1.0)
    assert "class means of the last 100 steps are now those of the previous epoch" in capfd.readouterr().err


def test_an_older_run_of_score_keeps_its_losses(recipe_path: Path, tmp_path: Path) -> None:
    """Cross-entropy, squared error and a KL attack, said in the title; today's preset is another recipe."""
    stored = _older(recipe_path, tmp_path / "run", "score", lam=4.0)
    spec = load_recipe(stored).objective
    assert (spec.loss, spec.divergence, spec.inner, spec.smoothing) == ("ce", "lse", "kl", 0.0)
    assert spec.title == "score + loss=ce"
    with pytest.raises(UserError, match=r"another recipe \(.* is .* there and .* here\)"):
        train_cli([str(recipe_path), "objective.name=score", f"run_dir={tmp_path / 'run'}"])
    train_cli([str(stored), "train.max_steps=1"])


# ---- IKL's class means and CutMix in a run --------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("stops", [(3, 6), (4, 8)], ids=["within epochs", "between epochs"])
def test_class_means_resume_exactly(recipe_path: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """A run of three epochs of four steps, stopped and resumed twice, ends with the bits of one that was not."""
    keys = ["objective.name=trades_ikl", "objective.ikl_gamma=0.2"]
    train_cli([str(recipe_path), *keys, f"run_dir={tmp_path / 'whole'}"])
    for stop in (*stops, "null"):
        train_cli([str(recipe_path), *keys, f"run_dir={tmp_path / 'parts'}", f"train.max_steps={stop}"])
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    kept = named_checkpoint(tmp_path / "whole", "last").tensors("objective")
    assert kept["class_sums"].sum().item() == pytest.approx(64), "the images of the last epoch only"
    assert (kept["class_means"] - 0.1).abs().max() > 1e-3, "the means of the epoch before"


@pytest.mark.parametrize(
    ("keys", "said", "not_said"),
    [
        (["objective.name=nrat"], ["KL(y || p')", "wrong ones included"], ["not smoothed"]),
        (["objective.name=dm_at"], ["KL(y || p')", "objective.smoothing 0.1 is not applied"], []),
        (["objective.name=score"], ["||p' - y||^2", "not smoothed"], []),
        (["objective.name=pgd_at"], [], ["With CutMix", "not smoothed"]),
        (["objective.name=nrat", "objective.inner=sym_kl"], [], ["With CutMix", "not smoothed"]),
        (["objective.name=nrat", "data.augment.cutmix=0"], [], ["With CutMix"]),
    ],
)
def test_a_run_says_what_cutmix_changes(
    recipe_path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    keys: list[str],
    said: list[str],
    not_said: list[str],
) -> None:
    """At its start, for every objective whose attack or label differs, and only for those."""
    train_cli([str(recipe_path), "data.augment.cutmix=0.5", *keys, "train.max_steps=1", f"run_dir={tmp_path / 'run'}"])
    out = capfd.readouterr().out
    assert all(text in out for text in said) and not any(text in out for text in not_said)


def test_dm_at_trains_the_published_loss_on_cutmix_labels(recipe_path: Path, tmp_path: Path) -> None:
    """The first step's loss is KL(y || p) + 5 KL(p || p'), without label smoothing."""
    keys = ["objective.name=dm_at", "data.augment.cutmix=1"]
    logits, logits_adv, y, value = _loss(recipe_path, tmp_path / "run", *keys)
    p, q = logits.softmax(1), logits_adv.softmax(1)
    kl = torch.special.xlogy(y, y / p).sum(1) + 5 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(value, kl.mean(), rtol=0, atol=1e-9)
