"""An audit from shards to audit.json: what it finds, that it resumes, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.audit import __main__ as cli
from nrat_scale.audit import hold_out as hold_out_check
from nrat_scale.audit import predictors
from nrat_scale.audit.api import audit
from nrat_scale.audit.audited_labels import parse_noise
from nrat_scale.audit.hold_out import check_hold_out
from nrat_scale.audit.probabilities import Probabilities
from nrat_scale.core.errors import UserError
from nrat_scale.data.audit_scores import read_audit_scores
from nrat_scale.data.shards import open_shards
from nrat_scale.data.source import noisy_labels
from nrat_scale.labels import NoiseSpec
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.runs import make_shards

NOISE = NoiseSpec(kind="symmetric", rate=0.2, seed=0)


def _unchanged(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- what an audit finds ----------------------------------------------------------------------------------------------


def test_known_noise_is_found(finished, data):
    """The corrected rate is within 4 points of 20 %, its interval holds the truth, and the suspects are the wrong labels."""
    corrected, truth = finished.content["corrected"], finished.content["injected"]["rate"]
    assert truth == pytest.approx(0.2)
    assert corrected["identified"]
    assert corrected["rate"] == pytest.approx(truth, abs=0.04)
    assert corrected["interval"][0] <= truth <= corrected["interval"][1]
    assert finished.rate == corrected["rate"]
    found = finished.content["measured_truth"]
    assert found["precision"] > 0.8
    assert found["recall"] > 0.8
    assert np.sum(corrected["joint"]) == pytest.approx(1)
    assert "wrong labels" in str(finished)


def test_sidecar_has_the_labels_that_training_sees(finished, data):
    """`given` is what the recipe's noise gives; the sidecar fits these shards with this noise and no other labels."""
    shards = open_shards(data)
    given, clean = noisy_labels(shards, NOISE)
    scores = read_audit_scores(finished.path)
    np.testing.assert_array_equal(scores.given, given)
    np.testing.assert_array_equal(scores.ids, shards.source_ids(np.arange(len(shards))))
    scores.check_fits(shards, given)
    with pytest.raises(UserError, match="of other labels"):
        scores.check_fits(shards)
    assert scores.manifest["audit"] == finished.content["audit"]
    assert scores.quality[given == clean].mean() > scores.quality[given != clean].mean() + 0.5


def test_every_image_is_predicted_by_a_model_that_did_not_train_on_it(finished, data):
    """The two folds exclude all ids between them, none twice, and each run excluded those of its fold."""
    folds = [np.load(finished.path / "folds" / f"fold-{number}.ids.npy") for number in range(2)]
    assert sorted(np.concatenate(folds).tolist()) == list(range(600))
    for number, ids in enumerate(folds):
        record = json.loads((finished.path / "folds" / f"fold-{number}" / "data.json").read_text())
        assert record["real"]["num_excluded"] == len(ids)


def test_plain_estimate_without_a_hold_out(data, finished, tmp_path, overrides):
    """Without a hold-out the note says that the estimate includes the classifier's errors."""
    shutil.copytree(finished.path, tmp_path / "same")
    # The folds name their excluded images by path, so that a copy is another recipe: the default folder is used anew.
    found = audit(data, folds=2, out=finished.path, noise=NOISE, bootstrap=100, overrides=overrides)
    assert found.content["corrected"] is None
    assert found.rate == found.content["plain"]["rate"]
    assert "includes the classifier's own errors" in found.content["notes"][0]
    shutil.rmtree(finished.path)
    shutil.copytree(tmp_path / "same", finished.path)


# ---- interruption -----------------------------------------------------------------------------------------------------


