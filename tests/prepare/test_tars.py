"""The reader of WebDataset tars: exactly the samples, or one sentence that names tar and member."""

import io
import json
import subprocess
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from nrat_scale.core.errors import UserError
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import Classes
from nrat_scale.prepare.readers.tars import count_samples, read_tars
from tests.support.preparation import assert_refused, encoded, holds, is_one_sentence, npy, npy_header

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(12) * 5 % 7
TEN = Classes(names=tuple("0123456789"))


def _member(name: str, content: bytes, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def _samples(images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [
        member
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
        for member in (
            _member(f"{number:04d}.png", encoded(image, "PNG")),
            _member(f"{number:04d}.cls", b"%d" % label),
        )
    ]


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "a.b/c/", "ü/" * 80])
def test_samples_come_back_exactly(tmp_path, convert, form, folder):
    """The three tar formats, with names that need extended headers; dates and owners do not matter."""
    members = [(info.replace(name=folder + info.name, mtime=1.5, deep=False), data) for info, data in _samples()]
    if form == tarfile.USTAR_FORMAT:
        members = [(info.replace(mtime=1, deep=False), data) for info, data in members]
        if len(folder.encode()) > 200:
            pytest.skip("this format has no room for the name")
    path = _tar(tmp_path / "a.tar", *members, form=form)
    assert holds(convert("reshard", path), IMAGES, LABELS)


def test_tars_of_webdatasets_writer(tmp_path, convert):
    """Shards of webdataset.TarWriter with its own encoders, given by braces, are read in order."""
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{shard:04d}.tar")) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                image = Image.fromarray(IMAGES[number])
                writer.write({"__key__": f"{number:06d}", "png": image, "cls": int(LABELS[number])})
    shards = convert("reshard", f"{tmp_path}/{{0000..0001}}.tar", tmp_path / "0002.tar", "--dataset", "cifar10")
    assert holds(shards, IMAGES, LABELS)
    assert shards.dataset == "cifar10" and shards.class_names == DATASETS["cifar10"].class_names
    assert [file["name"] for file in shards.source_files] == ["0000.tar", "0001.tar", "0002.tar"]


@pytest.mark.parametrize(
    ("extension", "encode"),
    [
        ("png", lambda image: encoded(image, "PNG")),
        ("PNG", lambda image: encoded(image, "PNG")),
        ("webp", lambda image: encoded(image, "WEBP", lossless=True)),
        ("npy", npy),
        ("npy", lambda image: npy(np.asfortranarray(image))),
        ("jpg", lambda image: encoded(image, "JPEG")),
        ("jpeg", lambda image: encoded(image, "JPEG")),
    ],
)
def test_kinds_of_images(tmp_path, convert, extension, encode):
    """Lossless formats come back bit for bit, JPEG as Pillow decodes it."""
    members = []
    for number in range(12):
        members += [_member(f"{number}.{extension}", encode(IMAGES[number])), _member(f"{number}.cls", b"0\n")]
    expected = IMAGES
    if extension in ("jpg", "jpeg"):
        expected = np.stack([np.asarray(Image.open(io.BytesIO(encode(image)))) for image in IMAGES])
    assert holds(convert("reshard", _tar(tmp_path / "a.tar", *members)), expected, np.zeros(12))


LABEL_FORMS = [
    {"cls": b"3"},
    {"cls": b" 3\r\n"},
    {"json": b"3"},
    {"json": b'{"label": 3, "prompt": "a cat"}'},
    {"json": b'{"cls": 3}'},
    {"json": b'{"cls": 3, "label": 3}'},
    {"cls": b"3", "json": b'{"prompt": "a cat"}'},
    {"cls": b"3", "json": b'{"label": 3}'},
]


@pytest.mark.parametrize("form", LABEL_FORMS, ids=str)
def test_kinds_of_labels(tmp_path, form):
    """A number in text or JSON, by itself or as `label` or `cls`."""
    labels = [_member(f"a.{key}", value) for key, value in form.items()]
    path = _tar(tmp_path / "a.tar", _member("a.png", encoded(IMAGES[0], "PNG")), *labels)
    assert read_tars([str(path)], TEN, tmp_path).labels.tolist() == [3]


