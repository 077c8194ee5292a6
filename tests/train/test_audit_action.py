"""Runs that act on an audit: what they record and say, that they resume, and that report and card repeat it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.audit_action import action_text
from nrat_scale.data.shards import open_shards
from nrat_scale.labels import corrupt
from nrat_scale.recipe import load_recipe, to_yaml
from nrat_scale.release import bundle
from nrat_scale.report import __main__ as report_cli
from nrat_scale.train import __main__ as train_cli
from nrat_scale.train.loop import train
from tests.support.runs import digest, torchrun
from tests.support.sidecars import write_sidecar


@pytest.fixture(scope="module")
def audit(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of the noisy real labels that doubts 30 of the 40 wrong ones and 12 of the 80 right ones, and corrects the wrong."""
    shards = open_shards(recipe_path.parent / "real")
    order = shards.in_source_order()
    clean = shards.labels(order)
    noisy = corrupt(clean, "symmetric", 0.4, 0, 10)
    wrong, right = np.flatnonzero(noisy != clean), np.flatnonzero(noisy == clean)
    quality = np.full(120, 0.9)
    quality[[*wrong[:30], *right[:12]]] = 0.2
    by_position = np.empty((3, 120))
    by_position[:, order] = quality, noisy, clean
    columns = {"given": by_position[1].astype(int), "suggested": by_position[2].astype(int)}
    return write_sidecar(
        tmp_path_factory.mktemp("audit"), shards, by_position[0], noise={"kind": "symmetric"}, **columns
    )


def options(audit: Path, action: str, run: Path, *more: str) -> list[str]:
    return [f"data.real.audit={{scores: {audit}, action: {action}}}", f"run_dir={run}", *more]


@pytest.mark.parametrize("action", ["drop", "relabel", "weight"])
def test_a_run_resumes_and_records_its_audit(
    recipe_path: Path, audit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    """An interrupted run ends with the same bits; recipe.yaml, data.json and label_noise.json state what was used."""
    whole = train(load_recipe(recipe_path, options(audit, action, tmp_path / "whole")))
    said = capsys.readouterr().out
    for stop in (["train.max_steps=5"], []):
        parts = train(load_recipe(recipe_path, options(audit, action, tmp_path / "parts", *stop)))
    assert digest(parts) == digest(whole)
    plain = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'plain'}"]))
    assert digest(plain) != digest(whole)
    assert load_recipe(whole / "recipe.yaml").data.real.audit.action == action
    record = json.loads((whole / "data.json").read_text())["real"]["audit"]
    assert record["action"] == action and record["below"] == 0.5 and record["audit"] == "0123456789abcdef"
    assert f"audit: {action_text('real', record)}\n" in said
    noise, before = (json.loads((run / "label_noise.json").read_text()) for run in (whole, plain))
    unaudited = noise["before_audit"]
    assert unaudited["num_labels"] == 100 and 20 <= unaudited["num_noisy"] <= 40 == before["num_noisy"]
    assert noise["sha256"] == before["sha256"]
    counts, acted = np.asarray(noise["transition_matrix"]), record["num_acted"]
    assert counts.sum() == noise["num_labels"] and counts.trace() == noise["num_labels"] - noise["num_noisy"]
    # 20 of the 120 are held out and keep their labels; of the 42 doubted labels 12 are right.
    if action == "drop":
        assert 22 <= acted <= 42 and noise["num_labels"] == record["num_trained"] == 100 - acted
        assert noise["num_noisy"] == 10 and "label noise: symmetric, " in said
        assert f"({unaudited['num_noisy']:.1f} % before the audit)" in said, "of 100 labels"
    elif action == "relabel":
        assert noise["num_noisy"] == unaudited["num_noisy"] - acted and noise["num_labels"] == 100
    else:
        assert (noise["num_noisy"], noise["num_labels"]) == (unaudited["num_noisy"], 100)
        assert 0 < record["mean_weight_before"] < 1


def test_weights_of_one_change_no_bit(recipe_path: Path, tmp_path: Path) -> None:
    """A run whose audit doubts nothing is the run without an audit, but for its recipe."""
    shards = open_shards(recipe_path.parent / "generated")
    audit = write_sidecar(tmp_path / "audit", shards, np.ones(len(shards)))
    weighted = [f"data.generated.audit={{scores: {audit}, action: weight}}", f"run_dir={tmp_path / 'one'}"]
    one = train(load_recipe(recipe_path, weighted))
    assert digest(one) == digest(train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'two'}"])))