def test_resumes_by_fold_and_by_shard(data, hold_out, finished, tmp_path, overrides, monkeypatch):
    """Interrupted after the first fold and again after the first shard, it ends with the same scores and trains no fold twice."""
    out = tmp_path / "resumed"
    options = {"clean_holdout": hold_out, "noise": NOISE, "bootstrap": 200, "overrides": overrides}
    train, trained = predictors.train, []

    def interrupted(recipe):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(recipe.run_dir)
        return train(recipe)

    monkeypatch.setattr(predictors, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit(data, folds=2, out=out, **options)
    before = (out / "folds" / "fold-0" / "metrics.jsonl").stat().st_mtime_ns
    assert not (out / "audit.json").exists()
    with pytest.raises(UserError, match="not complete"):
        read_audit_scores(out)

    monkeypatch.setattr(predictors, "train", train)

    def stop(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Probabilities, "predict", stop)
        with pytest.raises(KeyboardInterrupt):
            audit(data, folds=2, out=out, **options)
    found = audit(data, folds=2, out=out, **options)
    assert (out / "folds" / "fold-0" / "metrics.jsonl").stat().st_mtime_ns == before
    ours, theirs = read_audit_scores(out), read_audit_scores(finished.path)
    np.testing.assert_array_equal(ours.quality, theirs.quality)
    assert found.content["audit"] == finished.content["audit"]


def test_damaged_probabilities_are_refused(data, hold_out, tmp_path, overrides):
    """A file of probabilities that sums to 2 is named, with the way out; nothing half-written is left."""
    out = tmp_path / "damaged"
    options = {"noise": NOISE, "bootstrap": 100, "overrides": {**overrides, "train.epochs": 1}}
    audit(data, folds=2, out=out, **options)
    path = next((out / "probabilities").iterdir())
    np.save(path, 2 * np.load(path))
    with pytest.raises(UserError, match=r"does not hold probabilities. Remove it"):
        audit(data, folds=2, out=out, **options)
    path.write_bytes(path.read_bytes()[:100])  # cut off: predicted again
    audit(data, folds=2, out=out, **options)
    assert not list(out.glob(".*"))


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"noise": "symmetric:0.2:1"}, "other noise"),
        ({"folds": 3}, "another number of folds"),
        ({"seed": 1}, "another seed"),
        ({"overrides": {"optim.lr": 0.01}}, "another recipe of the folds"),
    ],
)
def test_folder_of_another_audit_is_kept(data, finished, overrides, changed, name):
    """Other settings need another folder; the audit there is not touched."""
    before = _unchanged(finished.path)
    settings = {"folds": 2, "noise": NOISE, "overrides": overrides} | changed
    with pytest.raises(UserError, match=f"holds an audit with {name}"):
        audit(data, out=finished.path, **settings)
    assert _unchanged(finished.path) == before


