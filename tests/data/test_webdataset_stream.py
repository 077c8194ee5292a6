"""The webdataset loader: the samples and the mix of the sample plan, in another order."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.batches import Batch
from nrat_scale.data.spec import DataSpec, RealSpec
from nrat_scale.data.training_data import open_training_data
from tests.support.numbered_shards import two_sources


@pytest.fixture
def local(tmp_path: Path) -> DataSpec:
    """Two sources, without augmentation."""
    return replace(two_sources(tmp_path), augment=AugmentSpec(crop=0, flip=False))


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_webdataset_loader_sees_the_same_multiset(local: DataSpec) -> None:
    """One pass of the standard pipeline has exactly the samples and labels of one pass of the plan."""
    spec = replace(local, real=RealSpec())
    spec = replace(spec, generated=replace(spec.generated, fraction=1.0))
    indexed, standard = (open_training_data(replace(spec, loader=name), 1) for name in ("indexed", "webdataset"))
    steps = len(indexed.sources[0]) // 24  # 600 of 640 images are trained on: a whole number of batches
    assert steps * 24 == len(indexed.sources[0]) == 600

    def rows(batches: list[Batch]) -> Counter[tuple[object, ...]]:
        return Counter(
            (int(i), int(y), x.numpy().tobytes())
            for b in batches
            for i, y, x in zip(b.ids, b.labels, b.images, strict=True)
        )

    assert rows(list(indexed.batches(0, steps))) == rows(list(standard.batches(0, steps)))
    order = torch.cat([b.ids for b in list(standard.batches(0, steps))])
    assert not torch.equal(order, torch.cat([b.ids for b in list(standard.batches(steps, 2 * steps))]))


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_webdataset_loader_mixes_exactly(local: DataSpec) -> None:
    """Both sources in every batch, with the counts of the plan and the noise of the recipe."""
    batches = list(open_training_data(replace(local, loader="webdataset"), 1).batches(0, 20))
    assert {int(b.generated.sum()) for b in batches} == {16}
    real = torch.cat([b.labels[~b.generated].ne(b.clean_labels[~b.generated]) for b in batches])
    assert 0.25 < real.float().mean() < 0.55
