"""Resident images: bitwise the same batches, chosen if they fit, refused with a reason, and damaged shards replaced."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.batches import Batch
from nrat_scale.data.resident import image_bytes, load_images
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, RemoteSpec
from nrat_scale.data.training_data import TrainingData, open_training_data
from nrat_scale.recipe import load_recipe
from tests.support.numbered_shards import damage, not_validated, two_sources

CPU = torch.device("cpu")
CUTMIX = AugmentSpec(crop=2, flip=True, cutmix=0.7)
QUICK = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    """Two sources, augmented, gathered on the host."""
    return replace(two_sources(tmp_path), augment=AugmentSpec(crop=2, flip=True), resident="never")


def placed(spec: DataSpec, device: torch.device = CPU, resident: str = "always") -> TrainingData:
    data = open_training_data(replace(spec, resident=resident), 3)
    data.place_images(device)
    return data


def check_equal(mapped: DataSpec, steps: range, *, rank: int = 0, world: int = 1, device: torch.device = CPU) -> None:
    """Batches and augmented images are the same with resident images as without."""
    one, two = open_training_data(mapped, 3), placed(mapped, device)
    pairs = zip(
        one.batches(steps.start, steps.stop, rank, world),
        two.batches(steps.start, steps.stop, rank, world),
        strict=True,
    )
    for a, b in pairs:
        check_batches_equal(a, b)
        for expected, found in zip(one.augmented(a, device), two.augmented(b, device), strict=True):
            assert found.device.type == device.type
            assert found.dtype == expected.dtype and found.stride() == expected.stride()
            assert torch.equal(found, expected)


def check_batches_equal(a: Batch, b: Batch) -> None:
    assert (a.step, a.first) == (b.step, b.first)
    for name in ("images", "labels", "clean_labels", "generated", "ids", "places"):
        assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
    assert (a.partners is None) == (b.partners is None)
    if a.partners is not None and b.partners is not None:
        for name in ("images", "labels", "places"):
            assert torch.equal(getattr(a.partners, name).cpu(), getattr(b.partners, name).cpu()), name


# ---- the same batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [AugmentSpec(crop=0, flip=False), AugmentSpec(crop=2), CUTMIX])
@pytest.mark.parametrize(("world", "steps"), [(1, range(30)), (2, range(7, 20)), (4, range(41, 45))])
def test_resident_images_change_no_batch(spec: DataSpec, augment: AugmentSpec, world: int, steps: range) -> None:
    """For any rank, number of ranks, start and augmentation."""
    for rank in range(world):
        check_equal(replace(spec, augment=augment), steps, rank=rank, world=world)


def test_one_source_in_windows_with_excluded_images(spec: DataSpec, tmp_path: Path) -> None:
    """Rows are positions in the shards, which held-out or excluded images and windows do not shift."""
    np.save(tmp_path / "ids.npy", np.arange(100, 180))
    alone = GeneratedSpec(str(spec.generated.shards), 1.0, exclude=str(tmp_path / "ids.npy"))
    check_equal(replace(spec, real=RealSpec(), generated=alone, window=3), range(40))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resident_images_on_a_gpu(spec: DataSpec) -> None:
    """The same batches, gathered on the GPU; `auto` chooses it if there is room."""
    device = torch.device("cuda")
    check_equal(replace(spec, augment=CUTMIX), range(5, 25), device=device)
    data = placed(spec, device, "auto")
    assert data.resident is not None and data.resident.images.device.type == "cuda"


def test_batches_are_gathered_from_the_resident_images(spec: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards' pixels are not read again, neither of the batch nor of its CutMix partners."""
    data = placed(replace(spec, augment=CUTMIX))
    for source in data.sources:
        monkeypatch.setattr(source.shards, "rows", None)
        monkeypatch.setattr(source.shards, "images", None)
    (batch,) = data.batches(0, 1)
    assert batch.partners is not None
    for images in (batch.images, batch.partners.images):
        assert (images.dtype, images.shape) == (torch.uint8, (24, 1, 8, 8))


def test_the_host_holds_one_shard_at_a_time(spec: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading copies shard by shard: a set that fits on the device need not fit into host memory."""
    data = open_training_data(spec, 3)
    asked = []
    for source in data.sources:
        read = source.shards.images
        monkeypatch.setattr(source.shards, "images", lambda rows, read=read: asked.append(len(rows)) or read(rows))
    resident = load_images(data.sources, CPU)
    assert (max(asked), sum(asked)) == (64, 130 + 640)
    assert resident.images.shape == (770, 8, 8, 1) and resident.first_rows == (0, 130)
    assert resident.images.numel() == image_bytes(data.sources)


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_a_cpu_reads_memory_maps(spec: DataSpec) -> None:
    """`auto`, the default, and `never` keep no images on a CPU."""
    assert DataSpec(real=RealSpec("x")).resident == "auto"
    for resident in ("auto", "never"):
        assert placed(spec, CPU, resident).resident is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake device with `free` bytes; images placed on it stay on the CPU."""
    found = SimpleNamespace(free=0, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found.free, 10**12))
    monkeypatch.setattr("nrat_scale.data.training_data.load_images", lambda sources, device: load_images(sources, CPU))
    return found


def used(spec: DataSpec, gpu: SimpleNamespace) -> bool:
    return placed(spec, gpu.device, spec.resident).resident is not None


