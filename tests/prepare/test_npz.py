"""The npz reader: exactly the images in source order, memory-mapped, or one plain sentence."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare import __main__ as command_line
from nrat_scale.prepare.input import NUMBERED
from nrat_scale.prepare.readers import checks
from nrat_scale.prepare.readers.npz import read_npz
from tests.support.preparation import (
    CallOnUnpickling,
    assert_refused,
    facts,
    flip_bit,
    holds,
    is_one_sentence,
    npy,
    npy_header,
    random_images,
)  # fmt: skip

IMAGES, LABELS = random_images(20)
SAVES = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])


@SAVES
@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4", "uint64"])
def test_npz_comes_back_exactly(tmp_path, convert, save, dtype):
    """Stored and compressed files, labels of any integer type: images and labels equal the input in source order."""
    images, labels = random_images()
    save(tmp_path / "a.npz", image=images, label=labels.astype(dtype))
    shards = convert("npz", tmp_path / "a.npz")
    assert holds(shards, images, labels)
    assert shards.dataset == "custom" and shards.class_names == tuple("0123456789")
    assert shards.source_files == facts(tmp_path / "a.npz")
    assert not np.array_equal(shards.labels(np.arange(100)), labels)  # permuted: the source is sorted by class


def test_npz_in_other_layouts(tmp_path, convert):
    """Channels first, no channel axis, Fortran order and another order of the members mean the same images."""
    images, labels = random_images()
    np.savez(tmp_path / "nchw.npz", label=labels, image=images.transpose(0, 3, 1, 2).copy(), other=np.zeros(3))
    np.savez(tmp_path / "grey.npz", image=images[..., 0], label=labels)
    np.savez(tmp_path / "grey_nchw.npz", image=images[:, None, :, :, 0], label=labels)
    np.savez(tmp_path / "fortran.npz", image=np.asfortranarray(images), label=labels)
    np.savez_compressed(tmp_path / "fortran2.npz", image=np.asfortranarray(images), label=labels)
    for name in ("nchw", "fortran", "fortran2"):
        assert holds(convert("npz", tmp_path / f"{name}.npz"), images, labels)
    for name in ("grey", "grey_nchw"):
        assert holds(convert("npz", tmp_path / f"{name}.npz"), images[..., :1], labels)


@pytest.mark.parametrize("dtype", ["uint8", ">i8", "bool"])
def test_one_hot_labels_are_converted(dtype):
    """[N, K] of zeros and one 1 per row, integers or booleans, in any memory order, are class numbers."""
    labels = np.random.default_rng(0).integers(0, 3, 70_000)  # more rows than are converted at a time
    one_hot = np.eye(3, dtype=dtype)[labels]
    for array in (one_hot, np.asfortranarray(one_hot)):
        assert np.array_equal(checks.as_labels(array, len(labels), "it"), labels)


def test_several_files_are_one_data_set_in_the_given_order(tmp_path, convert):
    """Generated sets come in several files, any of which may be compressed: ids run through all of them."""
    parts = [random_images(n, seed=n, num_classes=k) for n, k in [(30, 3), (1, 1), (69, 12)]]
    paths = [tmp_path / f"part{i}.npz" for i in range(3)]
    for path, (images, labels), save in zip(paths, parts, [np.savez, np.savez_compressed, np.savez], strict=True):
        save(path, image=images, label=labels)
    shards = convert("npz", *paths)
    assert holds(shards, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    assert shards.source_files == facts(*paths)
    assert shards.num_classes == 12  # of all files together


def test_dataset_sets_the_class_names(tmp_path, convert):
    """--dataset brings the class names, even if the last classes do not occur."""
    images, labels = random_images(num_classes=7)
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    shards = convert("npz", tmp_path / "a.npz", "--dataset", "cifar10")
    assert shards.dataset == "cifar10" and shards.class_names == DATASETS["cifar10"].class_names
    assert shards.class_counts[7:] == (0, 0, 0)


@SAVES
def test_npz_needs_little_memory(tmp_path, save):
    """The published files have up to 150 GB: images stay on disk, and only blocks pass through memory."""
    images = np.zeros((20_000, 32, 32, 3), np.uint8)  # 61 MB
    images[:, 0, 0, 0] = np.arange(20_000) % 251
    save(tmp_path / "big.npz", image=images, label=np.arange(20_000) % 10)
    size = images.nbytes
    del images
    tracemalloc.start()
    try:
        command_line.main(["npz", str(tmp_path / "big.npz"), "--out", str(tmp_path / "out")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 14e6 < size / 4  # a block has 1.6 MB and exists as gathered, serialised and written
    shards = open_shards(tmp_path / "out")
    assert np.array_equal(shards.images(np.arange(20_000))[:, 0, 0, 0], shards.source_ids(np.arange(20_000)) % 251)


def test_a_stored_member_is_mapped_in_place(tmp_path):
    """Only compressed members are written to the scratch folder: a stored file needs no second copy on disk."""
    for number, save in enumerate([np.savez, np.savez_compressed]):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        save(tmp_path / "a.npz", image=IMAGES, label=LABELS)
        read_npz([str(tmp_path / "a.npz")], NUMBERED, scratch)
        assert len(list(scratch.iterdir())) == 2 * number  # `image` and `label`


@SAVES
def test_any_damaged_byte_of_an_npz_is_noticed(tmp_path, save):
    """Any flipped bit ends in a sentence, unless it does not change the data."""
    images, labels = random_images(12, (4, 4, 1))
    save(tmp_path / "a.npz", image=images, label=labels)
    whole = (tmp_path / "a.npz").read_bytes()
    generator, noticed, unchanged = np.random.default_rng(0), 0, 0
    for place in generator.permutation(len(whole))[:300]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.integers(8)
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            source = read_npz([str(tmp_path / "b.npz")], NUMBERED, tmp_path)
        except UserError as error:
            noticed += "b.npz" in str(error)
        else:
            assert np.array_equal(source.images[np.arange(12)], images) and np.array_equal(source.labels, labels)
            unchanged += 1
    assert noticed + unchanged == 300 and noticed > 150


# ---- mistakes -------------------------------------------------------------------------------------------------------

# name -> (`label` of an npz whose `image` is right, words of the message)
BAD_LABELS = {
    "floats": (LABELS * 1.0, "expected integers"),
    "booleans": (LABELS > 1, "expected integers"),
    "text": (LABELS.astype("U1"), "expected integers"),
    "a scalar": (np.int64(3), "expected [20]"),
    "a column": (LABELS[:, None], "expected [20]"),
    "two-hot": (np.ones((20, 2), int), "row 0 is not one-hot"),
    "probabilities": (np.full((20, 2), 0.5), "row 0 is not one-hot"),
    "scores": (2 * np.eye(10, dtype=int)[LABELS], "row 0 is not one-hot"),
    "too few": (LABELS[1:], "shape [19], expected [20]"),
    "negative": (LABELS - 1, "from -1 to 8"),
    "absurd": (LABELS + 10**12, "1000000000009"),
    "huge": (LABELS.astype("u8") + np.uint64(2**63), "9223372036854775817"),
    "a program": (np.array([CallOnUnpickling(os.mkdir, "trap")] * 20), "nothing is ever unpickled"),
}
# The same for `image`.
BAD_IMAGES = {
    "floats": (IMAGES / 255, "float64, expected uint8"),
    "int8": (IMAGES.view("i1"), "int8, expected uint8"),
    "flat": (IMAGES.reshape(20, -1), "shape [20, 192]"),
    "five axes": (IMAGES[None], "shape [1, 20, 8, 8, 3]"),
    "four channels": (np.zeros((20, 8, 8, 4), "u1"), "1 or 3 channels"),
    "no images": (IMAGES[:0], "empty"),
    "objects": (np.array([None] * 20), "nothing is ever unpickled"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused(tmp_path, cli, monkeypatch, name):
    """A sentence that names the member and what was expected; nothing runs, nothing is left."""
    monkeypatch.chdir(tmp_path)
    label, words = BAD_LABELS[name]
    np.savez(tmp_path / "a.npz", image=IMAGES, label=label)
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz"], "`label` in", words)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(tmp_path, cli, name):
    """Only uint8 of three or four axes with 1 or 3 channels."""
    image, words = BAD_IMAGES[name]
    np.savez(tmp_path / "a.npz", image=image, label=LABELS)
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz"], "`image` in", words)


# name -> (bytes of image.npy, words of the message)
BAD_MEMBERS = {
    "cut short": (npy(IMAGES)[:-7], "cut short"),
    "too long": (npy(IMAGES) + b"x", "needs 3840"),
    "empty": (b"", "damaged"),
    "not an npy": (b"GIF89a" * 99, ".npy header"),
    "negative shape": (npy_header("(-2, -2, 3)") + b"x" * 12, "damaged"),
    "endless shape": (npy_header(f"({9**99}, 8, 3)"), "cut short"),
    "terabytes": (npy_header("(1000000000000,)", "<i8"), "needs 8000000000000 bytes"),
    "header with a call": (npy_header("(1, 8, 3)", fortran_order="exit(0)"), ".npy header"),
    "header without end": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 50_000, ".npy header"),
    "future version": (b"\x93NUMPY\x09\x00" + bytes(99), ".npy header"),
}


def _zipped(path: Path, image: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("image.npy", image)
        archive.writestr("label.npy", npy(LABELS))
    return path


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members_are_refused(tmp_path, cli, name):
    """Whatever the .npy header states, no memory is reserved for it and nothing in it runs."""
    content, words = BAD_MEMBERS[name]
    assert_refused(cli, tmp_path, ["npz", _zipped(tmp_path / "a.npz", content)], "a.npz", words)


def test_damaged_and_unusual_zips_are_refused(tmp_path, cli):
    """Checksums are verified for stored and for compressed members; other methods are refused."""
    for method, words in ((zipfile.ZIP_STORED, "Bad CRC-32 for file 'image.npy'"), (zipfile.ZIP_DEFLATED, "damaged")):
        path = _zipped(tmp_path / f"{method}.npz", npy(IMAGES), method)
        flip_bit(path, 1500)  # in the pixels
        assert_refused(cli, tmp_path, ["npz", path], words)
    path = _zipped(tmp_path / "lzma.npz", npy(IMAGES), zipfile.ZIP_LZMA)
    assert_refused(cli, tmp_path, ["npz", path], "compression is not supported")


def test_files_that_are_no_npz_are_refused(tmp_path, cli):
    """Missing, a folder, other content, cut short, or without the right members."""
    whole = io.BytesIO()
    np.savez(whole, image=IMAGES, label=LABELS)
    for content in (b"PK but not really", b"", whole.getvalue()[:-40]):
        (tmp_path / "a.npz").write_bytes(content)
        assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz"], "a.npz is damaged or cut short")
    assert_refused(cli, tmp_path, ["npz", tmp_path / "no.npz"], "There is no npz file at", "no.npz")
    assert_refused(cli, tmp_path, ["npz", tmp_path], "Is a directory")
    np.savez(tmp_path / "b.npz", images=IMAGES, label=LABELS)
    assert_refused(cli, tmp_path, ["npz", tmp_path / "b.npz"], "no member `image`. It has: 'images', 'label'")
    np.savez(tmp_path / "b.npz", image=IMAGES)
    assert_refused(cli, tmp_path, ["npz", tmp_path / "b.npz"], "no member `label`")


def test_files_that_do_not_match_are_refused(tmp_path, cli):
    """Another image shape in the second file, a second file that is missing, another data set than --dataset says."""
    np.savez(tmp_path / "a.npz", image=IMAGES, label=LABELS + 1)
    np.savez(tmp_path / "b.npz", image=IMAGES[:, :4], label=LABELS)
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz", tmp_path / "b.npz"], "b.npz have shape [4, 8, 3]")
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz", tmp_path / "c.npz"], "no npz file at")
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz", "--dataset", "cifar10"], "from 1 to 10")
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npz", "--dataset", "mnist"], "3 channel(s)")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_an_end_while_decompressing_leaves_nothing(tmp_path, cli, monkeypatch, error, status):
    """Ctrl-C and a full disk before the first shard."""

    def fails(self, *arguments):
        raise error

    np.savez_compressed(tmp_path / "a.npz", image=IMAGES, label=LABELS)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fails)
    result = cli("npz", tmp_path / "a.npz", "--out", tmp_path / "new" / "out")
    assert result.status == status and ("No space left" in result.err) == (status == 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


# ---- files on the Hub -----------------------------------------------------------------------------------------------


def test_an_npz_on_the_hub_is_downloaded_and_converted(tmp_path, cli, server, monkeypatch):
    """hf:// files of a data set, at a revision if one is given; a missing file is a sentence."""
    import huggingface_hub

    def download(*arguments, **options):
        return real(*arguments, **options, endpoint=server.url, cache_dir=tmp_path / "hub")

    real = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = io.BytesIO()
    np.savez(content, image=IMAGES, label=LABELS)
    for revision in ("main", "v2"):
        server.files[f"/datasets/someone/generated/resolve/{revision}/cifar10/1m.npz"] = content.getvalue()
    for number, repo in enumerate(["someone/generated", "someone/generated@v2"]):
        out = tmp_path / f"out{number}"
        result = cli("npz", f"hf://datasets/{repo}/cifar10/1m.npz", "--out", out)
        assert result.status == 0, result.err
        assert result.out == f"{out}: 20 images of 10 classes (custom) in 1 shard, 0.0 MB\n"
        assert holds(open_shards(out), IMAGES, LABELS)
        assert open_shards(out).source_files[0]["name"] == "1m.npz"
    missing = cli("npz", "hf://datasets/someone/generated/cifar10/2m.npz", "--out", tmp_path / "out2")
    assert is_one_sentence(missing, "hf://datasets/someone/generated/cifar10/2m.npz cannot be fetched", "404")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://example.org/1m.npz", "hf://datasets/USER/REPO"),
        ("hf://someone/model/1m.npz", "hf://datasets/USER/REPO"),
        ("hf://datasets/--/..bad/1m.npz", "cannot be fetched"),
        ("hf://datasets/someone/generated", "is a repository. Give a file in it"),
    ],
)
def test_other_addresses_are_refused(tmp_path, cli, address, words):
    """Only files of data sets on the Hub are fetched."""
    assert_refused(cli, tmp_path, ["npz", address], address, words)
