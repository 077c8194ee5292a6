"""Training acts on an audit: dropped samples are no samples, suggested labels replace given ones, weights have mean 1."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.data.spec import AuditSpec, DataSpec, GeneratedAuditSpec, ValidationSpec
from nrat_scale.data.training_data import TrainingData, open_training_data
from nrat_scale.labels import GeneratedNoiseSpec, corrupt
from tests.support.numbered_shards import columns
from tests.support.sidecars import write_sidecar

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.usefixtures("collected"),
]  # of webdataset
CPU = torch.device("cpu")
Make = Callable[..., DataSpec]


@pytest.fixture
def make(spec: DataSpec, tmp_path: Path) -> Make:
    """`make(action, below)`: the recipe's data with an action on the generated images, whose quality is their id / 310."""

    def made(action: str, below: float = 0.329, **changes: Any) -> DataSpec:
        shards = open_shards(str(spec.generated.shards))
        quality = shards.source_ids(np.arange(len(shards))) / 310
        folder = write_sidecar(tmp_path / "audit", shards, quality, suggested=(shards.labels(np.arange(310)) + 3) % 10)
        audit = GeneratedAuditSpec(str(folder), action, below)
        return replace(spec, generated=replace(spec.generated, audit=audit), **changes)

    return made


def generated_ids(data: TrainingData, start: int, stop: int, **options: Any) -> list[int]:
    seen = columns(data.batches(start, stop, **options))
    return seen["ids"][seen["generated"]].tolist()


# ---- drop -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"loader": "webdataset"}, {"resident": "always"}])
def test_dropped_samples_are_no_samples(make: Make, options: dict[str, Any]) -> None:
    """Every pass has each sample that is left once and no dropped one, with all loaders; ids below 102 are dropped."""
    data = open_training_data(make("drop", **options), 0)
    data.place_images(CPU)
    left = set(range(102, 310))
    assert len(data.sources[1]) == len(left) == 208
    passes = generated_ids(data, 0, 26)  # 16 of every batch are generated: 13 batches are a pass
    assert sorted(passes[:208]) == sorted(passes[208:]) == sorted(left)
    assert "webdataset" in options.values() or passes == generated_ids(data, 0, 10) + generated_ids(data, 10, 26)


def test_the_plan_is_that_of_shards_without_the_samples(make: Make, spec: DataSpec, tmp_path: Path) -> None:
    """Dropping and `exclude` of the same ids give the same batches; the real source and the epoch do not change."""
    np.save(tmp_path / "ids.npy", np.arange(102))
    excluded = replace(spec, generated=replace(spec.generated, exclude=str(tmp_path / "ids.npy")))
    one, two = open_training_data(make("drop"), 0), open_training_data(excluded, 0)
    for name, column in columns(one.batches(0, 30)).items():
        assert torch.equal(column, columns(two.batches(0, 30))[name]), name
    assert one.steps_per_epoch == two.steps_per_epoch == open_training_data(spec, 0).steps_per_epoch
    halves = [columns(one.batches(0, 30, rank, 2)) for rank in range(2)]
    assert sorted(torch.cat([half["ids"] for half in halves]).tolist()) == sorted(
        columns(one.batches(0, 30))["ids"].tolist()
    )