def test_auto_takes_half_of_the_free_memory_at_most(spec: DataSpec, gpu: SimpleNamespace) -> None:
    """The model, its activations and the attack need the other half."""
    size = 770 * 64
    for free, expected in ((2 * size - 1, False), (2 * size, True)):
        gpu.free = free
        assert used(replace(spec, resident="auto"), gpu) is expected
        assert not used(spec, gpu), "never"


def test_auto_excludes_remote_shards_and_the_webdataset_loader(
    spec: DataSpec, gpu: SimpleNamespace, server: SimpleNamespace, tmp_path: Path
) -> None:
    """They stream, however much memory is free."""
    gpu.free = 10**12
    auto = replace(spec, resident="auto")
    assert used(auto, gpu)
    assert not used(replace(auto, loader="webdataset"), gpu)
    assert not used(remote(auto, server, tmp_path), gpu)


def remote(spec: DataSpec, server: SimpleNamespace, tmp_path: Path) -> DataSpec:
    for path in (tmp_path / "generated").iterdir():
        server.files[f"/generated/{path.name}"] = path.read_bytes()
    generated = replace(spec.generated, shards=f"{server.url}/generated")
    return replace(spec, generated=generated, remote=RemoteSpec(str(tmp_path / "cache"), 0.01))


def test_the_identity_of_a_run_ignores_it() -> None:
    """An interrupted run can resume with another value, on a machine with more or less memory."""
    recipes = [load_recipe(QUICK, [f"data.resident={value}"]) for value in ("auto", "always", "never")]
    assert len({recipe.identity for recipe in recipes}) == 1
    assert dataclasses.asdict(recipes[0]) != dataclasses.asdict(recipes[1])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_always_is_refused_with_a_reason(
    spec: DataSpec, gpu: SimpleNamespace, server: SimpleNamespace, tmp_path: Path
) -> None:
    """`always` never falls back silently."""
    with pytest.raises(UserError, match=r"data\.generated\.shards is the address http.*only local shards"):
        placed(remote(spec, server, tmp_path))
    with pytest.raises(UserError, match=r"images take 0\.00 GB and cuda has 0\.00 GB free.*auto"):
        placed(spec, gpu.device)


def test_images_come_before_batches(spec: DataSpec) -> None:
    """A program that forgets `place_images` must not train without the resident images that its recipe requires."""
    with pytest.raises(AssertionError, match="place_images"):
        open_training_data(replace(spec, resident="always"), 3).batches(0, 1)


# ---- damaged shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("augment", [AugmentSpec(crop=0), CUTMIX])
def test_bad_shards_are_replaced_as_without_resident_images(
    spec: DataSpec, window: int | None, augment: AugmentSpec
) -> None:
    """The substitutes depend on the order in which bad shards are found, which is the same; so is the log."""
    skipping = replace(spec, window=window, augment=augment, on_bad_shard="skip", max_bad_shards=2)
    for number in not_validated(open_training_data(skipping, 3), 2):
        damage(spec.generated.shards, number)
    check_equal(skipping, range(40))
    one, two = open_training_data(skipping, 3), placed(skipping)
    for data in (one, two):
        list(data.batches(0, 40))
    assert [entry["shard"] for entry in one.skips.entries] == [entry["shard"] for entry in two.skips.entries]
    assert len(two.skips.entries) == 2


def test_bad_shards_have_a_limit(spec: DataSpec) -> None:
    """More bad shards than `max_bad_shards` stop the run, as without resident images."""
    skipping = replace(spec, on_bad_shard="skip", max_bad_shards=1)
    for number in not_validated(open_training_data(skipping, 3), 2):
        damage(spec.generated.shards, number)
    with pytest.raises(UserError, match=r"2 shards cannot be used, more than data\.max_bad_shards 1"):
        list(placed(skipping).batches(0, 40))


def close(data: TrainingData, number: int) -> None:
    """Close the map of a generated shard by opening another one."""
    shards = data.sources[1].shards
    shards.max_open = 1
    shards.open(number - 1)


def test_a_shard_that_vanishes_is_named(spec: DataSpec) -> None:
    """A shard that was removed after verification: with `stop` the error names it."""
    data = open_training_data(replace(spec, resident="always"), 3)
    number = not_validated(data, 1)[0]
    close(data, number)
    (Path(str(spec.generated.shards)) / f"shard-{number:05d}.tar").unlink()
    with pytest.raises(UserError, match=f"shard-{number:05d}.tar of .* cannot be used: it cannot be read"):
        data.place_images(CPU)


def test_rows_that_could_not_be_loaded_are_never_gathered(spec: DataSpec) -> None:
    """With `skip`, even if their shard can be read again later."""
    data = open_training_data(replace(spec, resident="always", on_bad_shard="skip"), 3)
    source, number = data.sources[1], not_validated(data, 1)[0]
    path = Path(str(spec.generated.shards)) / f"shard-{number:05d}.tar"
    close(data, number)
    away = path.rename(path.with_suffix(".away"))
    data.place_images(CPU)
    away.rename(path)
    first, last = source.shards.shard_starts[number : number + 2]
    lost = set(source.shards.source_ids(np.arange(first, last)).tolist())
    seen = torch.cat([batch.ids[batch.generated] for batch in data.batches(0, 80)])
    assert not set(seen.tolist()) & lost
    assert data.skips.of("generated") == {path.name}
