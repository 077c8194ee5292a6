"""The data plane: the plan is a pure function, nothing is lost or seen twice, and no split changes what is trained on."""

import hashlib
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.core.errors import UserError
from nrat_scale.data.augment import AugmentSpec, crop_and_flip, cutmix, cutmix_partners, to_float
from nrat_scale.data.batches import Batch
from nrat_scale.data.plan import SamplePlan, SourceOrder, mix_counts
from nrat_scale.data.shards import open_shards
from nrat_scale.data.source import UNKNOWN_LABEL
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, ValidationSpec
from nrat_scale.data.split import choose_held_out
from nrat_scale.data.training_data import open_training_data
from nrat_scale.labels import NoiseSpec
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.numbered_shards import numbered_shards

NOISE = NoiseSpec("symmetric", 0.4)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    folder = tmp_path_factory.mktemp("data")
    real, generated = numbered_shards(folder / "real", 130), numbered_shards(folder / "generated", 310)
    return DataSpec(
        batch_size=24,
        real=RealSpec(str(real), NOISE),
        generated=GeneratedSpec(str(generated), 0.7),
        validation=ValidationSpec(size=30),
        augment=AugmentSpec(crop=0, flip=False),
    )


# ---- the plan -------------------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> SourceOrder:
    """A source of shards of any size (also empty ones: all held out), whole or in windows."""
    sizes = draw(st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(any))
    starts = (0, *np.cumsum(sizes).tolist())
    return SourceOrder(draw(st.integers(1, 40)), starts, draw(st.none() | st.integers(1, 9)))


PLANS = st.builds(
    lambda sources, seed: SamplePlan(tuple(sources), seed),
    st.lists(orders(), min_size=1, max_size=2),
    st.integers(0, 2**40),
)


PINNED = [
    (None, [(1, 482175), (1, 410914), (0, 30), (1, 1182121), (1, 692535), (0, 49), (1, 2889684), (0, 34)]),
    (4, [(1, 1699042), (1, 1699160), (0, 30), (1, 1323457), (1, 1340464), (0, 49), (1, 1323187), (0, 34)]),
]


def plan_of(sizes: tuple[int, ...], counts: tuple[int, ...], seed: int) -> SamplePlan:
    return SamplePlan(tuple(SourceOrder(c, (0, s)) for s, c in zip(sizes, counts, strict=True)), seed)


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_every_sample_once_per_pass(plan: SamplePlan) -> None:
    """Sources cycle independently: each whole pass is a permutation of its source, whatever the batch size."""
    batches = [plan.batch(step) for step in range(30)]
    for source, (size, count) in enumerate((source.size, source.count) for source in plan.sources):
        assert all((sources == source).sum() == count for sources, _ in batches)
        seen = [sorted(samples[sources == source]) for sources, samples in batches]
        whole_passes = 30 * count // size
        counts = np.bincount(np.concatenate(seen), minlength=size)
        assert counts.min() >= whole_passes
        assert counts.max() <= whole_passes + 1


@settings(max_examples=30, deadline=None)
@given(PLANS, st.integers(0, 10**9))
def test_plan_is_a_pure_function(plan: SamplePlan, step: int) -> None:
    """A batch depends on (sizes, counts, seed, step) alone, not on what was asked before."""
    first = plan.batch(step)
    plan.batch(step + 17)
    again = SamplePlan(plan.sources, plan.seed).batch(step)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 10**6), st.integers(0, 500))
def test_a_batch_lies_in_its_windows(source: SourceOrder, seed: int, step: int) -> None:
    """What is fetched for a step is what the step needs, and what is fetched ahead is what comes next."""
    source = replace(source, window=source.window or 2)
    plan = SamplePlan((source,), seed)
    starts = np.asarray(source.starts)

    def shards_of(samples: np.ndarray) -> set[int]:
        return set((np.searchsorted(starts, samples, side="right") - 1).tolist())

    now = plan.shards_of(0, step).tolist()
    assert shards_of(plan.batch(step)[1]) <= set(now)
    assert not len(plan.shards_after(0, step, step + 1)), "no batch comes after this one"
    ahead = set(now) | set(plan.shards_after(0, step, 10**6).tolist())
    following = plan.shards_of(0, step + 1).tolist()[: len(source.starts) - 1]
    assert following[0] in ahead