@pytest.mark.parametrize("extra", [["train.accumulate=2"], ["objective.name=trades_ikl"], ["objective.name=mart", "awp.gamma=0.01", "awp.warmup_epochs=0"], ["objective.name=natural", "data.augment.cutmix=0.5"], ["data.loader=webdataset"]])  # fmt: skip
@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_weights_reach_every_kind_of_step(recipe_path: Path, audit: Path, tmp_path: Path, extra: list[str]) -> None:
    """Micro-batches, class means, perturbed weights, CutMix and the other loader: weights change what is trained."""
    short = [*extra, "train.max_steps=3"]
    one = train(load_recipe(recipe_path, options(audit, "weight", tmp_path / "one", *short)))
    two = train(load_recipe(recipe_path, [*short, f"run_dir={tmp_path / 'two'}"]))
    assert digest(one) != digest(two)


def test_other_scores_are_refused(recipe_path: Path, audit: Path, tmp_path: Path) -> None:
    """A run is not resumed with other scores in the same folder, with another action, or without one."""
    mine = shutil.copytree(audit, tmp_path / "mine")
    given = options(mine, "drop", tmp_path / "run")
    run = train(load_recipe(recipe_path, [*given, "train.max_steps=2"]))
    manifest = mine / "scores" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    with pytest.raises(UserError, match=r"began with other scores of an audit than data\.real\.audit\.scores has now"):
        train(load_recipe(recipe_path, given))
    with pytest.raises(UserError, match=r"data\.real\.audit\.action is drop there and weight here"):
        train(load_recipe(recipe_path, options(mine, "weight", run)))
    with pytest.raises(UserError, match=r"data\.real\.audit\.scores is .*mine there and None here"):
        train(load_recipe(recipe_path, [f"run_dir={run}"]))


def test_a_plain_recipe_keeps_its_identity(recipe_path: Path) -> None:
    """Runs from before the key resume."""
    recipe = load_recipe(recipe_path)
    lines = to_yaml(recipe).splitlines(keepends=True)
    inside, former = False, ""
    for line in lines:
        inside = line.strip() == "audit:" or (inside and line.strip().split(":")[0] in ("scores", "action", "below"))
        former += "" if inside else line
    path = recipe_path.parent / "before_audits.yaml"
    path.write_text(former)
    assert former.count("\n") == len(lines) - 8 and load_recipe(path).identity == recipe.identity


def test_report_and_card_say_it(recipe_path: Path, audit: Path, tmp_path: Path) -> None:
    """Both have the sentence of the log, and a release has no path of this machine."""
    run = train(load_recipe(recipe_path, options(audit, "drop", tmp_path / "run", "train.epochs=1")))
    acted = RunFolder(run).data.read_text()
    number = json.loads(acted)["real"]["audit"]["num_acted"]
    sentence = (
        f"{number} of 100 real training samples dropped: labels that are right with an estimated probability below 0.5"
    )
    report_cli.main([str(run)])
    assert sentence in (run / "report.html").read_text()
    release = bundle.release(run, tmp_path / "release", unevaluated=True)
    assert f"* label audit: {sentence} (audit 0123456789abcdef)" in (release / "README.md").read_text()
    assert str(tmp_path) not in (release / "recipe.yaml").read_text() + (release / "data.json").read_text()


def test_what_is_wrong_is_said_before_a_run_begins(recipe_path: Path, audit: Path, tmp_path: Path) -> None:
    """Other noise than the audited one, and a mistyped key: no run folder."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"^The scores .* are of other labels: the audit read them with the noise"):
        train_cli.main([str(recipe_path), *options(audit, "drop", run), "data.real.noise.seed=1"])
    with pytest.raises(UserError, match=r"unknown key 'data\.real\.audit\.belov'"):
        train_cli.main([str(recipe_path), "data.real.audit.belov=0.3", f"run_dir={run}"])
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["drop", "weight"])
def test_two_processes_train_as_one(recipe_path: Path, audit: Path, tmp_path: Path, action: str) -> None:
    """The same samples and weights: the losses of all epochs agree up to rounding."""
    result = torchrun([str(recipe_path), *options(audit, action, tmp_path / "two")])
    assert result.returncode == 0, result.stderr
    one = train(load_recipe(recipe_path, options(audit, action, tmp_path / "one")))
    losses = [
        [row["loss"] for row in RunFolder(run).read_metrics() if "loss" in row] for run in (one, tmp_path / "two")
    ]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (one / "data.json").read_bytes() == (tmp_path / "two" / "data.json").read_bytes()
