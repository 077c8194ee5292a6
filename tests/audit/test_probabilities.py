"""Probabilities by shard: the model of its fold predicts an image, files are complete or absent, and only the missing are made."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrat_scale.audit.folds import Folds
from nrat_scale.audit.probabilities import Probabilities
from nrat_scale.core import files
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import ShardSet, open_shards
from tests.support.runs import make_shards


class _Constant(nn.Module):
    """A classifier that prefers one class by some log-odds, and counts its images."""

    def __init__(self, label: int, odds: float = 3.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))
        self.logits.data[label] = odds
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.logits.expand(len(x), 10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Four shards."""
    return open_shards(make_shards(tmp_path_factory.mktemp("data") / "shards", 200, 0, shard_size=60))


def test_each_image_by_the_model_of_its_fold(tmp_path, shards):
    """The fold of an image follows from its source id alone; every model predicts its images once."""
    folds, models = Folds(shards, 3, 0), [_Constant(label) for label in range(3)]
    found = Probabilities(tmp_path / "p", shards, 1)
    found.predict(models, folds.of, (0, 1), 50)
    predicted = np.concatenate([found.read(number)[:, 0] for number in range(len(shards.names))])
    np.testing.assert_array_equal(predicted.argmax(axis=1), folds.of(np.arange(200)))
    assert sum(model.images for model in models) == 200
    assert all(model.images > 40 for model in models)


def test_all_models_predict_a_hold_out(tmp_path, shards):
    """Without folds every image has the probabilities of each model."""
    found = Probabilities(tmp_path / "p", shards, 2)
    found.predict([_Constant(1), _Constant(7)], None, (0, 1), 64)
    assert found.read(0).shape[1:] == (2, 10)
    assert (found.read(0).argmax(axis=2) == [1, 7]).all()


def test_only_missing_shards_are_predicted(tmp_path, shards):
    """Two processes share the shards, and a second start predicts those that are missing or cut off, no others."""
    found, model = Probabilities(tmp_path / "p", shards, 1), _Constant(0)
    found.predict([model], lambda positions: np.zeros(len(positions), int), (1, 2), 64)
    assert found.missing() == list(range(0, len(shards.names), 2))
    found.predict([model], lambda positions: np.zeros(len(positions), int), (0, 2), 64)
    assert found.missing() == []
    path = tmp_path / "p" / "00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    model.images = 0
    found.predict([model], lambda positions: np.zeros(len(positions), int), (0, 1), 64)
    assert model.images == shards.shard_starts[2] - shards.shard_starts[1]


def test_logits_that_are_not_finite(tmp_path, shards):
    """A model that returns NaN predicts nothing: no file is left."""
    found = Probabilities(tmp_path / "p", shards, 1)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        found.predict([_Constant(0, float("nan"))], None, (0, 1), 64)
    assert not list((tmp_path / "p").iterdir())


def test_full_disk(tmp_path, shards, monkeypatch):
    """A shard whose file cannot be written ends in one sentence and leaves nothing behind."""

    def full(path, content):
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_durably", full)
    with pytest.raises(UserError, match="No space left on device"):
        Probabilities(tmp_path / "p", shards, 1).predict([_Constant(0)], None, (0, 1), 64)
    assert not list((tmp_path / "p").iterdir())