@pytest.mark.parametrize(("window", "expected"), PINNED)
def test_the_plan_is_the_same_in_every_version(window: int | None, expected: list[tuple[int, int]]) -> None:
    """Known answers: whoever changes the plan changes what every published run has seen."""
    starts = tuple(range(0, 3_000_001, 50_000))
    plan = SamplePlan((SourceOrder(3, (0, 50)), SourceOrder(5, starts, window)), 7)
    assert [tuple(map(int, row)) for row in zip(*plan.batch(1_000_003), strict=True)] == expected


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
    """Any sizes, mix, ranks and restart: the ids of every step are those of one undisturbed process, and every pass over
    a source has each of its training samples once."""
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
            left_out = set(source.shards.source_ids(source.left_out).tolist())
            times = Counter(ids)
            assert set(times) <= set(range(len(source.shards))) - left_out
            assert all(len(ids) // len(source) <= times[i] <= -(-len(ids) // len(source)) for i in times)
            assert len(times) == min(len(source), len(ids)) or len(ids) > len(source) == len(times)


def test_passes_and_seeds_differ() -> None:
    """Each pass and each seed has an order of its own, and kinds are interleaved within a batch."""
    plan = plan_of((64, 64), (32, 32), 1)
    passes = [np.concatenate([plan.batch(s)[1][plan.batch(s)[0] == 0] for s in pair]) for pair in ((0, 1), (2, 3))]
    assert not np.array_equal(*passes)
    assert not np.array_equal(plan.batch(0)[1], plan_of((64, 64), (32, 32), 2).batch(0)[1])
    assert 5 < plan.batch(0)[0][:32].sum() < 27, "one rank would see one kind only"


def test_mix_is_exact() -> None:
    """The published mix, and products that floating point gets wrong."""
    assert mix_counts(512, 0.7) == (154, 358)
    assert mix_counts(100, 0.29) == (71, 29)


# ---- batches --------------------------------------------------------------------------------------------------------


def columns(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("images", "labels", "clean_labels", "generated", "ids")
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (4, 2)])
def test_any_split_gives_the_same_batches(spec: DataSpec, world: int, workers: int) -> None:
    """Ranks, workers and a restart change nothing: joined together the slices are the global batches."""
    whole = list(open_training_data(spec, 5).batches(0, 9))
    assert whole[0].images.is_contiguous(memory_format=torch.channels_last)
    ranks = [
        [
            *open_training_data(replace(spec, workers=workers), 5).batches(0, 4, rank, world),
            *open_training_data(replace(spec, workers=workers), 5).batches(4, 9, rank, world),
        ]
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert [part.first for part in parts] == [24 // world * rank for rank in range(world)]
        for name, value in columns([batch]).items():
            assert torch.equal(value, columns(parts)[name]), name


def test_batches_hold_what_they_say(spec: DataSpec) -> None:
    """Images, ids, labels and clean labels of a batch belong together; held-out images never appear, all others do."""
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


def test_noise_and_split_are_properties_of_the_data(spec: DataSpec, tmp_path: Path) -> None:
    """The order in the shards changes no noisy label, and the noise does not change which images are held out."""
    a = open_training_data(spec, 0).sources[0]
    other = replace(spec, real=RealSpec(str(numbered_shards(tmp_path / "real", 130, seed=9)), NOISE))
    b = open_training_data(other, 0).sources[0]
    order = [source.shards.positions_of(np.arange(130)) for source in (a, b)]
    assert a.given is not None
    assert b.given is not None
    assert np.array_equal(a.given[order[0]], b.given[order[1]])
    clean = open_training_data(replace(spec, real=replace(spec.real, noise=NoiseSpec())), 0).sources[0]
    assert np.array_equal(a.held_out, clean.held_out)


def test_validation_labels(spec: DataSpec) -> None:
    """`given` has the noise, `clean` has not; nobody knows clean labels of generated images."""
    given_labels = open_training_data(spec, 0).validation()
    clean = open_training_data(replace(spec, validation=replace(spec.validation, labels="clean")), 0).validation()
    assert torch.equal(given_labels.images, clean.images)
    assert not torch.equal(given_labels.labels, clean.labels)
    assert given_labels.clean_labels is not None
    assert torch.equal(given_labels.clean_labels, clean.labels)
    generated = replace(spec, validation=ValidationSpec(source="generated", size=30))
    assert open_training_data(generated, 0).validation().clean_labels is None


def test_first_is_in_the_order_of_the_source(tmp_path: Path) -> None:
    """The first images of the source, whatever the order in the shards; one class alone is refused with the reason."""
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
    """Shards are permuted when written: the split reads one or two of them, so that of remote data no more are fetched."""
    found = open_shards(numbered_shards(tmp_path / "s", 640))
    chosen = choose_held_out(found, ValidationSpec(size=50))
    assert len(set(found.shards_of(chosen).tolist())) <= 2
    assert len(found._maps) <= 2


def test_excluded_ids_are_never_trained_on(spec: DataSpec, tmp_path: Path) -> None:
    """Ids of a test split in the same shards stay out of the batches, and the run records which they were."""
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


def test_held_out_is_stratified(tmp_path: Path) -> None:
    """Classes are held out in proportion, another seed takes others, and `random` takes as many."""
    found = open_shards(numbered_shards(tmp_path / "s", 205))
    stratified = choose_held_out(found, ValidationSpec(size=41))
    assert set(np.bincount(found.labels(stratified))) == {4, 5}
    assert len(set(stratified.tolist())) == 41
    assert not np.array_equal(stratified, choose_held_out(found, ValidationSpec(size=41, seed=1)))
    with pytest.raises(UserError, match="only 205 images"):
        choose_held_out(found, ValidationSpec(size=205))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real": RealSpec(), "generated": GeneratedSpec()}, "Nothing to train on"),
        (
            {"validation": ValidationSpec(source="generated"), "generated": GeneratedSpec()},
            "generated.shards is not set",
        ),
        ({"generated": GeneratedSpec("x", 0.0)}, "fraction"),
        ({"workers": -1}, "workers"),
    ],
)
def test_specs_that_cannot_be(spec: DataSpec, change: dict[str, object], message: str) -> None:
    """What contradicts itself is refused before any file is opened."""
    with pytest.raises(UserError, match=message):
        replace(spec, **change)  # type: ignore[arg-type]


