"""Streaming: remote shards give the batches of local ones, bad shards are named or skipped, threads end."""

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nrat_scale.remote.transfer
from nrat_scale.core.errors import UserError
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.batches import Batch
from nrat_scale.data.prefetch import prefetched
from nrat_scale.data.shards import open_shards
from nrat_scale.data.spec import DataSpec, RealSpec, RemoteSpec
from nrat_scale.data.training_data import TrainingData, open_training_data
from tests.support.numbered_shards import damage, not_validated, numbered_shards, two_sources

COLUMNS = ("images", "labels", "clean_labels", "generated", "ids")


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


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nrat_scale.remote.transfer, "FIRST_PAUSE_SECONDS", 0.01)


def take(data: TrainingData, start: int, stop: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(data.batches(start, stop, rank, world))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


# ---- remote shards --------------------------------------------------------------------------------------------------


def test_remote_shards_give_the_batches_of_local_ones(local: DataSpec, remote: DataSpec) -> None:
    """Where shards lie changes nothing: same ids, images, labels and split in the same steps, over several passes."""
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
    """The first batches need the shards of one window only; what comes later may still be missing."""
    data = open_training_data(remote, 1)
    first = set(data.plan.shards_of(1, 0).tolist()) | set(data.plan.shards_after(1, 0, 4).tolist())
    for number, name in enumerate(data.sources[1].shards.names):
        if number not in first:
            del server.files[f"/generated/{name}"]
    assert len(take(data, 0, 4)) == 4


def test_a_window_holds_what_a_pass_needs_once(remote: DataSpec, server: SimpleNamespace) -> None:
    """With a cache of two windows every shard is fetched about once a pass, and the cache stays within its limit."""
    # Real: 3 shards in one window. Generated: 10 shards of about 13 kB; the cache holds 12 of them.
    data = open_training_data(replace(remote, remote=replace(remote.remote, cache_gb=1.9e-4)), 1)
    take(data, 0, 74)  # two passes over the generated images
    cached = sum(path.stat().st_size for path in Path(str(remote.remote.cache)).glob("*.tar"))
    assert cached <= 190_000
    fetched = server.requests
    assert all(1 <= fetched[f"GET /generated/{name}"] <= 4 for name in data.sources[1].shards.names)


def test_a_cache_too_small_for_two_windows_is_refused(remote: DataSpec) -> None:
    """Otherwise every batch would fetch again what the one before threw away."""
    with pytest.raises(UserError, match=r"cache_gb is 5e-05, but two windows of 3 shards"):
        open_training_data(replace(remote, remote=replace(remote.remote, cache_gb=5e-5)), 1)


def test_a_missing_remote_shard_stops_with_its_name(remote: DataSpec, server: SimpleNamespace) -> None:
    """Nothing is left out silently."""
    data = open_training_data(remote, 1)
    number = not_validated(data, 1)[0]
    del server.files[f"/generated/shard-{number:05d}.tar"]
    with pytest.raises(UserError, match=f"shard-{number:05d}.tar of data.generated.shards cannot be used.*404"):
        take(data, 0, 40)


# ---- on_bad_shard: skip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_a_bad_shard_can_be_skipped(local: DataSpec, tmp_path: Path, window: int | None) -> None:
    """Its samples are replaced by those of other shards, the batches keep their size, and the run knows it."""
    spec = replace(local, window=window, on_bad_shard="skip")
    whole = take(open_training_data(spec, 1), 0, 40)
    number = not_validated(open_training_data(spec, 1), 1)[0]
    damage(local.generated.shards, number)
    data = open_training_data(spec, 1)
    data.skips.attach(tmp_path / "skipped.json")
    batches = take(data, 0, 40)
    source = data.sources[1]
    bad = set(source.shards.source_ids(np.arange(*source.shards.shard_starts[number : number + 2])).tolist())
    held_out = set(source.shards.source_ids(source.held_out).tolist())
    for old, new in zip(whole, batches, strict=True):
        lost = torch.tensor([bool(g) and int(i) in bad for g, i in zip(old.generated, old.ids, strict=True)])
        assert torch.equal(old.ids[~lost], new.ids[~lost])
        assert torch.equal(old.images[~lost], new.images[~lost])
        assert not (set(new.ids[new.generated].tolist()) & (bad | held_out))
    entry = json.loads((tmp_path / "skipped.json").read_text())["skipped"]
    assert [(e["source"], e["shard"], e["num_images"]) for e in entry] == [("generated", f"shard-{number:05d}.tar", 64)]
    # Another process that goes on with the run skips the same shard without looking at it.
    again = open_training_data(spec, 1, verify=False)
    again.skips.attach(tmp_path / "skipped.json")
    assert all(same(a, b) for a, b in zip(batches, take(again, 0, 40), strict=True))


def test_skipping_has_a_limit(local: DataSpec) -> None:
    """A data set that falls to pieces stops the run, and the message names the shards."""
    spec = replace(local, on_bad_shard="skip", max_bad_shards=2)
    numbers = not_validated(open_training_data(spec, 1), 3)
    for number in numbers:
        damage(local.generated.shards, number)
    with pytest.raises(UserError, match=r"3 shards cannot be used, more than data.max_bad_shards 2.*sha256"):
        take(open_training_data(spec, 1), 0, 80)
    with pytest.raises(UserError, match=f"shard-{numbers[0]:05d}.tar of data.generated.shards is damaged"):
        open_training_data(replace(spec, on_bad_shard="stop"), 1)


def test_a_validation_shard_is_never_skipped(local: DataSpec) -> None:
    """The split must not change silently."""
    data = open_training_data(local, 1)
    used = data.sources[1].shards.shards_of(data.sources[1].held_out)
    damage(local.generated.shards, int(used[0]))
    with pytest.raises(UserError, match="is damaged"):
        open_training_data(replace(local, on_bad_shard="skip"), 1).validation()


# ---- the webdataset loader ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_webdataset_loader_sees_the_same_multiset(local: DataSpec) -> None:
    """One pass of the standard pipeline holds exactly the samples of one pass of the plan, with their labels."""
    spec = replace(local, real=RealSpec(), batch_size=24, window=None)
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

    assert rows(take(indexed, 0, steps)) == rows(take(standard, 0, steps))
    order = torch.cat([b.ids for b in take(standard, 0, steps)])
    assert not torch.equal(order, torch.cat([b.ids for b in take(standard, steps, 2 * steps)]))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_webdataset_loader_mixes_exactly(local: DataSpec) -> None:
    """Both sources in every batch, with the counts of the plan and the noise of the recipe."""
    batches = take(open_training_data(replace(local, loader="webdataset"), 1), 0, 20)
    assert {int(b.generated.sum()) for b in batches} == {16}
    real = torch.cat([b.labels[~b.generated].ne(b.clean_labels[~b.generated]) for b in batches])
    assert 0.25 < real.float().mean() < 0.55


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_end_with_the_batches(remote: DataSpec) -> None:
    """Neither a loop that is left early nor one that runs to its end leaves a thread behind."""
    before = threading.active_count()
    for steps in (3, 50):
        batches = open_training_data(remote, 1).batches(0, 50)
        for _ in range(steps):
            next(batches)
        batches.close()  # type: ignore[attr-defined]
        del batches
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    """Items before it come first, then the very exception."""

    def items():  # type: ignore[no-untyped-def]
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    seen = []
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        seen.extend(prefetched(items))
    assert list(prefetched(lambda: iter(range(100)))) == list(range(100))


# ---- a large index --------------------------------------------------------------------------------------------------


def test_an_index_of_50_million_images(tmp_path: Path) -> None:
    """The plan and the ids of a huge set cost no memory that grows with it: nothing of its size is ever allocated."""
    folder = numbered_shards(tmp_path / "small", 512)
    index = json.loads((folder / "index.json").read_text())
    num_shards, per_shard = 977, 51_200
    block = [640, 640 + 512 * 64 + 600, 512]
    shard = {"bytes": 157_000_000, "sha256": "0" * 64, "class_counts": [5120] * 10, "blocks": [block] * 100}
    index["shards"] = [{"name": f"shard-{i:05d}.tar", **shard} for i in range(num_shards)]
    n = num_shards * per_shard
    index.update(num_images=n, class_counts=[n // 10] * 10)
    index["parts"] = [{"num_images": n, "first_id": 0, "num_ids": n, "seed": 0}]
    (folder / "index.json").write_text(json.dumps(index))
    found = open_shards(folder)
    assert len(found) == 50_022_400
    positions = np.random.default_rng(0).integers(0, n, 1000)
    assert np.array_equal(found.positions_of(found.source_ids(positions)), positions)
