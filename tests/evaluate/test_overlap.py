"""Whether a model has seen some shards: by the record of a run, of its release, and of the weights that it started from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.data.spec import DataSpec, RealSpec, ValidationSpec
from nrat_scale.data.training_data import open_training_data
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate.overlap import POSSIBLE, SEEN, UNRECORDED, UNSEEN, training_overlap, with_initial_weights
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.release import bundle
from tests.support.run_folders import write_run

GOLDEN = Path(__file__).parents[1] / "golden" / "abbf399"
ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 4, "hidden": 16}), 10, 1, (0.3,), (0.3,))


def make(folder: Path, file: str, *, seed: int = 0, n: int = 60, of: int | None = None) -> Path:
    """Shards of `n` random images made from a file whose sha256 is `file`; `of` seeds other images of the same file."""
    images = np.random.default_rng(len(file) if of is None else of).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    labelled = LabelledArrays(
        images, np.arange(n) % 10, "digits", tuple("0123456789"), ({"name": "x", "sha256": file},)
    )
    return write_shards(labelled, folder, block_size=8, shard_size=16, seed=seed, progress=False)


def record(shards: Path, validation: Path | None = None) -> dict[str, Any]:
    spec = ValidationSpec(size=10, shards=None if validation is None else str(validation))
    return open_training_data(DataSpec(batch_size=4, real=RealSpec(str(shards)), validation=spec), 0).describe()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Shards that the run of `run` was trained on."""
    return make(tmp_path / "all" / "trained", "aaaa")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run", create("cnn4", ARGUMENTS), ARGUMENTS, 8, threat="eps: 0.1, step: 0.05")
    (folder / "data.json").write_text(json.dumps(record(trained)))
    return folder


def verdict(model: Path | str, shards: Path | str) -> str:
    return training_overlap(model, open_shards(shards)).verdict


def test_what_a_run_and_its_release_have_seen(run: Path, trained: Path, tmp_path: Path) -> None:
    """The same shards, some of them, a merged index that has them, and the same files prepared again count as seen."""
    release = bundle.release(run, tmp_path / "release", unevaluated=True)
    assert "data.json" in json.loads((release / "manifest.json").read_text())["files"]
    fingerprint = open_shards(trained).fingerprint
    assert f"(fingerprint `{fingerprint[:16]}`)" in (release / "README.md").read_text()
    other = make(tmp_path / "all" / "other", "bbbbbb")
    prepare_cli.main(["merge", str(trained), str(other), "--out", str(tmp_path / "all" / "index.json")])
    prepare_cli.main(["subset", str(trained), "--per-class", "2", "--out", str(tmp_path / "subset")])
    expected = {
        trained: SEEN,
        f"{trained}/shard-00001.tar": SEEN,
        tmp_path / "all": SEEN,
        make(tmp_path / "again", "aaaa", seed=5): SEEN,
        tmp_path / "subset": SEEN,
        make(tmp_path / "another_split", "aaaa", n=40, of=3): POSSIBLE,
        other: UNSEEN,
    }
    for shards, wanted in expected.items():
        assert verdict(run, shards) == verdict(release, shards) == wanted, shards
    assert (
        training_overlap(run, open_shards(tmp_path / "all")).reason
        == "was trained on 4 of these 8 shards (real images)"
    )


def test_images_that_selected_the_checkpoint_count(run: Path, trained: Path, tmp_path: Path) -> None:
    """Shards of data.validation.shards were not trained on, but the checkpoint was chosen by them."""
    apart = make(tmp_path / "apart", "cc")
    (run / "data.json").write_text(json.dumps(record(trained, apart)))
    found = training_overlap(run, open_shards(apart))
    assert found.verdict == SEEN and found.source == "validation" and "selected on" in found.reason


def test_initial_weights_bring_what_they_have_seen(run: Path, trained: Path, tmp_path: Path) -> None:
    """A run that starts from a release has seen its data too; one that starts from a weight file is not known."""
    release = bundle.release(run, tmp_path / "release", unevaluated=True)
    other = make(tmp_path / "other", "bbbbbb")
    (run / "data.json").write_text(json.dumps(with_initial_weights(record(other), str(release), None)))
    assert verdict(run, trained) == SEEN
    assert "by the weights that it started from" in training_overlap(run, open_shards(trained)).reason
    (run / "data.json").write_text(json.dumps(with_initial_weights(record(other), "weights.pt", None)))
    assert verdict(run, trained) == UNRECORDED and verdict(run, other) == SEEN


def test_models_without_a_record(run: Path, trained: Path, tmp_path: Path) -> None:
    """Releases of earlier versions, weight files and timm's models load, and nothing is known of their data."""
    for model in (GOLDEN / "release", "resnet18", "timm:resnet18", "somewhere/weights.pt"):
        assert verdict(model, trained) == UNRECORDED
    release = bundle.release(run, tmp_path / "release", unevaluated=True)
    unlisted = shutil.copytree(GOLDEN / "release", tmp_path / "unlisted")
    shutil.copy(release / "data.json", unlisted / "data.json")
    assert verdict(unlisted, trained) == UNRECORDED, "its manifest does not list the record"
    (release / "data.json").unlink()
    assert verdict(release, trained) == UNRECORDED
    (run / "data.json").write_text(json.dumps({"real": {"fingerprint": "0" * 64}}))  # of an earlier version
    assert verdict(run, trained) == POSSIBLE


def test_damaged_records(run: Path, trained: Path, tmp_path: Path) -> None:
    """A changed or malformed record is an error, never a verdict."""
    release = bundle.release(run, tmp_path / "release", unevaluated=True)
    (release / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"differs from its manifest\.json: data\.json does not match"):
        verdict(release, trained)
    entry = {"fingerprint": "0" * 64}
    for content in (
        {"real": 3},
        {"real": {}},
        {"real": {**entry, "shards_sha256": "aa", "files_sha256": []}},
        {"real": {**entry, "shards_sha256": [{}], "files_sha256": []}},
    ):
        (run / "data.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="damaged"):
            verdict(run, trained)


def test_evaluation_refuses_a_part_of_the_training_data(run: Path, trained: Path) -> None:
    """Some of the training shards have another fingerprint than all of them, and are refused all the same."""
    command = [str(run), "--data", f"{trained}/shard-00001.tar", "--attacks", "natural"]
    with pytest.raises(UserError, match=r"real training data: .* was trained on 1 of these 1 shards"):
        evaluate_cli.main(command)