def test_foreign_folder_is_not_touched(data, tmp_path):
    """A folder with something else in it is refused."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no audit; nothing in it was touched"):
        audit(data, folds=2, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def _classes(folder: Path, labels: list[int]) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 8, 8, 1)).astype(np.uint8)
    return write_shards(LabelledArrays(images, np.array(labels), "custom", ("a", "b", "c")), folder, progress=False)


@pytest.mark.parametrize(
    ("labels", "match"),
    [([0, 1] * 20, "No image of .* has the label 'c'"), ([0, 1] * 20 + [2, 2], "The class 'c' of .* has 2 images")],
)
def test_classes_that_cannot_be_audited(tmp_path, labels, match):
    """An empty class, and one with fewer images than folds."""
    with pytest.raises(UserError, match=match):
        audit(_classes(tmp_path / "shards", labels), folds=3, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_class(tmp_path):
    """With one class no label can be wrong; it is refused before any training."""
    images = np.zeros((40, 8, 8, 1), np.uint8)
    shards = write_shards(LabelledArrays(images, np.zeros(40, int), "custom", ("a",)), tmp_path / "one", progress=False)
    with pytest.raises(UserError, match="has one class, so that no label can be wrong"):
        audit(shards, folds=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overlap_with_data_larger_than_the_compared_sample(data, tmp_path, monkeypatch):
    """Of large data a sample is compared: the share of the hold-out in it is scaled to all of the data."""
    stored = open_shards(data)
    again = LabelledArrays(stored.images(np.arange(500)), stored.labels(np.arange(500)), "digits", stored.class_names)
    part = open_shards(write_shards(again, tmp_path / "part", block_size=7, progress=False))
    fresh = open_shards(make_shards(tmp_path / "fresh", 500, 9, dataset="digits"))
    monkeypatch.setattr(hold_out_check, "_COMPARED", 60)  # about 5 of 60 are found in the 60 of 600 images
    check_hold_out(fresh, stored)
    monkeypatch.setattr(hold_out_check, "_MOST_SHARED", 0.3)
    with pytest.raises(UserError, match=r"overlaps .* of 60 compared images"):
        check_hold_out(part, stored)


def test_hold_out_must_be_other_images_of_the_same_classes(data, tmp_path):
    """The data themselves, a copy in other shards, other shapes and other classes are refused before any training."""
    copy = make_shards(tmp_path / "copy", 600, 0, dataset="other")
    part = open_shards(copy)
    again = LabelledArrays(part.images(np.arange(300)), part.labels(np.arange(300)), "digits", part.class_names)
    subset = write_shards(again, tmp_path / "subset", block_size=7, progress=False)
    larger = make_shards(tmp_path / "larger", 50, 2, size=16)
    cases = {
        data: "shares shards with",
        copy: "shares shards with|overlaps",
        subset: "overlaps .*300 of 300 compared images",
        larger: "images of shape",
        _classes(tmp_path / "classes", [0, 1, 2]): "images of shape|other classes",
    }
    for folder, match in cases.items():
        with pytest.raises(UserError, match=match):
            audit(data, folds=2, clean_holdout=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_must_not_have_seen_the_images(data, hold_out, finished, tmp_path):
    """A fold's run saw these shards; of the hold-out's shards it saw none, so that it can audit them."""
    run = finished.path / "folds" / "fold-0"
    with pytest.raises(UserError, match=r"was trained on .*Give a model that never saw"):
        audit(data, model=run, out=tmp_path / "out")
    found = audit(hold_out, model=run, checkpoint="last", out=tmp_path / "out", bootstrap=100)
    assert found.content["method"]["models"][0]["fold"] is None
    assert found.content["data"]["num_images"] == 300


def test_model_must_not_have_seen_the_hold_out(data, hold_out, finished, tmp_path):
    """A model makes fewer errors on its training data: as a hold-out they would leave errors in the corrected rate."""
    run = finished.path / "folds" / "fold-0"
    options = {"model": run, "checkpoint": "last", "out": tmp_path / "out", "bootstrap": 100}
    with pytest.raises(UserError, match=r"--clean-holdout .* was trained on .* Give a hold-out that it never saw"):
        audit(hold_out, clean_holdout=data, **options)
    assert not (tmp_path / "out").exists()
    other = make_shards(tmp_path / "other", 200, 4, dataset="digits")
    assert audit(hold_out, clean_holdout=other, **options).content["corrected"] is not None


def test_model_without_a_record_needs_unseen(hold_out, finished, tmp_path):
    """A run that does not say what it was trained on is refused, unless the user says that it never saw the images."""
    run = tmp_path / "run"
    shutil.copytree(finished.path / "folds" / "fold-0", run)
    (run / "data.json").unlink()
    with pytest.raises(UserError, match=r"no record of its training data. If it has never seen .* --unseen"):
        audit(hold_out, model=run, out=tmp_path / "out")
    assert audit(hold_out, model=run, unseen=True, out=tmp_path / "out", bootstrap=100).rate < 0.5


def test_scores_of_another_model_version(data, hold_out, finished, tmp_path):
    """An audit of one model is not continued with other weights."""
    runs = [finished.path / "folds" / f"fold-{number}" for number in range(2)]
    audit(hold_out, model=runs[0], out=tmp_path / "out", bootstrap=100)
    with pytest.raises(UserError, match="holds an audit with other weights of the model"):
        audit(hold_out, model=runs[1], out=tmp_path / "out", bootstrap=100)


@pytest.mark.parametrize(
    "noise", ["symmetric", "symmetric:much:0", "symmetric:0.2:0:1", "none of it", "symetric:0.2:0"]
)
def test_noise_that_is_none(data, noise, tmp_path):
    """--noise is KIND:RATE:SEED; a mistyped kind names the nearest."""
    with pytest.raises(UserError, match="--noise") as error:
        audit(data, folds=2, noise=noise, out=tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1


def test_noise_of_the_recipe(data, tmp_path, overrides):
    """The recipe's noise is injected if its shards are these; a recipe of other shards must be overruled."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "objective: {name: natural}\nthreat: {eps: 0.0, step: 0.0, num_steps: 0}\nmodel: {name: cnn4}\n"
        f"data: {{real: {{shards: {data}, noise: {{kind: symmetric, rate: 0.3, seed: 5}}}}}}\n"
    )
    options = {"folds": 2, "overrides": {**overrides, "train.epochs": 1}, "bootstrap": 100}
    found = audit(data, recipe=recipe, out=tmp_path / "out", **options)
    assert found.content["noise"] == {"kind": "symmetric", "rate": 0.3, "seed": 5}
    other = make_shards(tmp_path / "other", 100, 3)
    with pytest.raises(UserError, match="does not say which labels to audit"):
        audit(other, recipe=recipe, out=tmp_path / "other-audit", **options)


