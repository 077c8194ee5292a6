"""Batches: exact for any number of ranks and any restart, local or remote, around bad shards; threads end."""

import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.batches import Batch
from nrat_scale.data.source import UNKNOWN_LABEL
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, RemoteSpec, ValidationSpec
from nrat_scale.data.training_data import TrainingData, open_training_data
from tests.support.numbered_shards import COLUMNS, columns, damage, not_validated, numbered_shards, two_sources

# ---- any split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_split_gives_the_same_batches(spec: DataSpec, world: int) -> None:
    """Ranks and a restart change nothing: the slices of all ranks together are the global batches."""
    whole = list(open_training_data(spec, 5).batches(0, 9))
    assert whole[0].images.is_contiguous(memory_format=torch.channels_last)
    ranks = [
        [
            *open_training_data(spec, 5).batches(0, 4, rank, world),
            *open_training_data(spec, 5).batches(4, 9, rank, world),
        ]
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert [part.first for part in parts] == [24 // world * rank for rank in range(world)]
        for name, value in columns([batch]).items():
            assert torch.equal(value, columns(parts)[name]), name


def test_the_columns_of_a_batch_agree(spec: DataSpec) -> None:
    """Images, ids, labels and clean labels of a batch belong together; all images but the held-out ones appear."""
    data = open_training_data(spec, 0)
    seen = columns(list(data.batches(0, 40)))
    ids = seen["images"][:, 0, 0, 0].long() * 256 + seen["images"][:, 0, 0, 1].long()
    assert torch.equal(ids, seen["ids"])
    generated = seen["generated"]
    assert torch.equal(seen["labels"][generated], ids[generated] % 10)
    assert seen["clean_labels"][generated].eq(UNKNOWN_LABEL).all()
    assert torch.equal(seen["clean_labels"][~generated], ids[~generated] % 10)
    assert 0.3 < seen["labels"][~generated].ne(seen["clean_labels"][~generated]).float().mean() < 0.5
    source = data.sources[0]
    held_out = set(source.shards.source_ids(source.held_out).tolist())
    assert set(ids[~generated].tolist()) == set(range(130)) - held_out


@settings(max_examples=8, deadline=None)
@given(
    n=st.tuples(st.integers(25, 150), st.integers(25, 300)),
    batch=st.sampled_from([4, 12, 24]),
    fraction=st.floats(0.3, 0.7),
    window=st.none() | st.integers(1, 4),
    world=st.sampled_from([1, 2, 4]),
    restart=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_exact_ids_whatever_the_split(n, batch, fraction, window, world, restart, seed) -> None:  # type: ignore[no-untyped-def]
    """For any sizes, mix, ranks and restart the ids of every step are those of one undisturbed process, and every pass over a
    source has each of its training samples once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real, generated = (
            numbered_shards(folder / "real", n[0], size=4),
            numbered_shards(folder / "generated", n[1], size=4),
        )
        spec = DataSpec(
            batch_size=batch,
            real=RealSpec(str(real)),
            generated=GeneratedSpec(str(generated), fraction),
            validation=ValidationSpec(size=20),
            window=window,
        )
        steps = 25
        whole = [b.ids for b in open_training_data(spec, seed).batches(0, steps)]
        for rank in range(world):
            again = open_training_data(spec, seed)
            parts = [*again.batches(0, restart, rank, world), *again.batches(restart, steps, rank, world)]
            size = batch // world
            assert all(
                torch.equal(p.ids, w[rank * size : (rank + 1) * size]) for p, w in zip(parts, whole, strict=True)
            )
        data = open_training_data(spec, seed)
        kinds = torch.cat([b.generated for b in data.batches(0, steps)])
        for source, mask in zip(data.sources, (~kinds, kinds), strict=True):
            ids = torch.cat(whole)[mask].tolist()
            untrained = set(source.shards.source_ids(source.untrained).tolist())
            times = Counter(ids)
            assert set(times) <= set(range(len(source.shards))) - untrained
            assert all(len(ids) // len(source) <= times[i] <= -(-len(ids) // len(source)) for i in times)
            assert len(times) == min(len(source), len(ids)) or len(ids) > len(source) == len(times)


# ---- remote shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> DataSpec:
    """Two sources in windows of 3 shards."""
    return replace(two_sources(tmp_path), augment=AugmentSpec(crop=0, flip=False), window=3)


@pytest.fixture
def remote(local: DataSpec, server: SimpleNamespace, tmp_path: Path) -> DataSpec:
    """The same data behind an address."""
    for name in ("real", "generated"):
        for path in (tmp_path / name).iterdir():
            server.files[f"/{name}/{path.name}"] = path.read_bytes()
    return replace(
        local,
        real=replace(local.real, shards=f"{server.url}/real"),
        generated=replace(local.generated, shards=f"{server.url}/generated"),
        remote=RemoteSpec(str(tmp_path / "cache"), 0.01),
    )


def take(data: TrainingData, start: int, stop: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(data.batches(start, stop, rank, world))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def test_remote_shards_give_the_batches_of_local_ones(local: DataSpec, remote: DataSpec) -> None:
    """Same ids, images, labels and split in the same steps, over several passes."""
    here, there = open_training_data(local, 1), open_training_data(remote, 1)
    assert here.describe() == there.describe()
    assert torch.equal(here.validation().images, there.validation().images)
    batches = take(there, 0, 90)
    assert all(same(a, b) for a, b in zip(take(here, 0, 90), batches, strict=True))
    # A restart in the middle of a pass, on two ranks.
    for rank in (0, 1):
        for whole, part in zip(batches[40:45], take(open_training_data(remote, 1), 40, 45, rank, 2), strict=True):
            assert torch.equal(part.ids, whole.ids[rank * 12 : rank * 12 + 12])


def test_training_starts_with_the_first_window(remote: DataSpec, server: SimpleNamespace) -> None:
    """The first batches need the shards of one window only; later ones may still be missing."""
    data = open_training_data(remote, 1)
    first = set(data.plan.shards_of(1, 0).tolist()) | set(data.plan.shards_after(1, 0, 4).tolist())
    for number, name in enumerate(data.sources[1].shards.names):
        if number not in first:
            del server.files[f"/generated/{name}"]
    assert len(take(data, 0, 4)) == 4


def test_a_pass_fetches_each_shard_about_once(remote: DataSpec, server: SimpleNamespace) -> None:
    """With a cache of two windows; the cache stays within its limit."""
    # Real: 3 shards in one window. Generated: 10 shards of about 13 kB; the cache holds 12 of them.
    data = open_training_data(replace(remote, remote=replace(remote.remote, cache_gb=1.9e-4)), 1)
    take(data, 0, 74)  # two passes over the generated images
    cached = sum(path.stat().st_size for path in Path(str(remote.remote.cache)).glob("*.tar"))
    assert cached <= 190_000
    fetched = server.requests
    assert all(1 <= fetched[f"GET /generated/{name}"] <= 4 for name in data.sources[1].shards.names)


def test_a_cache_too_small_for_two_windows_is_refused(remote: DataSpec) -> None:
    """Otherwise every batch would fetch again the shards that the batch before evicted."""
    with pytest.raises(UserError, match=r"cache_gb is 5e-05, but two windows of 3 shards"):
        open_training_data(replace(remote, remote=replace(remote.remote, cache_gb=5e-5)), 1)


def test_a_missing_remote_shard_is_named(remote: DataSpec, server: SimpleNamespace) -> None:
    """By default no shard is skipped."""
    data = open_training_data(remote, 1)
    number = not_validated(data, 1)[0]
    del server.files[f"/generated/shard-{number:05d}.tar"]
    with pytest.raises(UserError, match=f"shard-{number:05d}.tar of data.generated.shards cannot be used.*404"):
        take(data, 0, 40)


# ---- on_bad_shard: skip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_a_bad_shard_can_be_skipped(local: DataSpec, tmp_path: Path, window: int | None) -> None:
    """Its samples are replaced by samples of other shards, the batches keep their size, and the run records it."""
    spec = replace(local, window=window, on_bad_shard="skip")
    whole = take(open_training_data(spec, 1), 0, 40)
    number = not_validated(open_training_data(spec, 1), 1)[0]
    damage(local.generated.shards, number)
    data = open_training_data(spec, 1)
    data.skips.attach(RunFolder(tmp_path))
    batches = take(data, 0, 40)
    source = data.sources[1]
    bad = set(source.shards.source_ids(np.arange(*source.shards.shard_starts[number : number + 2])).tolist())
    held_out = set(source.shards.source_ids(source.held_out).tolist())
    for old, new in zip(whole, batches, strict=True):
        lost = torch.tensor([bool(g) and int(i) in bad for g, i in zip(old.generated, old.ids, strict=True)])
        assert torch.equal(old.ids[~lost], new.ids[~lost])
        assert torch.equal(old.images[~lost], new.images[~lost])
        assert not (set(new.ids[new.generated].tolist()) & (bad | held_out))
    entries = RunFolder(tmp_path).read_skipped_shards()
    assert [(e["source"], e["shard"], e["num_images"]) for e in entries] == [
        ("generated", f"shard-{number:05d}.tar", 64)
    ]
    # A resumed run skips the same shard without opening it.
    again = open_training_data(spec, 1, verify=False)
    again.skips.attach(RunFolder(tmp_path))
    assert all(same(a, b) for a, b in zip(batches, take(again, 0, 40), strict=True))


def test_skipping_has_a_limit(local: DataSpec) -> None:
    """More bad shards than `max_bad_shards` stop the run, and the message names them."""
    spec = replace(local, on_bad_shard="skip", max_bad_shards=2)
    numbers = not_validated(open_training_data(spec, 1), 3)
    for number in numbers:
        damage(local.generated.shards, number)
    with pytest.raises(UserError, match=r"3 shards cannot be used, more than data.max_bad_shards 2.*sha256"):
        take(open_training_data(spec, 1), 0, 80)
    with pytest.raises(
        UserError, match=f"shard-{numbers[0]:05d}.tar of data.generated.shards cannot be used: its sha256"
    ):
        open_training_data(replace(spec, on_bad_shard="stop"), 1)


def test_a_validation_shard_is_never_skipped(local: DataSpec) -> None:
    """The split must not change silently."""
    data = open_training_data(local, 1)
    used = data.sources[1].shards.shards_of(data.sources[1].held_out)
    damage(local.generated.shards, int(used[0]))
    with pytest.raises(UserError, match="cannot be used: its sha256"):
        open_training_data(replace(local, on_bad_shard="skip"), 1).validation()


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_end_with_the_batches(remote: DataSpec) -> None:
    """Neither a loop that ends early nor one that runs to its end leaves a thread behind."""
    before = set(threading.enumerate())
    for steps in (3, 50):
        batches = open_training_data(remote, 1).batches(0, 50)
        for _ in range(steps):
            next(batches)
        batches.close()  # type: ignore[attr-defined]
        del batches
    end = time.monotonic() + 30  # a thread of the server ends a moment after its client has the bytes
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before