def test_data_that_do_not_fit(spec: DataSpec, tmp_path: Path) -> None:
    """Other shapes, a noise kind without a map, too many processes: each is named."""
    other = numbered_shards(tmp_path / "large", 90, size=9)
    with pytest.raises(UserError, match="image shape"):
        open_training_data(replace(spec, generated=GeneratedSpec(str(other))), 0)
    with pytest.raises(UserError, match="class_map"):
        open_training_data(replace(spec, real=replace(spec.real, noise=NoiseSpec("asymmetric", 0.2))), 0)
    with pytest.raises(UserError, match="does not divide by 5 processes"):
        open_training_data(spec, 0).batches(0, 1, 0, 5)


# ---- augmentation ---------------------------------------------------------------------------------------------------


def test_augmentation_is_crop_and_flip() -> None:
    """Every result is one of the padded image's crops or its mirror image; all offsets and both directions occur."""
    images = torch.randint(0, 256, (300, 2, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = to_float(crop_and_flip(images, torch.arange(300), AugmentSpec(crop=1, flip=True), 300, 0, 0))
    assert out.dtype == torch.float32
    seen = set()
    for image, result in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        options = {(i, j, f): padded[:, i : i + 6, j : j + 5] for i in range(3) for j in range(3) for f in (0, 1)}
        matches = [k for k, v in options.items() if torch.equal((v.flip(2) if k[2] else v).float() / 255, result)]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 18


def test_augmentation_does_not_depend_on_the_split() -> None:
    """A rank's slice is augmented as within the global batch; steps and seeds differ."""
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    spec, everywhere = AugmentSpec(crop=2, flip=True), torch.arange(12)
    whole = crop_and_flip(images, everywhere, spec, 12, 3, 0)
    parts = [crop_and_flip(images[i : i + 4], everywhere[i : i + 4], spec, 12, 3, 0) for i in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, crop_and_flip(images, everywhere, spec, 12, 3, 1))
    assert not torch.equal(whole, crop_and_flip(images, everywhere, spec, 12, 4, 0))
    assert torch.equal(crop_and_flip(images, everywhere, AugmentSpec(crop=0, flip=False), 12, 3, 0), images)


def test_cutmix_replaces_one_rectangle_by_area() -> None:
    """What comes of the partner is one rectangle, `own` is the rest's area, and lambda covers (0, 1)."""
    n, spec = 400, AugmentSpec(cutmix=0.5)
    zeros, ones = torch.zeros(n, 1, 16, 12, dtype=torch.uint8), torch.ones(n, 1, 16, 12, dtype=torch.uint8)
    mixed, own = cutmix(zeros, ones, torch.arange(n), spec, n, 0, 7)
    assert torch.allclose(own, 1 - mixed.float().mean((1, 2, 3)), atol=1e-6)
    for image in mixed[:, 0]:
        rows, columns = image.amax(1).nonzero(), image.amax(0).nonzero()
        if len(rows):
            assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    untouched = own.eq(1).float().mean()
    assert 0.4 < untouched < 0.6
    assert own.min() < 0.15
    assert 0.3 < own[own < 1].mean() < 0.8
    assert not cutmix(zeros, ones, torch.arange(n), AugmentSpec(cutmix=0.0), n, 0, 7)[0].any()


@pytest.mark.parametrize("world", [2, 4])
def test_cutmix_does_not_depend_on_the_split(spec: DataSpec, world: int) -> None:
    """A partner on another rank is the same image, augmented as it is there, and labels mix by area."""
    mixing = replace(spec, augment=AugmentSpec(crop=2, flip=True, cutmix=1.0))
    data, cpu = open_training_data(mixing, 3), torch.device("cpu")
    for step, batch in enumerate(data.batches(0, 3)):
        x, y = data.augmented(batch, cpu)
        assert torch.allclose(y.sum(1), torch.ones(24))
        parts = [data.augmented(b, cpu) for r in range(world) for b in data.batches(step, step + 1, r, world)]
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
        partners = cutmix_partners(24, 3, step)
        assert sorted(partners) == list(range(24))
        for row in range(24):
            mixed = set(y[row].nonzero().flatten().tolist())
            assert mixed <= {int(batch.labels[row]), int(batch.labels[partners[row]])}