def test_grey_images(tmp_path, convert, cli):
    """All grey stays grey; grey among RGB, or for an RGB data set, becomes RGB; RGB never becomes grey."""
    grey = IMAGES[..., 0]
    all_grey = _tar(tmp_path / "grey.tar", *_samples(grey))
    assert holds(convert("reshard", all_grey), grey[..., None], LABELS)
    assert holds(convert("reshard", all_grey, "--dataset", "mnist"), grey[..., None], LABELS)
    assert holds(convert("reshard", all_grey, "--dataset", "svhn"), np.repeat(grey[..., None], 3, axis=3), LABELS)
    colours = _samples()
    colours[2] = _member("0001.png", encoded(grey[1], "PNG"))
    expected = IMAGES.copy()
    expected[1] = grey[1][..., None]
    assert holds(convert("reshard", _tar(tmp_path / "mixed.tar", *colours)), expected, LABELS)
    colours[0] = _member("0000.png", encoded(grey[0], "PNG"))
    result = cli("reshard", _tar(tmp_path / "b.tar", *colours), "--out", tmp_path / "b")
    assert result.status == 2 and "'0002' in the tar" in result.err and "RGB among grey" in result.err


def test_memory_stays_small(tmp_path):
    """Millions of images: they pass through memory one by one into a file that is mapped."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(400):
            image = npy(np.full((128, 128, 3), number % 251, np.uint8))
            writer.write({"__key__": f"{number:06d}", "npy": image, "cls": 0})
    tracemalloc.start()
    try:
        source = read_tars([str(tmp_path / "a.tar")], TEN, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6 < 400 * 128 * 128 * 3 / 6
    assert np.array_equal(source.images[np.arange(400)][:, 5, 5, 2], np.arange(400) % 251)


@pytest.mark.parametrize("arguments", [("folder",), ("--format=pax", "folder"), ("-C", "folder", ".")])
def test_tars_of_folders(tmp_path, convert, monkeypatch, arguments):
    """`tar --sort=name -cf x.tar folder` has entries for the folders, also with long names; they are skipped."""
    monkeypatch.chdir(tmp_path)
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = tmp_path / "folder" / f"part{number // 6}" / ("long" * 40) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "PNG"))
        path.with_suffix(".cls").write_text(str(label))
    subprocess.run(["tar", "--sort=name", "-cf", "x.tar", *arguments], check=True)
    assert holds(convert("reshard", "x.tar"), IMAGES, LABELS)


# ---- what is refused ------------------------------------------------------------------------------------------------

ONE = (_member("a.png", encoded(IMAGES[0], "PNG")), _member("a.cls", b"1"))
TWO = (_member("b.png", encoded(IMAGES[1], "PNG")), _member("b.cls", b"2"))


def _link(kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return _member("c.png", b"", type=kind, linkname="a.png")


def _labelled(**labels: bytes) -> tuple:
    return (ONE[0], *(_member(f"a.{key}", value) for key, value in labels.items()))


def _image(extension: str, content: bytes) -> tuple:
    return (_member(f"a.{extension}", content), ONE[1])


def _pax(**headers: str) -> tuple:
    return (_member("a.png", ONE[0][1], pax_headers=headers), ONE[1])


# name -> (members, words of the message)
MISTAKES: dict[str, tuple[tuple, tuple[str, ...]]] = {
    "nothing in it": ((), ("it is empty",)),
    "symbolic link": ((*ONE, _link(tarfile.SYMTYPE)), ("'c.png'", "plain file")),
    "hard link": ((*ONE, _link(tarfile.LNKTYPE)), ("'c.png'", "plain file")),
    "pipe": ((*ONE, _member("c", b"", type=tarfile.FIFOTYPE)), ("plain file",)),
    "device": ((*ONE, _member("c", b"", type=tarfile.CHRTYPE)), ("plain file",)),
    "absolute": ((*ONE, _member("/etc/b.png", b"")), ("'/etc/b.png'", "absolute")),
    "out of the folder": ((*ONE, _member("../b.png", b"")), ("'../b.png'", "leads out")),
    "out of the folder inside": ((*ONE, _member("x/../../b.png", b"")), ("leads out",)),
    "twice": ((*ONE, ONE[0]), ("'a.png'", "this member twice")),
    "twice with capitals": ((*ONE, _member("a.PNG", ONE[0][1])), ("'a.PNG'", "this member twice")),
    "sample twice": ((*ONE, *TWO, *ONE), ("'a.png'", "not adjacent")),
    "interleaved": ((ONE[0], TWO[0], ONE[1], TWO[1]), ("'a'", "sort the tar by name")),
    "not adjacent": ((*ONE, *TWO, _member("a.json", b"1")), ("'a.json'", "not adjacent")),
    "no label": ((ONE[0], *TWO), ("'a'", ".png, expected one image")),
    "no image": ((ONE[1], *TWO), ("'a'", ".cls, expected one image")),
    "two images": ((*ONE, _member("a.jpg", b"")), ("'a'", ".png, .cls, .jpg")),
    "only labels": ((ONE[1], _member("a.json", b"1")), (".cls, .json, expected one image",)),
    "caption": ((*ONE, _member("a.txt", b"a cat")), ("'a.txt'", "is not supported")),
    "pickle": ((*ONE, _member("a.pyd", b"")), ("'a.pyd'", "is not supported")),
    "images first": ((ONE[0], TWO[0], TWO[1], ONE[1]), ("'a'", "sort the tar by name")),
    "unsorted, not whole": ((ONE[0], TWO[0], TWO[1]), ("'a'", "expected one image")),
    "two dots": ((*ONE, _member("a.b.png", b"")), ("'a.b.png'", "first dot", "'a'", "'b.png'")),
    "two dots, label first": ((_member("v1.0/0001.v2.cls", b"1"), *ONE), ("first dot", "'v1.0/0001'", "'v2.cls'")),
    "hidden": ((*ONE, _member("._b.png", b"")), ("'._b.png'", "webdataset skips")),
    "no extension": ((*ONE, _member("README", b"")), ("'README'", "webdataset skips")),
    "meta": ((_member("__meta__/a.json", b"1"), *ONE), ("webdataset skips",)),
    "control characters": ((*ONE, _member("b\n\x1b[2J.txt", b"")), ("b\\n\\x1b[2J.txt",)),
    "not unicode": ((*ONE, _member("b\udcff.txt", b"")), ("'hdrcharset'", "not allowed")),
    "extended size": (_pax(size="5"), ("sets 'size'",)),
    "extended sparse": (_pax(**{"GNU.sparse.major": "1"}), ("sets 'GNU.sparse.major'",)),
    "large label": (_labelled(json=b" " * (1 << 20) + b"1"), ("'a.json'", "too many")),
    "label -1": (_labelled(cls=b"-1"), ("'a' in the tar", "-1")),
    "label K": (_labelled(cls=b"10"), ("'a' in the tar", "0..9")),
    "label endless": (_labelled(cls=b"9" * 30), ("'a' in the tar", "0..9")),
    "label too endless": (_labelled(json=b"9" * 5000), ("'a' in the tar", "not valid JSON")),
    "float in text": (_labelled(cls=b"1.0"), ("b'1.0'",)),
    "name in text": (_labelled(cls=b"cat"), ("b'cat'",)),
    "digits of elsewhere": (_labelled(cls="٣".encode()), ("expected a class number",)),
    "empty label": (_labelled(cls=b""), ("b''",)),
    "float in JSON": (_labelled(json=b"1.0"), ("no class number",)),
    "true": (_labelled(json=b"true"), ("no class number",)),
    "null": (_labelled(json=b"null"), ("no class number",)),
    "object of a float": (_labelled(json=b'{"label": 1.5}'), ("no class number",)),
    "object without": (_labelled(json=b'{"class": 1}'), ("no class number",)),
    "object of two": (_labelled(json=b'{"label": 1, "cls": 2}'), ("contradict",)),
    "object twice": (_labelled(json=b'{"label": 1, "label": 2}'), ("not valid JSON",)),
    "list": (_labelled(json=b"[1]"), ("no class number",)),
    "no JSON": (_labelled(json=b"{"), ("not valid JSON",)),
    "deep JSON": (_labelled(json=b"[" * 100_000), ("not valid JSON",)),
    "bytes as JSON": (_labelled(json=b"\xff\xfe"), ("not valid JSON",)),
    "labels contradict": (_labelled(cls=b"1", json=b"2"), ("contradict",)),
    "another size": ((*ONE, _member("b.png", encoded(IMAGES[0, :4], "PNG")), TWO[1]), ("'b'", "shape [4, 8, 3]")),
    "empty image": (_image("png", b""), ("'a'", "not a readable PNG")),
    "text": (_image("png", b"hello"), ("not a readable PNG",)),
    "JPEG called png": (_image("png", encoded(IMAGES[0], "JPEG")), ("not a readable PNG",)),
    "PNG called jpg": (_image("jpg", ONE[0][1]), ("not a readable JPEG",)),
    "cut PNG": (_image("png", ONE[0][1][:-30]), ("not a readable PNG",)),
    "cut JPEG": (_image("jpg", encoded(IMAGES[0], "JPEG")[:-60]), ("not a readable JPEG",)),
    "too large": (_image("png", encoded(np.zeros((1025, 3), np.uint8), "PNG")), ("3 x 1025",)),
    "transparent": (_image("png", encoded(np.zeros((8, 8, 4), np.uint8), "PNG")), ("mode RGBA",)),
    "16 bits": (_image("png", encoded(np.zeros((8, 8), np.uint16), "PNG")), ("mode I;16",)),
    "float array": (_image("npy", npy(IMAGES[0] / 255)), ("float64 [8, 8, 3]",)),
    "object array": (_image("npy", npy(np.array([{}, None]))), ("nothing is ever unpickled",)),
    "flat array": (_image("npy", npy(IMAGES[0].reshape(-1))), ("uint8 [192]",)),
    "four channels": (_image("npy", npy(np.zeros((8, 8, 4), np.uint8))), ("uint8 [8, 8, 4]",)),
    "batch": (_image("npy", npy(IMAGES)), ("uint8 [12, 8, 8, 3]",)),
    "empty array": (_image("npy", npy(IMAGES[:0])), ("is empty",)),
    "large array": (_image("npy", npy(np.zeros((1025, 8), np.uint8))), ("8 x 1025",)),
    "terabytes": (_image("npy", npy_header("(1000000, 1000000, 3)")), ("needs 3000000000000 bytes",)),
    "negative": (_image("npy", npy_header("(-8, -8, 3)") + bytes(192)), ("damaged",)),
    "cut array": (_image("npy", npy(IMAGES[0])[:-1]), ("cut short",)),
    "no array": (_image("npy", b"\x80\x04."), ("no readable .npy header",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_a_sentence(tmp_path, cli, name):
    """Exit status 2, one line that names the tar and the member, and nothing is left."""
    members, words = MISTAKES[name]
    path = _tar(tmp_path / "bad.tar", *members)
    assert_refused(cli, tmp_path, ["reshard", path, "--dataset", "cifar10"], str(path), *words)


NO_TARS = {
    "empty file": (b"", "it is empty"),
    "web page": (b"\n<!DOCTYPE html><html>" + b"x" * 600, "a web page"),
    "short web page": (b"<html>", "a web page"),
    "server's message": (b'{"error": "not found"}', "an error message of a server"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "compressed (gzip)"),
    "bzip2": (b"BZh9" + b"x" * 600, "compressed (bzip2)"),
    "xz": (b"\xfd7zXZ\x00" + bytes(600), "compressed (xz)"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed (zstd)"),
    "zip": (b"PK\x03\x04" + bytes(600), "compressed (zip)"),
    "text": (b"hello " * 200, "invalid header"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "one block of zeros": (bytes(512), "marker is missing"),
}


@pytest.mark.parametrize("name", NO_TARS)
def test_files_that_are_no_tars(tmp_path, cli, name):
    """Remains of failed downloads, and archives of other kinds."""
    content, words = NO_TARS[name]
    (tmp_path / "a.tar").write_bytes(content)
    assert is_one_sentence(cli("reshard", tmp_path / "a.tar", "--out", tmp_path / "out"), words, "a.tar")


def test_names_of_tars(tmp_path, cli, monkeypatch):
    """Missing, given twice, addresses, and names that webdataset would run as commands."""
    monkeypatch.chdir(tmp_path)
    _tar(tmp_path / "a.tar", *ONE)
    for names, words in [
        (["no.tar"], "There is no tar at no.tar"),
        (["."], "prepare folder . --out DIR"),
        (["{a..c}.tar"], "There is no tar at b.tar"),
        (["a.tar", "a.tar"], "a.tar is given twice"),
        (["a.tar", "./a.tar"], "is given twice"),
        (["https://example.org/a.tar"], "Download the tars first"),
        (["pipe:touch trap; cat a.tar"], "There is no tar at pipe:touch"),
    ]:
        assert is_one_sentence(cli("reshard", *names, "--out", "out"), words), names
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


# ---- fuzz -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """The bytes of a tar with all kinds of headers; its samples are images 0 and 1 with labels 1 and 2."""
    folder = tmp_path_factory.mktemp("fuzz")
    members = [
        _member("n/" * 60 + "a.npy", npy(IMAGES[0])),
        _member("n/" * 60 + "a.cls", b"1"),
        _member("b.png", encoded(IMAGES[1], "PNG"), mtime=2.5),
        _member("b.json", json.dumps({"label": 2}).encode()),
    ]
    content = _tar(folder / "a.tar", *members).read_bytes()
    end = len(content.rstrip(b"\0"))
    return content[: -(-end // 512) * 512 + 1024]  # with the shortest end that is allowed


def _outcome(path: Path, content: bytes, scratch: Path) -> str:
    path.write_bytes(content)
    try:
        source = read_tars([str(path)], TEN, scratch)
    except UserError as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else str(error)
    assert np.array_equal(source.images[np.arange(2)], IMAGES[:2]) and source.labels.tolist() == [1, 2]
    return "the same"


def _headers(content: bytes) -> list[int]:
    """Offsets of all header blocks, including extended headers and their content."""
    offsets, at = [], 0
    while content[at : at + 512].strip(b"\0"):
        info = tarfile.TarInfo.frombuf(content[at : at + 512], "utf-8", "surrogateescape")
        offsets.append(at)
        if info.type == tarfile.XHDTYPE:
            offsets.append(at + 512)
        at += 512 + -(-info.size // 512) * 512
    return offsets


def test_every_byte_of_every_header(tmp_path, fuzzed):
    """One flipped bit in each fourth byte of each header: refused, or exactly the same samples."""
    generator = np.random.default_rng(0)
    places = [offset + byte for offset in _headers(fuzzed) for byte in range(generator.integers(4), 512, 4)]
    counts: Counter[str] = Counter()
    for place in places:
        damaged = bytearray(fuzzed)
        damaged[place] ^= 1 << generator.integers(8)
        counts[_outcome(tmp_path / "a.tar", bytes(damaged), tmp_path)] += 1
    assert counts["refused"] + counts["the same"] == len(places), counts
    assert counts["refused"] > len(places) * 0.4
    assert counts["the same"] > 0  # the padding of an extended header means nothing


def test_every_cut_and_every_repetition(tmp_path, fuzzed):
    """Cut at every block and a little after it; blocks doubled, dropped or zeroed; data after the end."""
    blocks = [fuzzed[at : at + 512] for at in range(0, len(fuzzed), 512)]
    cuts = [b"".join(blocks[:count]) for count in range(len(blocks))]
    cuts += [b"".join(blocks[:count]) + blocks[count][:100] for count in range(len(blocks))]
    assert all(_outcome(tmp_path / "a.tar", content, tmp_path) == "refused" for content in cuts)
    for tail in (b"x", b"\0x", bytes(10240) + b"x", fuzzed):
        assert _outcome(tmp_path / "a.tar", fuzzed + tail, tmp_path) == "refused"
    for zeros in (1, 512, 10240):
        assert _outcome(tmp_path / "a.tar", fuzzed + bytes(zeros), tmp_path) == "the same"
    assert _outcome(tmp_path / "a.tar", fuzzed, tmp_path) == "the same"
    headers = {offset // 512 for offset in _headers(fuzzed)}
    for number in headers:
        doubled = [*blocks[: number + 1], *blocks[number:]]
        dropped = [*blocks[:number], *blocks[number + 1 :]]
        zeroed = [*blocks[:number], bytes(512), *blocks[number + 1 :]]
        for content in (doubled, dropped, zeroed):
            assert _outcome(tmp_path / "a.tar", b"".join(content), tmp_path) == "refused"


def test_what_is_accepted_is_read_as_webdataset_reads_it(tmp_path):
    """Random mixtures of odd members: an accepted tar has the same samples for webdataset."""
    generator = np.random.default_rng(1)
    odd = ["a.png", "a.cls", "b.png", "b.cls", "a.json", "x/a.png", "x/a.cls", "a.PNG", "._a.png", "__c__.png"]
    counts, image = Counter[str](), encoded(IMAGES[0], "PNG")
    for _ in range(300):
        members = [
            _member(name, image if name[-3:] == "png" else b"1")
            for name in generator.choice(odd, generator.integers(2, 7))
        ]
        if generator.random() < 0.5:
            members.sort(key=lambda member: member[0].name)
        path = _tar(tmp_path / "a.tar", *members)
        try:
            count = count_samples(path)
        except UserError:
            counts["refused"] += 1
            continue
        with open(path, "rb") as stream:
            samples = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
        assert [set(sample) & {"png", "PNG"} != set() for sample in samples] == [True] * count
        counts["read"] += 1
    assert counts["refused"] > 100 and counts["read"] > 5
