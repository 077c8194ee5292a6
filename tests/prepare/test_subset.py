"""Subsets of shards: the selected samples under their source ids; impossible selections are refused."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.prepare.subset import subset
from nrat_scale.prepare.verify import verify
from tests.support.preparation import assert_refused, random_source, small_shards
from tests.support.sidecars import write_sidecar


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """70 samples of three classes."""
    return small_shards(tmp_path_factory.mktemp("subset") / "a")


def _is_part_of(part: ShardSet, shards: ShardSet) -> np.ndarray:
    """The source ids of `part`, after a check that each names the same image and label in both."""
    ids = part.source_ids(np.arange(len(part)))
    there = shards.positions_of(ids)
    assert (there >= 0).all() and (np.diff(there) > 0).all()  # in stored order
    assert np.array_equal(part.images(part.positions_of(ids)), shards.images(there))
    assert np.array_equal(part.labels(part.positions_of(ids)), shards.labels(there))
    assert part.num_ids == shards.num_ids and part.source_files == shards.source_files
    return np.sort(ids)


def test_the_first_of_each_class(tmp_path, cli):
    """N of each class; a larger N contains a smaller one; the choice depends on the seed, not on the block size."""
    shards = open_shards(small_shards(tmp_path / "a"))
    chosen = {}
    for number, options in enumerate([("5",), ("9",), ("5", "--seed", "1"), ("5", "--block-size", "3")]):
        out = tmp_path / f"out{number}"
        assert cli("subset", tmp_path / "a", "--out", out, "--per-class", *options).status == 0
        part = open_shards(out)
        part.verify()
        assert set(part.class_counts) == {int(options[0])}
        chosen[number] = set(_is_part_of(part, shards))
    assert chosen[0] < chosen[1] and chosen[0] == chosen[3] != chosen[2]


def test_none_of_another_subset(tmp_path, cli):
    """--without leaves the next ones of the same order; what is no subset of the shards, or leaves too few, is refused."""
    shards = open_shards(small_shards(tmp_path / "a"))
    assert cli("subset", tmp_path / "a", "--per-class", "9", "--out", tmp_path / "nine").status == 0
    assert cli("subset", tmp_path / "a", "--per-class", "4", "--out", tmp_path / "four").status == 0
    without = ("subset", tmp_path / "a", "--without", tmp_path / "four")
    assert cli(*without, "--per-class", "5", "--out", tmp_path / "five").status == 0
    nine, four, five = (set(_is_part_of(open_shards(tmp_path / name), shards)) for name in ("nine", "four", "five"))
    assert not four & five and four | five == nine
    small_shards(tmp_path / "other", random_source(seed=5))
    other = ["subset", tmp_path / "a", "--without", tmp_path / "other", "--per-class", "2"]
    for words, sentence in {
        (*without, "--ids", "x.txt"): "--without needs --per-class",
        (*without, "--scores", "x.npy", "--keep", "3"): "--without needs --per-class",
        (*without, "--per-class", "60"): "images left. Lower --per-class (60)",
        tuple(other): "is no subset of",
    }.items():
        assert_refused(cli, tmp_path, list(words), sentence)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(ids=st.lists(st.integers(0, 69), min_size=1, unique=True), text=st.booleans())
def test_the_ids_of_a_file(ids, text):
    """.npy or .txt, in any order; a subset of a subset keeps the original source ids."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = open_shards(small_shards(folder / "a"))
        for source, out, wanted in (("a", "b", ids), ("b", "c", ids[: len(ids) // 2 + 1])):
            path = folder / ("ids.txt" if text else "ids.npy")
            if text:
                path.write_text("\n".join(map(str, wanted)) + "\n")
            else:
                np.save(path, np.array(wanted, np.int32))
            subset(str(folder / source), folder / out, ids=path, progress=False)
            assert _is_part_of(open_shards(folder / out), shards).tolist() == sorted(wanted)
            verify(str(folder / out))


def test_the_most_confident_of_each_class(tmp_path, cli):
    """The N of each class whose label an audit finds most probable, ties by lowest id, as the published 1M set was selected."""
    shards = open_shards(small_shards(tmp_path / "a"))
    p_given = np.random.default_rng(0).integers(0, 6, 70).astype(np.float32) / 8  # many ties
    write_sidecar(tmp_path / "a-audit", shards, np.ones(70), p_given=p_given)
    ids, labels = shards.source_ids(np.arange(70)), shards.labels(np.arange(70))
    expected = []
    for label in range(3):
        members = sorted(np.flatnonzero(labels == label), key=lambda row: (-p_given[row], ids[row]))
        expected += ids[members[:9]].tolist()
    for number, audit in enumerate(([], [tmp_path / "a-audit"], [tmp_path / "a-audit" / "scores"])):
        out = tmp_path / f"out{number}"
        argv = ["subset", tmp_path / "a", "--per-class", "9", "--seed", number, "--out", out]
        assert cli(*argv, "--by-confidence", *audit).status == 0
        assert _is_part_of(open_shards(out), shards).tolist() == sorted(expected)
        verify(str(out))
    assert len({(tmp_path / f"out{number}" / "shard-00000.tar").read_bytes() for number in range(3)}) == 1


def test_confidences_that_do_not_fit(tmp_path, cli):
    """Of other shards, of noisy labels, of nothing, or without a number: refused, and nothing is written."""
    shards, other = open_shards(small_shards(tmp_path / "a")), open_shards(small_shards(tmp_path / "b", seed=1))
    labels = shards.labels(np.arange(70))
    write_sidecar(tmp_path / "others", other, np.ones(70))
    write_sidecar(tmp_path / "noisy", shards, np.ones(70), given=(labels + 1) % 3, noise={"kind": "symmetric"})
    write_sidecar(tmp_path / "good", shards, np.ones(70))
    for audit, more, message in (
        ([tmp_path / "others"], ["--per-class", "2"], "are of other shards"),
        (
            [tmp_path / "noisy"],
            ["--per-class", "2"],
            "differ from the stored ones. Audit without --noise",
        ),
        ([], ["--per-class", "2"], "a-audit (--by-confidence) has no scores of an audit"),
        ([tmp_path / "good"], ["--ids", tmp_path / "x.npy"], "--by-confidence needs --per-class N"),
        ([tmp_path / "good"], ["--per-class", "60"], "has only"),
    ):
        found = cli("subset", tmp_path / "a", "--out", tmp_path / "out", *more, "--by-confidence", *audit)
        assert found.status == 2 and message in found.err, found.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keep", "number"), [("7", 7), ("0.5", 35), ("1.0", 70), ("0.001", 1), ("70", 70), ("1e-1", 7)]
)
def test_the_highest_scores(tmp_path, cli, keep, number):
    """Scores are by source id: the highest are kept, ties by lowest id."""
    shards = open_shards(small_shards(tmp_path / "a"))
    scores = np.random.default_rng(0).integers(0, 9, 70).astype(np.float32)
    scores[3] = np.inf
    np.save(tmp_path / "scores.npy", scores)
    argv = ["subset", tmp_path / "a", "--out", tmp_path / "b", "--scores", tmp_path / "scores.npy", "--keep", keep]
    assert cli(*argv).status == 0
    expected = sorted(range(70), key=lambda i: (-scores[i], i))[:number]
    assert _is_part_of(open_shards(tmp_path / "b"), shards).tolist() == sorted(expected)


def _saved(path: Path, array: object) -> Path:
    np.save(path, array)
    return path


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


SUBSETS = {
    "none": (lambda d: [], "exactly one selection"),
    "two": (lambda d: ["--per-class", 1, "--ids", d / "x"], "exactly one selection"),
    "keep alone": (lambda d: ["--keep", "0.5"], "exactly one selection"),
    "keep with ids": (lambda d: ["--ids", d / "x", "--keep", "3"], "exactly one selection"),
    "scores without keep": (lambda d: ["--scores", d / "x.npy"], "exactly one selection"),
    "too many per class": (lambda d: ["--per-class", 40], "has only"),
    "no such file": (lambda d: ["--ids", d / "x.npy"], "No such file"),
    "no such text": (lambda d: ["--ids", d / "x.txt"], "No such file"),
    "no number": (lambda d: ["--ids", _text(d / "x.txt", "1\ntwo\n")], "one integer on each line"),
    "huge number": (lambda d: ["--ids", _text(d / "x.txt", "9" * 40)], "one integer on each line"),
    "empty": (lambda d: ["--ids", _text(d / "x.txt", "\n")], "is empty"),
    "float ids": (lambda d: ["--ids", _saved(d / "x.npy", np.ones(3))], "expected integers"),
    "huge id": (lambda d: ["--ids", _saved(d / "x.npy", np.array([2**64 - 1], "u8"))], "18446744073709551615"),
    "ids in two dimensions": (lambda d: ["--ids", _saved(d / "x.npy", np.ones((2, 2), int))], "one dimension"),
    "objects": (lambda d: ["--ids", _saved(d / "x.npy", np.array([None]))], "not an .npy file of numbers"),
    "no npy": (lambda d: ["--ids", _text(d / "x.npy", "text")], "not an .npy file of numbers"),
    "duplicate": (lambda d: ["--ids", _text(d / "x.txt", "4 5 4")], "source id 4 more than once"),
    "unknown": (lambda d: ["--ids", _text(d / "x.txt", "4 70 71")], "source id 70, which"),
    "negative": (lambda d: ["--ids", _text(d / "x.txt", "-1")], "source id -1"),
    "NaN": (lambda d: ["--scores", _saved(d / "x.npy", np.r_[np.ones(69), np.nan]), "--keep", 3], "NaN, first for the source id 69"),
    "too few scores": (lambda d: ["--scores", _saved(d / "x.npy", np.ones(69)), "--keep", 3], "69 numbers, expected 70"),
    "bool scores": (lambda d: ["--scores", _saved(d / "x.npy", np.ones(70, bool)), "--keep", 3], "dtype bool"),
    **{
        f"keep {keep}": (lambda d, keep=keep: ["--scores", _saved(d / "x.npy", np.ones(70)), f"--keep={keep}"], "--keep")
        for keep in ("0", "71", "0.0", "1.5", "-0.5", "-3", "nan", "inf", "half", "³")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SUBSETS)
def test_an_impossible_subset_is_refused(shards, tmp_path, cli, name):
    """A sentence, and no --out."""
    make, words = SUBSETS[name]
    selection = make(tmp_path)
    assert_refused(cli, tmp_path, ["subset", shards, *selection], words)
