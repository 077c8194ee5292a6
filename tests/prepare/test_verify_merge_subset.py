"""Looking after shards: verify finds every damage, info tells, merge and subset keep each sample's name and bytes."""

import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.prepare import info, merge_subset, verify
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards

NAMES = ("plane", "cat", "ship")


def _source(num_images: int = 70, shape: tuple[int, int, int] = (8, 6, 3), seed: int = 0) -> LabelledArrays:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    facts = {"name": f"made{seed}.npz", "bytes": 5, "sha256": "0" * 64}
    return LabelledArrays(images, generator.integers(0, 3, num_images), "custom", NAMES, (facts,))


def _write(folder: Path, source: LabelledArrays | None = None, **options) -> Path:
    """70 images: three shards of 32, 32 and 6, in blocks of 16."""
    return write_shards(source or _source(), folder, block_size=16, shard_size=32, progress=False, **options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".verified.json"
    }


@pytest.fixture
def cli(capsys):
    """Run the command line in this process: its exit status and what it printed."""

    def run(*argv: object) -> SimpleNamespace:
        status = 0
        try:
            run_cli(lambda: prepare_cli.main([str(word) for word in argv]))
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def _refused(result: SimpleNamespace, words: str) -> bool:
    assert result.status == 2 and result.out == "" and result.err.startswith("error: "), result
    assert words in result.err and result.err.count("\n") == 1, result.err
    return True


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_whole_shards_pass(tmp_path, cli):
    """One line and exit status 0, with stored ids and merged too, and for some of the shards."""
    _write(tmp_path / "all" / "a")
    _write(tmp_path / "all" / "b", ids=np.arange(70)[::-1])
    assert cli("merge", tmp_path / "all/a", tmp_path / "all/b", "--out", tmp_path / "all/index.json").status == 0
    for where, shards in (("a", 3), ("b", 3), ("", 6), ("a/shard-{00000..00001}.tar", 2)):
        result = cli("verify", f"{tmp_path}/all/{where}")
        assert result.status == 0 and f"all {shards} shards" in result.out and result.out.count("\n") == 1
        assert result.err == ""


def test_every_unusable_shard_is_named(tmp_path, cli):
    """Not only the first: what has to be copied again is known at once, up to ten."""
    folder = write_shards(_source(), tmp_path / "a", block_size=4, shard_size=4, progress=False)  # 18 shards
    (folder / "shard-00003.tar").unlink()
    (folder / "shard-00005.tar").write_bytes(b"short")
    data = bytearray((folder / "shard-00007.tar").read_bytes())
    data[900] ^= 1
    (folder / "shard-00007.tar").write_bytes(data)
    result = cli("verify", folder)
    assert _refused(result, "has 3 problems")
    for words in ("shard-00003.tar: No such file", "shard-00005.tar: it has 5 bytes", "shard-00007.tar: its sha256"):
        assert words in result.err
    for path in folder.glob("*.tar"):
        path.unlink()
    result = cli("verify", folder)
    assert _refused(result, "has 18 problems") and result.err.count("No such file") == 10 and "8 more" in result.err


def _rehashed(folder: Path, shard: int, data: bytes) -> None:
    """Put `data` in the place of a shard, and let the index agree with it: only its content can betray it."""
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][shard]
    (folder / entry["name"]).write_bytes(data)
    entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def _block(folder: Path, shard: int, number: int) -> list[int]:
    return json.loads((folder / "index.json").read_text())["shards"][shard]["blocks"][number]


