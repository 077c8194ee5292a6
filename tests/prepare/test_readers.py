"""The readers of CIFAR-100, SVHN, Tiny ImageNet and CIFAR-10N: exactly the images, or one plain sentence."""

import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import nrat_scale.prepare.readers.tiny_imagenet
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.datasets import DATASETS
from nrat_scale.labels import HUMAN_SETS, load_human_labels
from nrat_scale.prepare import cifar10n
from nrat_scale.prepare.readers import cifar, svhn
from nrat_scale.prepare.readers import images as images_module


def _random(
    num_images: int, shape: tuple[int, ...] = (32, 32, 3), num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(num_images)
    return generator.integers(0, 256, (num_images, *shape), dtype=np.uint8), np.arange(num_images) * 7 % num_classes


def _same(shards: ShardSet, images: np.ndarray, labels: np.ndarray) -> bool:
    order = shards.in_source_order()
    return np.array_equal(shards.images(order), images) and np.array_equal(shards.labels(order), labels)


def _is_one_sentence(result, *words: str) -> bool:
    """Exit status 2, one line that names what is wrong, no traceback."""
    return (
        result.status == 2
        and result.out == ""
        and result.err.startswith("error: ")
        and result.err.count("\n") == 1
        and all(word in result.err for word in words)
    )


# ---- CIFAR-100 ------------------------------------------------------------------------------------------------------


def _rows(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def _cifar100(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both pickles, with md5 sums as if published; their coarse labels are wrong on purpose."""
    folder.mkdir(parents=True)
    data = {"train": _random(70, num_classes=100), "test": _random(33, num_classes=100)}
    for name, (images, labels) in data.items():
        content = {b"data": _rows(images), b"fine_labels": labels.tolist(), b"coarse_labels": [0] * len(labels)}
        packed = pickle.dumps(content, protocol=4)
        (folder / name).write_bytes(packed)
        monkeypatch.setitem(cifar.CIFAR100_MD5, name, hashlib.md5(packed, usedforsecurity=False).hexdigest())
    return data


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_pickles(tmp_path, convert, monkeypatch, split):
    """The Python version: the hundred fine labels, not the twenty coarse ones."""
    data = _cifar100(tmp_path / "cifar-100-python", monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-100-python"):
        shards = convert("cifar100", root, "--split", split)
        assert _same(shards, *data[split])
        assert shards.dataset == "cifar100" and shards.class_names == DATASETS["cifar100"].class_names
        assert shards.source_files[0]["name"] == split


def test_cifar100_binary(tmp_path, convert):
    """Records of a coarse label, a fine label and the planes."""
    images, labels = _random(40, num_classes=100)
    rows = zip(labels, _rows(images), strict=True)
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(
        b"".join(bytes([3, n]) + row.tobytes() for n, row in rows)
    )
    assert _same(convert("cifar100", tmp_path, "--split", "train"), images, labels)


def test_published_md5_sums_of_cifar100():
    """The table that guards the unpickling agrees with the one that torchvision publishes."""
    from torchvision.datasets import CIFAR100

    assert dict(CIFAR100.train_list + CIFAR100.test_list) == cifar.CIFAR100_MD5
    assert CIFAR100.base_folder == "cifar-100-python"


def test_cifar100_is_downloaded_once(tmp_path, convert, server, monkeypatch):
    """--download takes torchvision's address and md5, and the second split finds it there."""
    from torchvision.datasets import CIFAR100

    data = _cifar100(tmp_path / "made" / "cifar-100-python", monkeypatch)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-100-python", "cifar-100-python")
    server.files["/cifar-100-python.tar.gz"] = content.getvalue()
    monkeypatch.setattr(CIFAR100, "url", f"{server.url}/cifar-100-python.tar.gz")
    md5 = hashlib.md5(content.getvalue(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5)
    assert _same(convert("cifar100", tmp_path / "root", "--split", "train", "--download"), *data["train"])
    server.files.clear()
    assert _same(convert("cifar100", tmp_path / "root", "--split", "test", "--download"), *data["test"])


class _Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_cifar100_mistakes(tmp_path, cli, monkeypatch):
    """Another md5 is not opened; with the right one a pickle still cannot run anything; records must be whole."""
    out = tmp_path / "out"
    assert _is_one_sentence(cli("cifar100", tmp_path, "--split", "train", "--out", out), "no CIFAR-100 at")
    _cifar100(tmp_path / "a", monkeypatch)
    (tmp_path / "a" / "train").write_bytes(b"something else")
    result = cli("cifar100", tmp_path / "a", "--split", "train", "--out", out)
    assert _is_one_sentence(result, "CIFAR-100 batch", "was not opened")
    evil = pickle.dumps({b"data": 1, b"fine_labels": _Malicious(tmp_path / "trap")})
    (tmp_path / "a" / "train").write_bytes(evil)
    monkeypatch.setitem(cifar.CIFAR100_MD5, "train", hashlib.md5(evil, usedforsecurity=False).hexdigest())
    assert _is_one_sentence(cli("cifar100", tmp_path / "a", "--split", "train", "--out", out), "not admitted")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "test.bin").write_bytes(bytes(3073))
    assert _is_one_sentence(cli("cifar100", tmp_path / "b", "--split", "test", "--out", out), "a multiple of 3074")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ---- SVHN -----------------------------------------------------------------------------------------------------------


def _mat(path: Path, *, compressed: bool = False, **variables: object) -> Path:
    savemat(path, variables, do_compression=compressed)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_svhn_comes_back_exactly(tmp_path, convert, compressed, dtype):
    """[32, 32, 3, N] becomes [N, 32, 32, 3], and the label 10 the digit 0; MATLAB's doubles are numbers too."""
    images, labels = _random(50)
    column = np.where(labels == 0, 10, labels)[:, None].astype(dtype)
    path = _mat(tmp_path / "train.mat", compressed=compressed, X=images.transpose(1, 2, 3, 0), y=column)
    shards = convert("svhn", path)
    assert _same(shards, images, labels)
    assert shards.dataset == "svhn" and shards.class_names == tuple("0123456789")
    assert shards.source_files[0]["name"] == "train.mat"


X, Y = np.zeros((32, 32, 3, 4), np.uint8), np.array([[1], [2], [10], [4]], np.uint8)
SVHN_MISTAKES = {
    "another variable": ({"X": X, "y": Y, "z": Y}, "expected `X` and `y`"),
    "full numbers format": ({"digitStruct": {"name": "1.png"}}, "expected `X` and `y`"),
    "no labels": ({"X": X}, "expected `X` and `y`"),
    "label 0": ({"X": X, "y": Y % 10}, "expected 1..10"),
    "label 11": ({"X": X, "y": Y + 1}, "expected 1..10"),
    "broken label": ({"X": X, "y": Y + 0.5}, "expected integers"),
    "fewer labels": ({"X": X, "y": Y[1:]}, "one label for each image"),
    "float images": ({"X": X / 255, "y": Y}, "expected uint8 [32, 32, 3, N]"),
    "images first": ({"X": X.transpose(3, 0, 1, 2), "y": Y}, "expected uint8 [32, 32, 3, N]"),
    "no images": ({"X": X[..., :0], "y": Y[:0]}, "is empty"),
    "objects": ({"X": X, "y": np.array([["a", 1]], object)}, "is no array of numbers"),
    "structs": ({"X": X, "y": {"a": 1}}, "is no array of numbers"),
    "text": ({"X": X, "y": "1234"}, "is no array of numbers"),
}


@pytest.mark.parametrize("name", SVHN_MISTAKES)
def test_svhn_mistakes(tmp_path, cli, name):
    """Nothing but images and digits is admitted."""
    variables, words = SVHN_MISTAKES[name]
    result = cli("svhn", _mat(tmp_path / "a.mat", **variables), "--out", tmp_path / "out")
    assert _is_one_sentence(result, words, "a.mat") and not (tmp_path / "out").exists()


def _claims(num_images: int) -> bytes:
    """A MATLAB 5 file whose packed X states `num_images` images and holds a few zeros."""
    flags = struct.pack("<IIII", 6, 8, 9, 0)
    shape = struct.pack("<II4i", 5, 16, 32, 32, 3, num_images)
    name = struct.pack("<HH4s", 1, 1, b"X")
    body = flags + shape + name + struct.pack("<II", 2, 2**32 - 8) + bytes(64)
    packed = zlib.compress(struct.pack("<II", 14, len(body)) + body)
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed


def test_svhn_files_that_are_none(tmp_path, cli):
    """Missing, empty, HDF5 (MATLAB 7.3), a web page, and terabytes stated."""
    contents = {
        "empty": b"",
        "hdf5": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400),
        "html": b"<html>" * 99,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        result = cli("svhn", tmp_path / name, "--out", tmp_path / "out")
        assert _is_one_sentence(result, "no MATLAB 5 file", name)
    assert _is_one_sentence(cli("svhn", tmp_path / "no", "--out", tmp_path / "out"), "There is no SVHN file")
    y_only = _mat(tmp_path / "y.mat", y=Y).read_bytes()[128:]
    (tmp_path / "bomb").write_bytes(_claims(2**31 - 1) + y_only)
    assert _is_one_sentence(
        cli("svhn", tmp_path / "bomb", "--out", tmp_path / "out"), "bytes are stated, but there are"
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_any_damaged_byte_of_a_mat_file(tmp_path, compressed):
    """Every wrong bit of a header, and every cut: a sentence, or images of the same shape. What is packed has a checksum.

    The same test makes SciPy's reader end the process.
    """
    images, labels = _random(3)
    column = np.where(labels == 0, 10, labels)[:, None]
    path = _mat(tmp_path / "a.mat", compressed=compressed, X=images.transpose(1, 2, 3, 0), y=column)
    whole = path.read_bytes()
    headers = [*range(124, 220), *range(len(whole) - 90, len(whole))]
    damaged = [
        whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for place in headers for bit in range(8)
    ]
    damaged += [whole[:length] for length in (*headers, *range(0, len(whole), 97))]
    refused = the_same = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            source = svhn.read_svhn(path)
        except UserError as error:
            refused += str(path) in str(error)
            continue
        assert source.images.shape == (3, 32, 32, 3) and len(source.labels) == 3
        if compressed:
            assert np.array_equal(source.images[np.arange(3)], images) and np.array_equal(source.labels, labels)
        the_same += 1
    assert refused + the_same == len(damaged) and refused > len(damaged) // 2


# ---- Tiny ImageNet --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """tiny-imagenet-200 with one image for each class and split; the first one is grey."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    names = DATASETS["tiny_imagenet"].class_names
    generator = np.random.default_rng(0)
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(names)))
    lines = []
    for number, name in enumerate(reversed(names)):
        image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image = image.convert("L") if name == names[0] else image
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
        image.save(folder / "train" / name / "images" / f"{name}_0.JPEG", "JPEG")
        image.save(folder / "val" / "images" / f"val_{number}.JPEG", "JPEG", quality=60)
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def one_per_class(monkeypatch):
    monkeypatch.setattr(nrat_scale.prepare.readers.tiny_imagenet, "TINY_PER_CLASS", {"train": 1, "val": 1})


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_tiny_imagenet_comes_back_exactly(published, convert, one_per_class):
    """Classes by their sorted ids, whatever the order of wnids.txt; grey becomes RGB; val as in its list."""
    names = DATASETS["tiny_imagenet"].class_names
    train = convert("tiny_imagenet", published, "--split", "train")
    assert _same(
        train,
        np.stack([_pixels(published / "train" / name / "images" / f"{name}_0.JPEG") for name in names]),
        np.arange(200),
    )
    assert train.dataset == "tiny_imagenet" and train.class_names == names
    val = convert("tiny_imagenet", published.parent, "--split", "val")
    expected = np.stack([_pixels(published / "val" / "images" / f"val_{number}.JPEG") for number in range(200)])
    assert _same(val, expected, np.arange(200)[::-1])
    assert [file["name"][:24] for file in train.source_files] == ["wnids.txt", "tiny-imagenet-200/train "]
    assert train.source_files[1] != val.source_files[1]


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


FIRST = "n01443537"
TINY_MISTAKES = {
    "nothing there": (lambda d: shutil.rmtree(d), "val", "wnids.txt"),
    "another list": (lambda d: (d / "wnids.txt").write_text("n01443537\n"), "val", "does not list the 200 classes"),
    "list cut": (lambda d: (d / "wnids.txt").write_bytes(b"\xff\xfe"), "val", "damaged"),
    "class missing": (lambda d: shutil.rmtree(d / "train" / FIRST), "train", FIRST),
    "class too many": (lambda d: (d / "train" / "n00000000").mkdir(), "train", "n00000000"),
    "image lost": (lambda d: (d / "train" / FIRST / "images" / f"{FIRST}_0.JPEG").unlink(), "train", "0 images"),
    "odd file": (lambda d: (d / "train" / FIRST / "images" / "._a").touch(), "train", "nothing else belongs"),
    "image empty": (lambda d: (d / "train" / FIRST / "images" / f"{FIRST}_0.JPEG").write_bytes(b""), "train", "no readable JPEG"),
    "a PNG": (lambda d: Image.new("RGB", (64, 64)).save(d / "val" / "images" / "val_0.JPEG", "PNG"), "val", "no readable JPEG"),
    "too small": (lambda d: Image.new("RGB", (64, 63)).save(d / "val" / "images" / "val_0.JPEG"), "val", "64 x 63, expected 64 x 64"),
    "four colours": (lambda d: Image.new("CMYK", (64, 64)).save(d / "val" / "images" / "val_0.JPEG"), "val", "mode CMYK"),
    "validation image lost": (lambda d: (d / "val" / "images" / "val_7.JPEG").unlink(), "val", "Line 8"),
    "unknown class": (lambda d: _append(d / "val" / "val_annotations.txt", "val_0.JPEG\tn0\n"), "val", "Line 201"),
    "listed twice": (lambda d: _append(d / "val" / "val_annotations.txt", f"val_0.JPEG\t{FIRST}\n"), "val", "listed twice"),
    "not listed": (lambda d: (d / "val" / "images" / "val_x.JPEG").touch(), "val", "has no line"),
    "path in the list": (
        lambda d: _append(d / "val" / "val_annotations.txt", f"../../wnids.txt\t{FIRST}\n"), "val", "missing or listed twice",
    ),
    "no list": (lambda d: (d / "val" / "val_annotations.txt").unlink(), "val", "There is no list of labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY_MISTAKES)
def test_tiny_imagenet_mistakes(published, tmp_path, cli, one_per_class, name):
    """What is lost, too much or not as published is named."""
    damage, split, words = TINY_MISTAKES[name]
    shutil.copytree(published, tmp_path / "tiny")
    damage(tmp_path / "tiny")
    result = cli("tiny_imagenet", tmp_path / "tiny", "--split", split, "--out", tmp_path / "out")
    assert _is_one_sentence(result, words), result.err
    assert not (tmp_path / "out").exists()


def test_published_numbers_of_images_are_expected(published, cli, tmp_path):
    """500 of each class: a folder that lost files on the way is not converted."""
    result = cli("tiny_imagenet", published, "--split", "train", "--out", tmp_path / "out")
    assert _is_one_sentence(result, "expected 500 as published")


# ---- one image ------------------------------------------------------------------------------------------------------


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}),
        ("CMYK", "JPEG", {}),
        ("RGBA", "WEBP", {}),
        ("RGB", "WEBP", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (9, 9, 9))]}),
    ],
)
def test_other_modes_are_refused(mode, kind, options):
    """A silent conversion would lose something: transparency, colours, 16 bits, frames."""
    with pytest.raises(UserError, match=r"has (mode|transparency)"):
        images_module.decode(_encoded(Image.new(mode, (8, 8)), kind, **options), kind, None, "it")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decoding_is_pillows(kind, mode):
    """8 bits grey and RGB, and grey as RGB where it is asked for."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data = _encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)))
    decoded = images_module.decode(data, kind, None, "it")
    channels = expected.shape[2] if expected.ndim == 3 else 1
    assert np.array_equal(decoded, expected.reshape(6, 9, channels))
    assert np.array_equal(
        images_module.decode(data, kind, 3, "it"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )
    if channels == 3:
        with pytest.raises(UserError, match="in colour among grey"):
            images_module.decode(data, kind, 1, "it")


def _png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _webp_claiming(kind: bytes) -> bytes:
    vp8x = b"\x00" * 4 + (16000).to_bytes(3, "little") * 2
    vp8l = b"\x2f" + (0x0FFFFFFF).to_bytes(4, "little") + bytes(20)
    vp8 = b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 16000, 16000) + bytes(20)
    body = {b"VP8X": vp8x, b"VP8L": vp8l, b"VP8 ": vp8}[kind]
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("side", [1025, 20_000, 2**31 - 1])
def test_a_png_that_claims_a_huge_size(side):
    """Refused by its header: no pixel is decoded and nothing reserved; Pillow's own warning does not get out."""
    with pytest.raises(UserError, match=r"expected at most 1024 x 1024|no readable PNG"):
        images_module.decode(_png_claiming(side, side), "PNG", None, "it")


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_a_webp_that_claims_a_huge_size(kind):
    """Pillow would reserve the canvas on opening it."""
    with pytest.raises(UserError, match="expected at most 1024 x 1024"):
        images_module.decode(_webp_claiming(kind), "WEBP", None, "it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_any_damaged_byte_of_an_image(kind):
    """Every damage is a sentence or an image of the same shape (JPEG and WebP have no checksum); PNG's is noticed."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    whole = _encoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = images_module.decode(whole, kind, None, "it")
    generator, noticed = np.random.default_rng(0), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.integers(8)
        try:
            image = images_module.decode(bytes(damaged), kind, 3, "it")
        except UserError:
            noticed += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3
            assert kind != "PNG" or np.array_equal(image, expected)
    for length in range(len(whole)):
        if kind == "PNG" and length >= len(whole) - 12:
            continue  # without its last, empty chunk it is whole
        try:
            images_module.decode(whole[:length], kind, 3, "it")
        except UserError:
            noticed += 1
    assert noticed > len(whole) // 2


# ---- CIFAR-10N ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, cli) -> ShardSet:
    """Shards of 60 images of ten classes."""
    images, labels = _random(60, (8, 8, 3))
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    result = cli("npz", tmp_path / "a.npz", "--dataset", "cifar10", "--out", tmp_path / "shards", "--block-size", 7)
    assert result.status == 0
    return open_shards(tmp_path / "shards")


def _human(shards: ShardSet) -> dict[str, np.ndarray]:
    clean = shards.labels(shards.in_source_order())
    sets: dict[str, np.ndarray] = {"clean_label": clean}
    for wrong, key in enumerate(HUMAN_SETS.values()):
        sets[key] = clean.copy()
        sets[key][: 6 * wrong] = (clean[: 6 * wrong] + 1) % 10
    return sets


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_human_labels_come_back_exactly(tmp_path, cli, shards, zipped, module):
    """Both formats of torch.save and both names of numpy's module; the rates are printed, the npz is what a run reads."""
    sets = _human(shards)
    torch.save(sets, tmp_path / "h.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "h.pt").read_bytes()
    if module == "numpy.core.multiarray":
        renamed = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        if zipped:
            renamed = _rezipped(content)
        (tmp_path / "h.pt").write_bytes(renamed)
    out = tmp_path / "new" / "cifar10n.npz"
    result = cli("cifar10n", tmp_path / "h.pt", "--shards", tmp_path / "shards", "--out", out)
    assert result.status == 0, result.err
    assert result.out.splitlines()[:2] == [
        "aggre: 0.00 % of 60 labels are wrong",
        "worse: 10.00 % of 60 labels are wrong",
    ]
    for name, key in HUMAN_SETS.items():
        assert np.array_equal(load_human_labels(str(out), name), sets[key])
    with np.load(out, allow_pickle=False) as written:
        assert sorted(written.files) == sorted(sets)


def _rezipped(content: bytes) -> bytes:
    """The same torch file whose pickle has the name that numpy 1 wrote."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(info.filename, data)
    return output.getvalue()


def _changed(key: str, value: object) -> object:
    return lambda sets, folder: {**sets, key: value}


HUMAN_MISTAKES = {
    "a program": (
        lambda sets, folder: {**sets, "worse_label": _Malicious(folder / "trap")},
        "mkdir, which is not admitted",
    ),
    "a program instead": (lambda sets, folder: _Malicious(folder / "trap"), "not admitted and was not run"),
    "objects": (_changed("worse_label", np.array([None] * 60)), "no file of CIFAR-10N's labels"),
    "floats": (_changed("worse_label", np.zeros(60)), "no file of CIFAR-10N's labels"),
    "a tensor": (_changed("worse_label", torch.zeros(60)), "`worse_label`"),
    "a list": (_changed("worse_label", [1] * 60), "`worse_label`"),
    "fewer": (_changed("worse_label", np.zeros(59, np.int64)), "expected int64 [60]"),
    "another class": (_changed("worse_label", np.full(60, 10)), "expected 0..9"),
    "negative": (_changed("worse_label", np.full(60, -1)), "expected 0..9"),
    "other images": (lambda sets, folder: {**sets, "clean_label": sets["worse_label"]}, "differs from the shards"),
    "a set less": (lambda sets, folder: {"clean_label": sets["clean_label"]}, "expected a dict of"),
    "CIFAR-100N": (_changed("noisy_label", np.zeros(60, np.int64)), "expected a dict of"),
    "an array": (lambda sets, folder: sets["clean_label"], "expected a dict of"),
}


@pytest.mark.parametrize("name", HUMAN_MISTAKES)
def test_human_labels_that_are_none(tmp_path, cli, shards, name):
    """Nothing in the file runs, and only the six sets for these very images are taken."""
    change, words = HUMAN_MISTAKES[name]
    torch.save(change(_human(shards), tmp_path), tmp_path / "h.pt")
    before = sorted(tmp_path.iterdir())
    result = cli("cifar10n", tmp_path / "h.pt", "--shards", tmp_path / "shards", "--out", tmp_path / "cifar10n.npz")
    assert _is_one_sentence(result, words), result.err
    assert "weights_only" not in result.err and sorted(tmp_path.iterdir()) == before


def test_human_labels_files(tmp_path, cli, shards):
    """Missing, empty and damaged files; an npz is never overwritten."""
    target = ("--shards", tmp_path / "shards", "--out", tmp_path / "a.npz")
    assert _is_one_sentence(cli("cifar10n", tmp_path / "h.pt", *target), "never overwritten")
    target = (*target[:3], tmp_path / "n.npz")
    assert _is_one_sentence(cli("cifar10n", tmp_path / "h.pt", *target), "There is no file of human labels")
    torch.save(_human(shards), tmp_path / "h.pt")
    whole = (tmp_path / "h.pt").read_bytes()
    for content in (b"", b"PK\x03\x04", b"<html>", whole[:1000], whole[:-100], b"\x80\x02."):
        (tmp_path / "h.pt").write_bytes(content)
        assert _is_one_sentence(cli("cifar10n", tmp_path / "h.pt", *target), "h.pt")
    assert not (tmp_path / "n.npz").exists()


def test_torch_keeps_nothing_admitted():
    """What this tool lets through does not stay let through for other files of the process."""
    assert not set(map(id, torch.serialization.get_safe_globals())) & set(map(id, cifar10n._ADMITTED))
