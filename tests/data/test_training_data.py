"""Training data of a recipe: validation labels, and data that do not fit together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.data.spec import DataSpec, GeneratedSpec, ValidationSpec
from nrat_scale.data.training_data import open_training_data
from nrat_scale.labels import NoiseSpec
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


def test_data_that_do_not_fit(spec: DataSpec, tmp_path: Path) -> None:
    """Other shapes, a noise kind without a map, too many processes: each has its message."""
    other = numbered_shards(tmp_path / "large", 90, size=9)
    with pytest.raises(UserError, match="image shape"):
        open_training_data(replace(spec, generated=GeneratedSpec(str(other))), 0)
    with pytest.raises(UserError, match="class_map"):
        open_training_data(replace(spec, real=replace(spec.real, noise=NoiseSpec("asymmetric", 0.2))), 0)
    with pytest.raises(UserError, match="is not divisible by 5 processes"):
        open_training_data(spec, 0).batches(0, 1, 0, 5)