def test_noise_without_a_published_map(hold_out, tmp_path):
    """--noise has no class map: the message says where it comes from."""
    other = make_shards(tmp_path / "shards", 100, 3, dataset="fashion_mnist")
    with pytest.raises(UserError, match=r"No asymmetric noise map .* from the recipe of --recipe"):
        audit(other, folds=2, noise="asymmetric:0.2:0", out=tmp_path / "out")


def test_some_shards_of_a_folder(tmp_path, overrides):
    """An address of some shards is audited and trained on as such, not the whole folder."""
    folder = tmp_path / "shards"
    make_shards(folder, 300, 0, shard_size=100)
    part = f"{folder}/shard-{{00000..00001}}.tar"
    found = audit(part, folds=2, out=tmp_path / "out", overrides={**overrides, "train.epochs": 1}, bootstrap=100)
    assert found.content["data"]["num_images"] < 300
    record = json.loads((tmp_path / "out" / "folds" / "fold-0" / "data.json").read_text())
    assert record["real"]["fingerprint"] == found.content["data"]["fingerprint"]
    read_audit_scores(found.path).check_fits(open_shards(part))


@pytest.mark.slow
def test_two_processes_predict_the_same(hold_out, finished, tmp_path):
    """Under torchrun each process predicts its shards; probabilities and scores have the bits of one process."""
    several = make_shards(tmp_path / "several", 300, 5, shard_size=64)
    run = finished.path / "folds" / "fold-0"
    audit(several, model=run, checkpoint="last", unseen=True, out=tmp_path / "one", bootstrap=100)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "nrat_scale.audit"]
    options = ["--model", run, "--checkpoint", "last", "--unseen", "--out", tmp_path / "two", "--bootstrap", "100"]
    done = subprocess.run([*command, several, *options], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrong labels" in done.stdout or "confident learning" in done.stdout
    assert len(list((tmp_path / "two" / "probabilities").iterdir())) >= 4
    for name in ("probabilities", "scores"):
        ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / out / name).iterdir()} for out in ("one", "two"))
        assert ours == theirs


def test_command_line_options(data, capsys, tmp_path):
    """What contradicts is refused with one sentence."""
    for words, match in {
        ("--folds", "1"): "--folds is 1; it must be at least 2",
        ("--model", "runs/x", "--folds", "2"): "Give one of the two",
        ("--model", "nothing"): "There is no nothing here",
        ("--clean-holdout", "nothing"): "no shards of --clean-holdout at nothing",
        ("--noise", "cifar10n:0:0"): "needs data.real.noise.human_labels",
        ("--noise", "symmetric:1.5:0"): "--noise 'symmetric:1.5:0'.* in .0, 1.",
        ("--bootstrap", "3"): "--bootstrap is 3",
        ("--seed", "-1"): "--seed is -1; it must be 0 or more",
        ("--noise", "matrix::0"): "is not KIND:RATE:SEED",
        ("model.kwargs={",): "model.kwargs",
        ("run_dir=x",): "The audit sets run_dir for each fold",
        ("data.real.noise.rate=0.5",): "The audit sets data.real.noise.rate",
        ("no.such=1",): "unknown key",
    }.items():
        with pytest.raises(UserError, match=match):
            cli.main([str(data), *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_noise_by_a_matrix():
    """`matrix:FILE:SEED` names the file of a transition matrix; without a seed it is 0, and a colon may be in the name."""
    for text, path, seed in (
        ("matrix:m.json:3", "m.json", 3), ("matrix:m.json", "m.json", 0), ("matrix:a:b.csv:-1", "a:b.csv", -1),
    ):  # fmt: skip
        noise = parse_noise(text)
        assert (noise.kind, noise.matrix, noise.seed, noise.rate) == ("matrix", path, seed, 0.0)
