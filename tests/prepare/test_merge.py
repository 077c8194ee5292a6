"""Merged shards keep every sample; folders that do not fit together are refused."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.merge import merge
from tests.support.preparation import flip_bit, is_one_sentence, random_source, small_shards, tree


@settings(deadline=None, derandomize=True, max_examples=15)
@given(sizes=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=4), nested=st.booleans())
def test_merged_shards_keep_every_sample_and_its_id(sizes, nested):
    """Ids of a folder are shifted by the numbers of ids before it; merged folders can be merged again."""
    with tempfile.TemporaryDirectory() as name:
        parent, sources, ids, first_id = Path(name), [], [], 0
        folders = []
        for number, (num_images, stored) in enumerate(sizes):
            sources.append(random_source(num_images, seed=number))
            own = np.random.default_rng(number).permutation(90)[:num_images] if stored else np.arange(num_images)
            options = {"ids": own, "num_ids": 100} if stored else {}
            folders.append(small_shards(parent / "sets" / f"set-{number}", sources[-1], **options))
            ids.append(first_id + own)
            first_id += 100 if stored else num_images
        merge(folders, parent / "sets" / "index.json")
        out = parent / "sets"
        if nested:
            merge([out], parent / "index.json")
            out = parent
        shards = open_shards(out)
        shards.verify()
        assert len(shards) == sum(num_images for num_images, _ in sizes) and shards.num_ids == first_id
        for source, own in zip(sources, ids, strict=True):
            positions = shards.positions_of(own)
            assert np.array_equal(shards.images(positions), source.images)
            assert np.array_equal(shards.labels(positions), source.labels)
            assert np.array_equal(shards.source_ids(positions), own)
        assert shards.source_files == [file for source in sources for file in source.files]


MERGES = {
    "not below": (lambda d: [d / "a", d / "b", "--out", d / "elsewhere" / "index.json"], "is not below"),
    "itself": (lambda d: [d, "--out", d / "index.json"], "is not below"),
    "twice": (lambda d: [d / "a", d / "b" / ".." / "a", "--out", d / "index.json"], "given twice"),
    "a folder as --out": (lambda d: [d / "a", d / "b", "--out", d], "must be PARENT/index.json"),
    "exists": (lambda d: [d / "a", "--out", d / "a" / "index.json"], "already exists"),
    "no shards": (lambda d: [d / "a", d / "nothing", "--out", d / "index.json"], "no shards"),
    "other shape": (lambda d: [d / "a", d / "small", "--out", d / "index.json"], "The image shape of"),
    "other classes": (lambda d: [d / "a", d / "classes", "--out", d / "index.json"], "The classes of"),
    "damaged": (lambda d: [d / "a", d / "damaged", "--out", d / "index.json"], "sha256"),
    "odd name": (lambda d: [d / "a", d / "with space", "--out", d / "index.json"], "Rename it"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folders of shards, some of which do not fit to `a`."""
    parent = tmp_path_factory.mktemp("merge")
    for folder in ("a", "b", "damaged", "with space"):
        small_shards(parent / folder)
    small_shards(parent / "small", random_source(shape=(4, 4, 3)))
    small_shards(parent / "classes", replace(random_source(), class_names=("x", "y", "z")))
    flip_bit(parent / "damaged" / "shard-00000.tar", 900)
    return parent


@pytest.mark.parametrize("name", MERGES)
def test_folders_that_cannot_be_merged_are_refused(prepared, cli, name):
    """A sentence, and no index."""
    arguments, words = MERGES[name]
    before = tree(prepared)
    assert is_one_sentence(cli("merge", *arguments(prepared)), words)
    assert tree(prepared) == before