CONTENTS = {
    "tar header": (lambda d, b: d.__setitem__(slice(0, 8), b"xxxxxxxx"), "no tar header at byte 0"),
    "npy magic": (lambda d, b: d.__setitem__(slice(512, 514), b"xx"), "no readable .npy header"),
    "dtype": (lambda d, b: d.__setitem__(slice(0, b[0]), bytes(d[: b[0]]).replace(b"|u1", b"|i1")), "is not the array"),
    "shape": (lambda d, b: d.__setitem__(slice(0, b[0]), bytes(d[: b[0]]).replace(b"(16, 8, 6", b"(16, 6, 8")), "is not the array"),
    "label too high": (lambda d, b: d.__setitem__(slice(b[1], b[1] + 8), (3).to_bytes(8, "little")), "labels outside 0..2"),
    "negative label": (lambda d, b: d.__setitem__(slice(b[1], b[1] + 8), b"\xff" * 8), "labels outside 0..2"),
    "other label": (lambda d, b: d.__setitem__(b[1], (d[b[1]] + 1) % 3), "not those that the index counts"),
    "id too high": (lambda d, b: d.__setitem__(slice(b[3], b[3] + 8), (70).to_bytes(8, "little")), "ids outside 0..69"),
    "negative id": (lambda d, b: d.__setitem__(slice(b[3], b[3] + 8), b"\xff" * 8), "ids outside 0..69"),
    "same id twice": (lambda d, b: d.__setitem__(slice(b[3], b[3] + 8), d[b[3] + 8 : b[3] + 16]), "name two samples"),
    "something behind": (lambda d, b: d.__setitem__(-1, 1), "does not end where"),
    "cut end": (lambda d, b: d.__delitem__(slice(-9728, None)), "does not end where"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_content_that_contradicts_the_index_is_found(tmp_path, cli, name):
    """Hashes prove that a shard is the one that was indexed; that it is a right one is looked at, member by member."""
    damage, words = CONTENTS[name]
    folder = _write(tmp_path / "a", ids=np.arange(70))
    data = bytearray((folder / "shard-00001.tar").read_bytes())
    damage(data, _block(folder, 1, 0))
    assert data != (folder / "shard-00001.tar").read_bytes()
    _rehashed(folder, 1, bytes(data))
    result = cli("verify", folder)
    assert _refused(result, words) and (name == "same id twice" or "shard-00001.tar: " in result.err)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_a_changed_tar_that_passes_is_the_same_data(data):
    """Whatever byte of a shard is another, with the index in agreement: it is found, or it was a pixel, a tar header's
    spare bytes or a label that stays in its counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = _write(Path(name) / "a", _source(20, (4, 4, 1)))
        whole = (folder / "shard-00000.tar").read_bytes()
        block = _block(folder, 0, 0)
        place = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(0, block[0] - 1)))
        changed = bytearray(whole)
        changed[place] ^= data.draw(st.integers(1, 255))
        _rehashed(folder, 0, bytes(changed))
        try:
            verify.verify(str(folder))
        except UserError:
            return
        assert any(at <= place < at + 16 * n for b in (block, _block(folder, 0, 1)) for at, n in ((b[0], b[2]),)) or (
            np.array_equal(open_shards(folder).labels(np.arange(20)), _labels(whole, folder))
        )


def _labels(whole: bytes, folder: Path) -> np.ndarray:
    """The labels in the undamaged bytes of the first shard."""
    blocks = [_block(folder, 0, number) for number in range(2)]
    return np.concatenate([np.frombuffer(whole, "<i8", count, offset) for _, offset, count in blocks])


def test_verify_reads_an_address(tmp_path, cli, server, monkeypatch):
    """Shards behind an address are fetched and looked at; one that is missing there is named."""
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    server.files |= {f"/a/{name}": content for name, content in _bytes(_write(tmp_path / "a")).items()}
    result = cli("verify", f"{server.url}/a")
    assert result.status == 0 and "all 3 shards (70 images" in result.out
    shutil.rmtree(tmp_path / "cache")
    del server.files["/a/shard-00001.tar"]
    assert _refused(cli("verify", f"{server.url}/a"), "shard-00001.tar: ")


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info_tells_what_is_there(tmp_path, cli):
    """Counts, shape, classes with their numbers, source files and parts; nothing to warn of."""
    folder = _write(tmp_path / "a", seed=5)
    result = cli("info", folder)
    assert result.status == 0 and "70 images of shape [8, 6, 3] (custom) in 3 shards" in result.out
    for name, count in zip(NAMES, open_shards(folder).class_counts, strict=True):
        assert f"  {name}: {count}\n" in result.out
    assert "made0.npz, bytes 5, sha256 000000" in result.out
    assert "source ids 0..69, permuted with seed 5" in result.out and "warning" not in result.out
    assert "ids stored" in cli("info", _write(tmp_path / "b", ids=np.arange(70))).out


@pytest.mark.parametrize(
    ("labels", "warns"),
    [
        (np.sort(np.arange(600) % 3), True),
        (np.repeat(np.arange(60) % 3, 10), True),  # runs of ten
        (np.arange(600) % 3, False),  # more mixed than chance
        (np.random.default_rng(0).permutation(np.arange(600) % 3), False),
        (np.random.default_rng(0).permutation(np.r_[np.zeros(590, int), np.ones(10, int)]), False),  # hardly any others
        (np.zeros(600, int), False),  # one class
        (np.zeros(1, int), False),
    ],
)
def test_info_warns_of_an_order_sorted_by_class(tmp_path, cli, labels, warns):
    """Batches of one class spoil BatchNorm and the gradient: stored order must look like chance."""
    source = LabelledArrays(np.zeros((len(labels), 4, 4, 1), np.uint8), labels, "custom", NAMES)
    result = cli("info", _write(tmp_path / "a", source, ids=np.arange(len(labels))))
    assert result.status == 0 and ("warning: the stored order is sorted by class" in result.out) == warns


@pytest.mark.parametrize("shape", [(8, 6, 3), (16, 16, 1), (90, 70, 3)])
def test_a_contact_sheet_shows_each_class_in_its_row(tmp_path, cli, shape):
    """Samples of a class, and nothing else, stand in the row of the class; the sheet is never overwritten."""
    source = _source(shape=shape)
    source.images[:] = (source.labels * 100 + 20)[:, None, None, None]  # the colour tells the class
    sheet = tmp_path / "sheet.png"
    assert cli("info", _write(tmp_path / "a", source), "--sheet", sheet).status == 0
    picture = np.asarray(Image.open(sheet).convert("L"))
    height = len(picture) // 3
    for label in range(3):
        shown = set(np.unique(picture[label * height : (label + 1) * height, 140:])) - {255}
        assert shown == {label * 100 + 20}
    before = sheet.read_bytes()
    assert _refused(cli("info", tmp_path / "a", "--sheet", sheet), "exists already") and sheet.read_bytes() == before
    assert _refused(cli("info", tmp_path / "a", "--sheet", tmp_path / "sheet.gif"), ".png")
    assert _refused(cli("info", tmp_path / "a", "--sheet", tmp_path / "no" / "sheet.png"), "folder that exists")


def test_class_names_in_any_script_and_classes_without_images(tmp_path, cli):
    """A name that the font does not know, and a class of which there is nothing to show."""
    source = LabelledArrays(np.zeros((4, 4, 4, 3), np.uint8), np.zeros(4, np.int64), "custom", ("猫", "none"))
    assert cli("info", _write(tmp_path / "a", source), "--sheet", tmp_path / "sheet.png").status == 0


def test_info_of_an_address_fetches_only_the_index(tmp_path, cli, server, monkeypatch):
    """A look at 100 GB costs one small file."""
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    server.files["/a/index.json"] = _bytes(_write(tmp_path / "a"))["index.json"]
    result = cli("info", f"{server.url}/a")
    assert result.status == 0 and "70 images" in result.out and "was not looked at" in result.out


# ---- merge ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=15)
@given(sizes=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=4), nested=st.booleans())
def test_merged_shards_keep_every_sample_and_its_id(sizes, nested):
    """Ids of the k-th set are shifted by the id spaces before it; both ways round; merged sets can be merged again."""
    with tempfile.TemporaryDirectory() as name:
        parent, sources, ids, first_id = Path(name), [], [], 0
        folders = []
        for number, (num_images, stored) in enumerate(sizes):
            sources.append(_source(num_images, seed=number))
            own = np.random.default_rng(number).permutation(90)[:num_images] if stored else np.arange(num_images)
            options = {"ids": own, "num_ids": 100} if stored else {}
            folders.append(_write(parent / "sets" / f"set-{number}", sources[-1], **options))
            ids.append(first_id + own)
            first_id += 100 if stored else num_images
        merge_subset.merge(folders, parent / "sets" / "index.json")
        out = parent / "sets"
        if nested:
            merge_subset.merge([out], parent / "index.json")
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
    "not below": (lambda d: [d / "a", d / "b", "--out", d / "elsewhere" / "index.json"], "does not lie in"),
    "itself": (lambda d: [d, "--out", d / "index.json"], "does not lie in"),
    "twice": (lambda d: [d / "a", d / "b" / ".." / "a", "--out", d / "index.json"], "given twice"),
    "a folder as --out": (lambda d: [d / "a", d / "b", "--out", d], "must be PARENT/index.json"),
    "exists": (lambda d: [d / "a", "--out", d / "a" / "index.json"], "exists already"),
    "no shards": (lambda d: [d / "a", d / "nothing", "--out", d / "index.json"], "no shards"),
    "other shape": (lambda d: [d / "a", d / "small", "--out", d / "index.json"], "other image shape"),
    "other classes": (lambda d: [d / "a", d / "classes", "--out", d / "index.json"], "other classes"),
    "damaged": (lambda d: [d / "a", d / "damaged", "--out", d / "index.json"], "sha256"),
    "odd name": (lambda d: [d / "a", d / "with space", "--out", d / "index.json"], "Rename it"),
}


@pytest.mark.parametrize("name", MERGES)
def test_what_cannot_be_merged_is_refused(tmp_path, cli, name):
    """A sentence, and no index."""
    for folder in ("a", "b", "damaged", "with space"):
        _write(tmp_path / folder)
    _write(tmp_path / "small", _source(shape=(4, 4, 3)))
    source = _source()
    _write(tmp_path / "classes", LabelledArrays(source.images, source.labels, "custom", ("x", "y", "z")))
    data = bytearray((tmp_path / "damaged" / "shard-00000.tar").read_bytes())
    data[900] ^= 1
    (tmp_path / "damaged" / "shard-00000.tar").write_bytes(data)
    before = _bytes(tmp_path)
    argv, words = MERGES[name][0](tmp_path), MERGES[name][1]
    assert _refused(cli("merge", *argv), words)
    assert _bytes(tmp_path) == before


# ---- subset ---------------------------------------------------------------------------------------------------------


def _is_part_of(part: ShardSet, shards: ShardSet) -> np.ndarray:
    """The source ids of `part`, each of which names the same image and label in both."""
    ids = part.source_ids(np.arange(len(part)))
    there = shards.positions_of(ids)
    assert (there >= 0).all() and (np.diff(there) > 0).all()  # in stored order
    assert np.array_equal(part.images(part.positions_of(ids)), shards.images(there))
    assert np.array_equal(part.labels(part.positions_of(ids)), shards.labels(there))
    assert part.num_ids == shards.num_ids and part.source_files == shards.source_files
    return np.sort(ids)


def test_the_first_of_each_class(tmp_path, cli):
    """N of each class; a larger N holds a smaller one; another seed, other samples; the same whatever the block size."""
    shards = open_shards(_write(tmp_path / "a"))
    chosen = {}
    for number, options in enumerate([("5",), ("9",), ("5", "--seed", "1"), ("5", "--block-size", "3")]):
        out = tmp_path / f"out{number}"
        assert cli("subset", tmp_path / "a", "--out", out, "--per-class", *options).status == 0
        part = open_shards(out)
        part.verify()
        assert set(part.class_counts) == {int(options[0])}
        chosen[number] = set(_is_part_of(part, shards))
    assert chosen[0] < chosen[1] and chosen[0] == chosen[3] != chosen[2]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(ids=st.lists(st.integers(0, 69), min_size=1, unique=True), text=st.booleans(), jobs=st.integers(1, 2))
def test_the_ids_of_a_file(ids, text, jobs):
    """.npy or .txt, in any order; and a subset of a subset still knows the first names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = open_shards(_write(folder / "a"))
        for source, out, wanted in (("a", "b", ids), ("b", "c", ids[: len(ids) // 2 + 1])):
            path = folder / ("ids.txt" if text else "ids.npy")
            if text:
                path.write_text("\n".join(map(str, wanted)) + "\n")
            else:
                np.save(path, np.array(wanted, np.int32))
            merge_subset.subset(str(folder / source), folder / out, ids=path, jobs=jobs, progress=False)
            assert _is_part_of(open_shards(folder / out), shards).tolist() == sorted(wanted)
            verify.verify(str(folder / out))


@pytest.mark.parametrize(
    ("keep", "number"), [("7", 7), ("0.5", 35), ("1.0", 70), ("0.001", 1), ("70", 70), ("1e-1", 7)]
)
def test_the_highest_scores(tmp_path, cli, keep, number):
    """The audit's score, by source id: the highest stay; of equal ones those with the lowest ids."""
    shards = open_shards(_write(tmp_path / "a"))
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
    "objects": (lambda d: ["--ids", _saved(d / "x.npy", np.array([None]))], "no .npy file of numbers"),
    "no npy": (lambda d: ["--ids", _text(d / "x.npy", "text")], "no .npy file of numbers"),
    "duplicate": (lambda d: ["--ids", _text(d / "x.txt", "4 5 4")], "source id 4, more than once".replace(",", "")),
    "unknown": (lambda d: ["--ids", _text(d / "x.txt", "4 70 71")], "source id 70, which"),
    "negative": (lambda d: ["--ids", _text(d / "x.txt", "-1")], "source id -1"),
    "NaN": (lambda d: ["--scores", _saved(d / "x.npy", np.r_[np.ones(69), np.nan]), "--keep", 3], "NaN, for instance for the source id 69"),
    "too few scores": (lambda d: ["--scores", _saved(d / "x.npy", np.ones(69)), "--keep", 3], "69 numbers, expected 70"),
    "bool scores": (lambda d: ["--scores", _saved(d / "x.npy", np.ones(70, bool)), "--keep", 3], "dtype bool"),
    **{
        f"keep {keep}": (lambda d, keep=keep: ["--scores", _saved(d / "x.npy", np.ones(70)), f"--keep={keep}"], "--keep")
        for keep in ("0", "71", "0.0", "1.5", "-0.5", "-3", "nan", "inf", "half", "³")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SUBSETS)
def test_an_impossible_subset_is_refused(tmp_path, cli, name):
    """A sentence, and no --out."""
    _write(tmp_path / "a")
    make, words = SUBSETS[name]
    result = cli("subset", tmp_path / "a", "--out", tmp_path / "new" / "out", *make(tmp_path))
    assert _refused(result, words) and not (tmp_path / "new").exists()


def test_a_subset_goes_on_after_a_kill_only_with_the_same_ids(tmp_path, monkeypatch):
    """What stands for the input is the fingerprint of the shards: another list of ids must not mix with it."""
    _write(tmp_path / "a")
    real, calls = merge_subset._Chosen.__getitem__, []

    def fails(self, rows):
        calls.append(rows)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        return real(self, rows)

    sizes = {"block_size": 8, "shard_size": 16, "progress": False}
    for name, ids in (("x.txt", range(60)), ("y.txt", range(1, 61))):
        _text(tmp_path / name, " ".join(map(str, ids)))
    with monkeypatch.context() as patched:
        patched.setattr(merge_subset._Chosen, "__getitem__", fails)
        with pytest.raises(UserError, match="goes on"):
            merge_subset.subset(str(tmp_path / "a"), tmp_path / "b", ids=tmp_path / "x.txt", **sizes)
    with pytest.raises(UserError, match="other input or options"):
        merge_subset.subset(str(tmp_path / "a"), tmp_path / "b", ids=tmp_path / "y.txt", **sizes)
    merge_subset.subset(str(tmp_path / "a"), tmp_path / "b", ids=tmp_path / "x.txt", **sizes)
    merge_subset.subset(str(tmp_path / "a"), tmp_path / "c", ids=tmp_path / "x.txt", **sizes)
    assert _bytes(tmp_path / "b") == _bytes(tmp_path / "c")


def test_a_sheet_is_a_png(tmp_path):
    """The bytes are what the name says."""
    content = info._contact_sheet(open_shards(_write(tmp_path / "a")))
    assert Image.open(io.BytesIO(content)).format == "PNG"