def test_an_epoch_is_as_long_as_what_is_left(spec: DataSpec, tmp_path: Path) -> None:
    """Without `epoch_samples` an epoch has the real samples that are left, and the held-out images stay the same."""
    shards = open_shards(str(spec.real.shards))
    plain = open_training_data(spec, 0)
    given = plain.sources[0].given
    assert given is not None
    quality = np.where(np.arange(130) % 2, 0.9, 0.1)
    folder = write_sidecar(tmp_path / "audit", shards, quality, given=given, noise={"kind": "symmetric"})
    data = open_training_data(replace(spec, real=replace(spec.real, audit=AuditSpec(str(folder)))), 0)
    held_out = plain.sources[0].held_out
    assert np.array_equal(data.sources[0].held_out, held_out)
    left = 65 - int((held_out % 2 == 1).sum())
    assert data.epoch_samples == len(data.sources[0]) == left and data.steps_per_epoch == -(-left // 24)
    one, two = plain.validation(), data.validation()
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    record = data.describe()["real"]["audit"]
    assert record["num_trained"] == left and record["num_acted"] == 100 - left == sum(record["acted_by_class"])


# ---- relabel ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["indexed", "webdataset"])
def test_suggested_labels_replace_given_ones(make: Make, spec: DataSpec, loader: str) -> None:
    """After injected noise; the clean labels stay, the held-out images keep their labels, and no sample is lost."""
    noise = GeneratedNoiseSpec("symmetric", 0.3, seed=2)
    shards = open_shards(str(spec.generated.shards))
    order = shards.in_source_order()
    stored = shards.labels(order)
    given = np.empty(310, np.int64)
    given[order] = corrupt(stored, "symmetric", 0.3, 2, 10)
    made = make("relabel", loader=loader)
    folder = Path(str(made.generated.audit.scores))
    quality = shards.source_ids(np.arange(310)) / 310
    write_sidecar(folder, shards, quality, given=given, suggested=(given + 3) % 10, noise={"kind": "symmetric"})
    held_out = ValidationSpec(source="generated", size=40)
    data = open_training_data(replace(made, generated=replace(made.generated, noise=noise), validation=held_out), 0)
    seen = columns(data.batches(0, 30))
    ids, labels = (seen[name][seen["generated"]].numpy() for name in ("ids", "labels"))
    noisy = corrupt(stored, "symmetric", 0.3, 2, 10)
    assert np.array_equal(labels, np.where(ids < 102, (noisy[ids] + 3) % 10, noisy[ids]))
    assert np.array_equal(seen["clean_labels"][seen["generated"]].numpy(), stored[ids])
    assert len(data.sources[1]) == 270
    validated = data.validation()
    at = data.sources[1].shards.source_ids(data.sources[1].held_out)
    assert np.array_equal(validated.labels.numpy(), noisy[at])


def test_a_label_without_a_better_one_is_kept(spec: DataSpec, tmp_path: Path) -> None:
    """Only labels for which another class is suggested count as relabelled."""
    shards = open_shards(str(spec.generated.shards))
    stored = shards.labels(np.arange(310))
    suggested = np.where(np.arange(310) < 5, (stored + 1) % 10, stored)
    folder = write_sidecar(tmp_path / "audit", shards, np.full(310, 0.1), suggested=suggested)
    audit = GeneratedAuditSpec(str(folder), "relabel")
    data = open_training_data(replace(spec, generated=replace(spec.generated, audit=audit)), 0)
    record = data.describe()["generated"]["audit"]
    assert (record["num_acted"], record["num_trained"]) == (5, 310)


# ---- weight -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"loader": "webdataset"}, {"resident": "always"}])
def test_weights_have_mean_one(make: Make, options: dict[str, Any]) -> None:
    """A doubted label weighs its quality and others 1, divided by the mean; real images, without an audit, weigh 1."""
    data = open_training_data(make("weight", **options), 0)
    data.place_images(CPU)
    quality = np.arange(310) / 310
    expected = np.where(quality < 0.329, quality, 1.0)
    for batch in data.batches(0, 20):
        weights = data.loss_weights(batch, CPU)
        assert weights is not None
        ids = batch.ids[batch.generated].numpy()
        assert np.allclose(weights[batch.generated].numpy(), (expected / expected.mean())[ids], atol=1e-5)
        assert (weights[~batch.generated] == 1).all()
    source = data.sources[1]
    assert abs(float(source.weights(source.positions(np.arange(len(source)))).mean()) - 1) < 1e-6
    assert len(source) == 310


def test_unweighted_batches_have_no_weights(make: Make, spec: DataSpec) -> None:
    """Without the action, and with another one, nothing is multiplied."""
    for chosen in (spec, make("drop"), make("relabel")):
        data = open_training_data(chosen, 0)
        batch = next(iter(data.batches(0, 1)))
        assert batch.weights is None and data.loss_weights(batch, CPU) is None


def test_cutmix_mixes_weights_by_area(make: Make) -> None:
    """The cross-entropy of a mixed image is the sum of its parts' weighted ones; without weights labels mix by area alone."""
    spec = make("weight", below=1.0)
    spec = replace(spec, augment=replace(spec.augment, cutmix=0.8))
    data = open_training_data(spec, 0)
    plain = open_training_data(replace(spec, generated=replace(spec.generated, audit=GeneratedAuditSpec())), 0)
    for batch, other in zip(data.batches(0, 3), plain.batches(0, 3), strict=True):
        weights, (x, y) = data.loss_weights(batch, CPU), data.augmented(batch, CPU)
        images, by_area = plain.augmented(other, CPU)
        assert batch.partners is not None and batch.weights is not None and weights is not None
        partner = batch.partners.weights
        assert partner is not None and torch.equal(x, images)
        own = by_area.gather(1, batch.labels[:, None]).squeeze(1)
        differ = batch.labels.ne(batch.partners.labels)
        first = torch.nn.functional.one_hot(batch.labels, 10) * (own * batch.weights)[:, None]
        second = torch.nn.functional.one_hot(batch.partners.labels, 10) * ((1 - own) * partner)[:, None]
        assert torch.allclose((weights[:, None] * y)[differ], (first + second)[differ], atol=1e-5)
        assert torch.allclose(y.sum(1), torch.ones(24), atol=1e-5)


# ---- mistakes ---------------------------------------------------------------------------------------------------------------


def test_scores_of_something_else(make: Make, spec: DataSpec, tmp_path: Path) -> None:
    """Other shards, other labels, another version, a changed array and half an audit: one sentence that names the key."""
    key = r"\(data\.generated\.audit\.scores\)"
    made = make("drop")
    out = Path(str(made.generated.audit.scores)) / "scores"
    noisy = replace(made, generated=replace(made.generated, noise=GeneratedNoiseSpec("symmetric", 0.3)))
    with pytest.raises(UserError, match=rf"{key} are of other labels: .* as stored"):
        open_training_data(noisy, 0)
    with pytest.raises(UserError, match=r"are of other shards than .*an audit of 310 images"):
        open_training_data(replace(spec, real=replace(spec.real, audit=AuditSpec(str(out.parent)))), 0)
    manifest = (out / "manifest.json").read_text()
    for content, message in (
        (manifest.replace('"version": 1', '"version": 2'), rf"{key} have version '2'; this program reads version 1"),
        (manifest.replace("nrat_scale.audit_scores", "other"), "is not that of an audit's scores"),
        (manifest[:-9], "damaged"),
    ):
        (out / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_training_data(made, 0)
    (out / "manifest.json").write_text(manifest)
    content = bytearray((out / "quality.npy").read_bytes())
    content[-1] ^= 1
    (out / "quality.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"quality\.npy does not match its size and sha256"):
        open_training_data(made, 0)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="the audit there is not complete"):
        open_training_data(made, 0)
    audit = GeneratedAuditSpec(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="there is no such folder"):
        open_training_data(replace(spec, generated=replace(spec.generated, audit=audit)), 0)


def test_an_action_that_leaves_nothing(spec: DataSpec, tmp_path: Path) -> None:
    """An emptied class is named, and all-zero weights are refused."""
    shards = open_shards(str(spec.generated.shards))
    stored = shards.labels(np.arange(310))
    qualities = {
        "drop": np.where(stored == 4, 0.1, 0.9),
        "relabel": np.where(stored == 4, 0.1, 0.9),
        "weight": stored * 0.0,
    }
    messages = {
        "drop": "drops all 31 generated training images labelled '4'",
        "relabel": "relabels all 31",
        "weight": "the weight 0",
    }
    for action, quality in qualities.items():
        folder = write_sidecar(tmp_path / action, shards, quality)
        audit = GeneratedAuditSpec(str(folder), action)
        with pytest.raises(UserError, match=messages[action]):
            open_training_data(replace(spec, generated=replace(spec.generated, audit=audit)), 0)
    manifest = json.loads((tmp_path / "drop" / "scores" / "manifest.json").read_text())
    assert manifest["num_images"] == 310, "nothing of the sidecar is written to"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "x", "action": "dropp"}, "data.real.audit.action is 'dropp'. Did you mean 'drop'"),
        ({"scores": "x", "below": 0.0}, r"data.real.audit.below is 0.0; it must be in \(0, 1\]"),
        ({"scores": "x", "below": 1.5}, "below is 1.5"),
        ({"scores": ""}, "data.real.audit.scores is ''"),
        ({"action": "weight"}, "has an action but no scores"),
        ({"below": 0.2}, "has an action but no scores"),
    ],
)
def test_bad_keys(options: dict[str, Any], message: str) -> None:
    """A wrong value is named with its key."""
    with pytest.raises(UserError, match=message):
        AuditSpec(**options)


def test_scores_without_their_source(spec: DataSpec) -> None:
    """Scores of a source that is not trained on are refused."""
    with pytest.raises(UserError, match=r"data\.generated\.audit\.scores is set, but data\.generated\.shards is not"):
        replace(spec.generated, shards=None, audit=GeneratedAuditSpec("x"))
