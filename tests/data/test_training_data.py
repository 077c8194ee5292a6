"""Training data of a recipe: validation labels, and data that do not fit together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.data.spec import DataSpec, GeneratedSpec, ValidationSpec
from nrat_scale.data.training_data import open_training_data
from nrat_scale.labels import GeneratedNoiseSpec, NoiseSpec, corrupt
from tests.support.numbered_shards import numbered_shards


def test_validation_labels(spec: DataSpec) -> None:
    """`given` includes the noise, `clean` does not; generated images have no clean labels."""
    given_labels = open_training_data(spec, 0).validation()
    clean = open_training_data(replace(spec, validation=replace(spec.validation, labels="clean")), 0).validation()
    assert torch.equal(given_labels.images, clean.images)
    assert not torch.equal(given_labels.labels, clean.labels)
    assert given_labels.clean_labels is not None
    assert torch.equal(given_labels.clean_labels, clean.labels)
    generated = replace(spec, validation=ValidationSpec(source="generated", size=30))
    assert open_training_data(generated, 0).validation().clean_labels is None


def test_generated_labels_can_be_noisy(spec: DataSpec) -> None:
    """The same pure function as for real labels, over the whole set; the labels of generation are the clean ones."""
    noise = GeneratedNoiseSpec("symmetric", 0.3, seed=5)
    noisy = replace(spec, generated=replace(spec.generated, noise=noise))
    source = open_training_data(noisy, 0).sources[1]
    assert source.given is not None and source.clean is not None
    order = source.shards.in_source_order()
    stored = source.shards.labels(order)
    assert np.array_equal(source.clean[order], stored)
    assert np.array_equal(source.given[order], corrupt(stored, "symmetric", 0.3, 5, 10))
    plain = open_training_data(spec, 0)
    assert plain.sources[1].given is None and plain.sources[1].clean is None
    batches = list(open_training_data(noisy, 0).batches(0, 9))
    for batch, usual in zip(batches, plain.batches(0, 9), strict=True):
        assert torch.equal(batch.ids, usual.ids) and torch.equal(batch.images, usual.images)
        assert torch.equal(batch.labels[~batch.generated], usual.labels[~batch.generated])
        assert torch.equal(batch.clean_labels[batch.generated], usual.labels[batch.generated])
        assert (usual.clean_labels[batch.generated] == -1).all()
    wrong = torch.cat([batch.labels.ne(batch.clean_labels)[batch.generated] for batch in batches])
    assert 0.1 < wrong.float().mean() < 0.5
    held_out = replace(noisy, validation=ValidationSpec(source="generated", size=30, labels="clean"))
    clean = open_training_data(held_out, 0).validation()
    assert clean.clean_labels is not None and torch.equal(clean.labels, clean.clean_labels)


def test_the_description_tells_noisy_generated_labels_apart(spec: DataSpec) -> None:
    """data.json of a run without generated noise is as before; with it, it has a hash of the labels."""
    noise = GeneratedNoiseSpec("symmetric", 0.3)
    plain, noisy, other = (
        open_training_data(replace(spec, generated=replace(spec.generated, noise=chosen)), 0).describe()["generated"]
        for chosen in (GeneratedNoiseSpec(), noise, replace(noise, seed=1))
    )
    assert "given_labels_sha256" not in plain
    assert noisy.pop("given_labels_sha256") != other.pop("given_labels_sha256")
    assert noisy == plain == other


def test_noise_without_its_source(spec: DataSpec, capsys: pytest.CaptureFixture[str]) -> None:
    """Noise of generated labels without generated images is refused; that of real labels has a warning."""
    with pytest.raises(
        UserError, match=r"data\.generated\.noise\.kind is 'symmetric', but data\.generated\.shards is not"
    ):
        GeneratedSpec(noise=GeneratedNoiseSpec("symmetric", 0.3))
    alone = replace(spec, real=replace(spec.real, shards=None), validation=ValidationSpec(source="generated", size=30))
    open_training_data(alone, 0)
    assert "data.real.noise has no effect, because data.real.shards is not set." in capsys.readouterr().err


def test_shares_of_a_batch(spec: DataSpec) -> None:
    """The counts of the plan, not the nominal fraction."""
    assert replace(spec, batch_size=512).shares == {"real": 154 / 512, "generated": 358 / 512}
    assert replace(spec, batch_size=128).shares == {"real": 39 / 128, "generated": 89 / 128}
    assert replace(spec, generated=GeneratedSpec()).shares == {"real": 1.0}


def test_data_that_do_not_fit(spec: DataSpec, tmp_path: Path) -> None:
    """Other shapes, a noise kind without a map, too many processes: each has its message."""
    other = numbered_shards(tmp_path / "large", 90, size=9)
    with pytest.raises(UserError, match="image shape"):
        open_training_data(replace(spec, generated=GeneratedSpec(str(other))), 0)
    with pytest.raises(UserError, match=r"Give data\.real\.noise\.class_map"):
        open_training_data(replace(spec, real=replace(spec.real, noise=NoiseSpec("asymmetric", 0.2))), 0)
    generated = replace(spec.generated, noise=GeneratedNoiseSpec("asymmetric", 0.2))
    with pytest.raises(UserError, match=r"Give data\.generated\.noise\.class_map"):
        open_training_data(replace(spec, generated=generated), 0)
    with pytest.raises(UserError, match="is not divisible by 5 processes"):
        open_training_data(spec, 0).batches(0, 1, 0, 5)
