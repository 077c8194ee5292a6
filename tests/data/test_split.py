"""Held-out and excluded samples: stratified, reproducible, never trained on."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.data.spec import DataSpec, RealSpec, ValidationSpec
from nrat_scale.data.split import choose_held_out
from nrat_scale.data.training_data import open_training_data
from nrat_scale.labels import NoiseSpec
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.numbered_shards import columns, numbered_shards


def test_held_out_is_stratified(tmp_path: Path) -> None:
    """Classes are held out in proportion, and another seed holds out other images."""
    found = open_shards(numbered_shards(tmp_path / "s", 205))
    stratified = choose_held_out(found, ValidationSpec(size=41))
    assert set(np.bincount(found.labels(stratified))) == {4, 5}
    assert len(set(stratified.tolist())) == 41
    assert not np.array_equal(stratified, choose_held_out(found, ValidationSpec(size=41, seed=1)))
    with pytest.raises(UserError, match="only 205 images"):
        choose_held_out(found, ValidationSpec(size=205))


def test_first_is_in_the_order_of_the_source(tmp_path: Path) -> None:
    """`first` takes the first images of the source in any order of the shards; a split without some class is refused."""
    found = open_shards(numbered_shards(tmp_path / "mixed", 205, seed=3))
    first = choose_held_out(found, ValidationSpec(size=41, take="first"))
    assert sorted(found.source_ids(first)) == list(range(41))
    images = np.zeros((100, 4, 4, 1), np.uint8)
    by_class = LabelledArrays(images, np.arange(100) // 10, "custom", tuple("0123456789"))
    write_shards(by_class, tmp_path / "by_class", progress=False)
    with pytest.raises(UserError, match=r"no image of 6 of 10 classes, such as '4': the source is sorted by class"):
        choose_held_out(open_shards(tmp_path / "by_class"), ValidationSpec(size=40, take="first"))
    with pytest.raises(UserError, match=r"no image of 5 of 10 classes.*too small"):
        choose_held_out(open_shards(tmp_path / "by_class"), ValidationSpec(size=5))


def test_the_split_needs_few_shards(tmp_path: Path) -> None:
    """The split reads one or two shards, so that of remote data no others are fetched."""
    found = open_shards(numbered_shards(tmp_path / "s", 640))
    chosen = choose_held_out(found, ValidationSpec(size=50))
    read = set(found.shards_of(chosen).tolist())
    assert len(read) <= 2
    for number in set(range(len(found.names))) - read:
        (tmp_path / "s" / found.names[number]).unlink()
    assert np.array_equal(choose_held_out(open_shards(tmp_path / "s"), ValidationSpec(size=50)), chosen)


def test_noise_and_split_are_properties_of_the_data(spec: DataSpec, tmp_path: Path) -> None:
    """The order in the shards changes no noisy label, and the noise does not change which images are held out."""
    a = open_training_data(spec, 0).sources[0]
    other = replace(
        spec, real=RealSpec(str(numbered_shards(tmp_path / "real", 130, seed=9)), NoiseSpec("symmetric", 0.4))
    )
    b = open_training_data(other, 0).sources[0]
    order = [source.shards.positions_of(np.arange(130)) for source in (a, b)]
    assert a.given is not None
    assert b.given is not None
    assert np.array_equal(a.given[order[0]], b.given[order[1]])
    clean = open_training_data(replace(spec, real=replace(spec.real, noise=NoiseSpec())), 0).sources[0]
    assert np.array_equal(a.held_out, clean.held_out)


def test_excluded_ids_are_never_trained_on(spec: DataSpec, tmp_path: Path) -> None:
    """Ids of a test split in the same shards stay out of the batches, and the run records them."""
    excluded = np.arange(40, 70)
    np.save(tmp_path / "test_ids.npy", excluded)
    changed = replace(spec, generated=replace(spec.generated, exclude=str(tmp_path / "test_ids.npy")))
    data = open_training_data(changed, 0)
    seen = columns(list(data.batches(0, 40)))
    ids = set(seen["ids"][seen["generated"]].tolist())
    assert ids == set(range(310)) - set(excluded.tolist())
    described = data.describe()["generated"]
    assert described["num_excluded"] == 30
    assert described["excluded_sha256"] == hashlib.sha256(excluded.astype("<i8").tobytes()).hexdigest()
    for content, message in ((np.array([310]), "source id 310"), (np.array([0.5]), "must hold integers")):
        np.save(tmp_path / "wrong.npy", content)
        with pytest.raises(UserError, match=message):
            open_training_data(replace(spec, generated=replace(spec.generated, exclude=str(tmp_path / "wrong.npy"))), 0)
