"""tools/shard_dataset.py: every format gives exactly its images in source order; every mistake is one plain sentence."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nrat_scale.prepare.__main__
import nrat_scale.prepare.readers.arrays
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.prepare.readers import cifar, npz
from nrat_scale.prepare.readers import digits as digits_module

TOOL = Path(__file__).parents[2] / "tools" / "shard_dataset.py"


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): None if path.is_dir() else path.read_bytes() for path in sorted(folder.rglob("*"))}


def _data(
    num_images: int = 100, shape: tuple[int, ...] = (8, 8, 3), seed: int = 0, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    return images, np.sort(generator.permutation(np.arange(num_images) % num_classes))  # sorted, as published


def _same(shards: ShardSet, images: np.ndarray, labels: np.ndarray) -> bool:
    assert shards.images(shards.in_source_order()).shape == images.shape
    return np.array_equal(shards.images(shards.in_source_order()), images) and np.array_equal(
        shards.labels(shards.in_source_order()), labels
    )


def _facts(*paths: Path) -> list[dict[str, object]]:
    return [
        {"name": p.name, "bytes": len(p.read_bytes()), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in paths
    ]


# ---- npz ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4", "uint64"])
def test_npz_comes_back_exactly(tmp_path, convert, save, dtype):
    """Stored and compressed files, labels of any integer type: images and labels equal the input in source order."""
    images, labels = _data()
    save(tmp_path / "a.npz", image=images, label=labels.astype(dtype))
    shards = convert("npz", tmp_path / "a.npz")
    assert _same(shards, images, labels)
    assert shards.dataset == "custom" and shards.class_names == tuple("0123456789")
    assert shards.source_files == _facts(tmp_path / "a.npz")
    assert not np.array_equal(shards.labels(np.arange(100)), labels)  # mixed: the source was sorted by class


def test_npz_in_other_layouts(tmp_path, convert):
    """Channels first, no channel axis, Fortran order and a member order of its own mean the same images."""
    images, labels = _data()
    np.savez(tmp_path / "nchw.npz", label=labels, image=images.transpose(0, 3, 1, 2).copy(), other=np.zeros(3))
    np.savez(tmp_path / "grey.npz", image=images[..., 0], label=labels)
    np.savez(tmp_path / "grey_nchw.npz", image=images[:, None, :, :, 0], label=labels)
    np.savez(tmp_path / "fortran.npz", image=np.asfortranarray(images), label=labels)
    np.savez_compressed(tmp_path / "fortran2.npz", image=np.asfortranarray(images), label=labels)
    assert _same(convert("npz", tmp_path / "nchw.npz"), images, labels)
    assert _same(convert("npz", tmp_path / "grey.npz"), images[..., :1], labels)
    assert _same(convert("npz", tmp_path / "grey_nchw.npz"), images[..., :1], labels)
    assert _same(convert("npz", tmp_path / "fortran.npz"), images, labels)
    assert _same(convert("npz", tmp_path / "fortran2.npz"), images, labels)


def test_one_hot_labels_are_converted(tmp_path, convert, monkeypatch):
    """[N, K] of zeros and one 1 per row, integers or booleans, are class numbers; also in pieces and big-endian."""
    monkeypatch.setattr(nrat_scale.prepare.readers.arrays, "_ROWS", 7)
    images, labels = _data()
    one_hot = np.eye(10)[labels]
    for dtype in ("uint8", ">i8", "bool"):
        np.savez(tmp_path / "a.npz", image=images, label=one_hot.astype(dtype))
        assert _same(convert("npz", tmp_path / "a.npz"), images, labels)
    np.savez(tmp_path / "a.npz", image=images, label=np.asfortranarray(one_hot.astype(int)))
    assert _same(convert("npz", tmp_path / "a.npz"), images, labels)


def test_npz_parts_are_one_data_set_in_the_order_given(tmp_path, convert):
    """Generated sets come in several files, of which one may be compressed: ids run through all of them."""
    parts = [_data(n, seed=n, num_classes=k) for n, k in [(30, 3), (1, 1), (69, 12)]]
    paths = [tmp_path / f"part{i}.npz" for i in range(3)]
    for path, (images, labels), save in zip(paths, parts, [np.savez, np.savez_compressed, np.savez], strict=True):
        save(path, image=images, label=labels)
    shards = convert("npz", *paths)
    assert _same(shards, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    assert shards.source_files == _facts(*paths)
    assert shards.num_classes == 12  # of all parts together


def test_dataset_names_the_classes(tmp_path, convert):
    """--dataset brings the class names, also where the last classes do not occur."""
    images, labels = _data(num_classes=7)
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    shards = convert("npz", tmp_path / "a.npz", "--dataset", "cifar10")
    assert shards.dataset == "cifar10" and shards.class_names == DATASETS["cifar10"].class_names
    assert shards.class_counts[7:] == (0, 0, 0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_needs_little_memory(tmp_path, save):
    """The published files have up to 150 GB: images stay on disk, and only blocks pass through memory."""
    images = np.zeros((20_000, 32, 32, 3), np.uint8)  # 61 MB
    images[:, 0, 0, 0] = np.arange(20_000) % 251
    save(tmp_path / "big.npz", image=images, label=np.arange(20_000) % 10)
    size = images.nbytes
    del images
    tracemalloc.start()
    try:
        prepare_cli.main(["npz", str(tmp_path / "big.npz"), "--out", str(tmp_path / "out")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 14e6 < size / 4  # a block has 1.6 MB and exists as gathered, serialised and written
    shards = open_shards(tmp_path / "out")
    assert np.array_equal(shards.images(np.arange(20_000))[:, 0, 0, 0], shards.source_ids(np.arange(20_000)) % 251)


def test_stored_npz_is_mapped_in_place(tmp_path):
    """A second copy of a stored file would need its size on disk again; only compressed members are unpacked."""
    images, labels = _data()
    for number, save in enumerate([np.savez, np.savez_compressed]):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        save(tmp_path / "a.npz", image=images, label=labels)
        npz.read_npz([str(tmp_path / "a.npz")], None, scratch)
        assert len(list(scratch.iterdir())) == 2 * number  # `image` and `label`


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_damaged_byte_of_an_npz_is_noticed(tmp_path, save):
    """Whatever byte is wrong: a plain sentence, or it was one that does not matter and the data are the same."""
    images, labels = _data(12, (4, 4, 1))
    save(tmp_path / "a.npz", image=images, label=labels)
    whole = (tmp_path / "a.npz").read_bytes()
    generator, noticed, the_same = np.random.default_rng(0), 0, 0
    for place in generator.permutation(len(whole))[:300]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.integers(8)
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            source = npz.read_npz([str(tmp_path / "b.npz")], None, tmp_path)
        except UserError as error:
            noticed += "b.npz" in str(error)
        else:
            assert np.array_equal(source.images[np.arange(12)], images) and np.array_equal(source.labels, labels)
            the_same += 1
    assert noticed + the_same == 300 and noticed > 150


# ---- CIFAR-10 -------------------------------------------------------------------------------------------------------


def _cifar(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return _data(num_images, (32, 32, 3), seed)


def _rows(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 3072] in CIFAR's order: the red plane, then the green, then the blue."""
    return np.stack([images[..., 0], images[..., 1], images[..., 2]], axis=1).reshape(len(images), 3072)


def _python3_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({b"data": _rows(images), b"labels": labels.tolist()}, protocol=4)


def _python2_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The opcodes that Python 2 wrote into the published files: byte strings, and numpy 1's name of `_reconstruct`."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    data = _rows(images).tobytes()
    shape = b"J" + struct.pack("<i", len(images)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + b"T" + struct.pack("<i", len(data)) + data + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}("
        + text(b"batch_label")
        + text(b"a batch")
        + text(b"labels")
        + numbers
        + text(b"data")
        + array
        + b"u."
    )


def _make_batches(folder: Path, make: Callable[[np.ndarray, np.ndarray], bytes], suffix: str = "") -> dict:
    """All six batches, of 11, 12, ... images, and what they hold."""
    folder.mkdir(parents=True)
    batches = {}
    for number, name in enumerate(cifar.CIFAR10_MD5):
        batches[name] = _cifar(11 + number, number)
        (folder / f"{name}{suffix}").write_bytes(make(*batches[name]))
    return batches


def _publish(monkeypatch, folder: Path) -> None:
    """Let the md5 of the batches in `folder` be the published ones."""
    for path in folder.iterdir():
        monkeypatch.setitem(
            cifar.CIFAR10_MD5, path.name, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        )


def _expected(batches: dict, split: str) -> tuple[np.ndarray, np.ndarray]:
    chosen = [data for name, data in batches.items() if (name == "test_batch") == (split == "test")]
    return np.concatenate([images for images, _ in chosen]), np.concatenate([labels for _, labels in chosen])


@pytest.mark.parametrize("make", [_python3_batch, _python2_batch])
def test_cifar10_pickles(tmp_path, convert, monkeypatch, make):
    """The Python version, whether ROOT holds its folder or is it: colour planes, batches and classes in their order."""
    batches = _make_batches(tmp_path / "cifar-10-batches-py", make)
    _publish(monkeypatch, tmp_path / "cifar-10-batches-py")
    train = convert("cifar10", tmp_path, "--split", "train")
    assert _same(train, *_expected(batches, "train"))
    assert train.dataset == "cifar10" and train.class_names[3] == "cat"
    assert [file["name"] for file in train.source_files] == [f"data_batch_{i}" for i in range(1, 6)]
    test = convert("cifar10", tmp_path / "cifar-10-batches-py", "--split", "test")
    assert _same(test, *_expected(batches, "test"))


def test_cifar10_binary(tmp_path, convert):
    """The binary version gives the same images as the Python version would."""

    def records(images: np.ndarray, labels: np.ndarray) -> bytes:
        return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, _rows(images), strict=True))

    batches = _make_batches(tmp_path / "cifar-10-batches-bin", records, ".bin")
    train = convert("cifar10", tmp_path, "--split", "train")
    assert _same(train, *_expected(batches, "train"))
    assert train.source_files == _facts(*(tmp_path / f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)))
    assert _same(convert("cifar10", tmp_path / "cifar-10-batches-bin", "--split", "test"), *_expected(batches, "test"))


def test_published_md5_sums_are_those_of_the_batches():
    """The table that guards the unpickling agrees with the one that torchvision publishes."""
    from torchvision.datasets import CIFAR10

    assert dict(CIFAR10.train_list + CIFAR10.test_list) == cifar.CIFAR10_MD5


class _Malicious:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, np.array], ids=lambda function: function.__name__)
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, cli, monkeypatch, function):
    """Even with the right md5 nothing but uint8 arrays is rebuilt: neither programs nor other parts of numpy."""
    trap = tmp_path / "trap"
    argument = f"__import__('os').mkdir({str(trap)!r})" if function is eval else str(trap)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {b"data": _rows(_cifar(3, 0)[0]), b"labels": _Malicious(function, argument)}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=4))
    _publish(monkeypatch, folder)
    result = cli("cifar10", tmp_path, "--split", "test", "--out", tmp_path / "out")
    assert result.status == 2 and "test_batch" in result.err and "not admitted" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py"]


def test_a_pickle_with_a_wrong_md5_is_not_opened(tmp_path, cli, monkeypatch):
    """The published md5 is the condition for unpickling at all."""

    def never(*arguments, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(cifar._BatchUnpickler, "load", never)
    _make_batches(tmp_path / "cifar-10-batches-py", _python3_batch)
    before = _tree(tmp_path)
    result = cli("cifar10", tmp_path, "--split", "train", "--out", tmp_path / "out")
    assert result.status == 2 and "data_batch_1 has md5" in result.err and "not opened" in result.err
    assert "c99cafc152244af753f735de768cd75f" in result.err
    assert _tree(tmp_path) == before


PIXELS = np.zeros((1, 3072), np.uint8)
NO_BATCHES = {
    "no pickle": b"no pickle",
    "a list": pickle.dumps([1, 2]),
    "no data": pickle.dumps({b"labels": [1]}),
    "a number": pickle.dumps({b"data": 1, b"labels": [1]}),
    "other width": pickle.dumps({b"data": PIXELS[:, :3], b"labels": [1]}, protocol=4),
    "one row": pickle.dumps({b"data": PIXELS[0], b"labels": [1]}, protocol=4),
    "no rows": pickle.dumps({b"data": PIXELS[:0], b"labels": []}, protocol=4),
    "floats": pickle.dumps({b"data": PIXELS / 255, b"labels": [1]}, protocol=4),
    "objects": pickle.dumps({b"data": PIXELS.astype(object), b"labels": [1]}, protocol=4),
    "too many labels": pickle.dumps({b"data": PIXELS, b"labels": [1, 2]}, protocol=4),
    "no such class": pickle.dumps({b"data": PIXELS, b"labels": [10]}, protocol=4),
    "negative class": pickle.dumps({b"data": PIXELS, b"labels": [-1]}, protocol=4),
    "names": pickle.dumps({b"data": PIXELS, b"labels": ["cat"]}, protocol=4),
    "a dict of labels": pickle.dumps({b"data": PIXELS, b"labels": {1: 2}}, protocol=4),
}


@pytest.mark.parametrize("name", NO_BATCHES)
def test_a_batch_of_something_else_is_refused(tmp_path, cli, monkeypatch, name):
    """A published pickle of another layout ends in a sentence."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(NO_BATCHES[name])
    _publish(monkeypatch, folder)
    result = cli("cifar10", tmp_path, "--split", "test", "--out", tmp_path / "out")
    assert result.status == 2 and result.err.startswith("error: ") and not (tmp_path / "out").exists()


# ---- IDX ------------------------------------------------------------------------------------------------------------


def _idx(images: np.ndarray, labels: np.ndarray) -> tuple[bytes, bytes]:
    return (
        struct.pack(">4I", 0x803, *images.shape[:3]) + images.tobytes(),
        struct.pack(">2I", 0x801, len(labels)) + bytes(labels.tolist()),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_idx_comes_back_exactly(tmp_path, convert, packed):
    """MNIST's files, plain and gzipped: [N, H, W] gets its one channel."""
    images, labels = _data(60, (10, 12, 1))
    paths = [tmp_path / f"{name}{'.gz' * packed}" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for path, content in zip(paths, _idx(images, labels), strict=True):
        path.write_bytes(gzip.compress(content) if packed else content)
    shards = convert("idx", *paths, "--dataset", "fashion_mnist")
    assert _same(shards, images, labels)
    assert shards.class_names == DATASETS["fashion_mnist"].class_names and shards.source_files == _facts(*paths)
    assert convert("idx", *paths).dataset == "custom"


# ---- digits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as the quickstart prepares them."""
    out = tmp_path_factory.mktemp("digits") / "digits"
    prepare_cli.main(["digits", "--out", str(out)])
    return out


def test_digits_are_the_real_ones_enlarged(digits):
    """Every image is scikit-learn's, each pixel as 2 x 2 equal ones; none is lost or double."""
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    enlarged = np.stack(
        [
            np.asarray(Image.fromarray(np.float32(image * 255 / 16)).resize((16, 16), Image.Resampling.NEAREST))
            for image in grey.reshape(-1, 8, 8)
        ]
    )
    splits = [open_shards(digits / name) for name in ("train", "test")]
    found = 0
    for shards in splits:
        shards.verify()
        images, at = shards.images(shards.in_source_order())[..., 0], -1
        for image, label in zip(
            images, shards.labels(shards.in_source_order()), strict=True
        ):  # ascending original index
            at = next(i for i in range(at + 1, 1797) if np.abs(enlarged[i] - image).max() < 0.51)
            assert labels[at] == label
            found += 1
    assert found == 1797


def test_digits_are_split_by_class_and_by_seed(digits):
    """1,297 and 500, every class in its proportion, the same split each time and another one for another seed."""
    train, test = (open_shards(digits / name) for name in ("train", "test"))
    assert (len(train), len(test), train.image_shape, train.dataset) == (1297, 500, (16, 16, 1), "digits")
    counts = np.array([train.class_counts, test.class_counts])
    share = counts.sum(0) * 500 / 1797
    assert np.abs(counts[1] - share).max() < 1
    rounded_up = counts[1] > share
    assert (share % 1)[rounded_up].min() >= (share % 1)[~rounded_up].max()
    assert train.source_files == test.source_files
    assert (
        train.source_files[0]["name"] == "sklearn.datasets.load_digits" and len(train.source_files[0]["sha256"]) == 64
    )
    again, other = digits_module.read_digits("test", 0), digits_module.read_digits("test", 1)
    assert _same(test, again.images, again.labels)
    assert not np.array_equal(again.images, other.images)


def test_digits_need_scikit_learn(tmp_path, cli, monkeypatch):
    """It is an optional dependency: without it, the user learns what to install."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = cli("digits", "--out", tmp_path / "new" / "out")
    assert result.status == 2 and "pip install scikit-learn" in result.err and _tree(tmp_path) == {}


# ---- fetched files --------------------------------------------------------------------------------------------------


def test_npz_from_the_hugging_face_hub(tmp_path, server):
    """hf:// files are fetched and converted; a missing one is a sentence. Real processes, so exit status and streams too."""
    images, labels = _data()
    content = io.BytesIO()
    np.savez(content, image=images, label=labels)
    server.files["/datasets/someone/generated/resolve/main/cifar10/1m.npz"] = content.getvalue()
    processes = []
    for number, name in enumerate(["1m.npz", "2m.npz"]):
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / f"hub{number}"),
            "NO_PROXY": "127.0.0.1",
        }
        command = ["npz", f"hf://datasets/someone/generated/cifar10/{name}", "--out", str(tmp_path / f"out{number}")]
        processes.append(
            subprocess.Popen(
                [sys.executable, str(TOOL), *command], env=env, cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    (out, err), (missing_out, missing_err) = (process.communicate(timeout=120) for process in processes)
    assert processes[0].returncode == 0, err
    assert out == f"{tmp_path / 'out0'}: 100 images of 10 classes (custom) in 1 shard, 0.0 MB\n"
    shards = open_shards(tmp_path / "out0")
    assert _same(shards, images, labels)
    assert shards.source_files[0]["name"] == "1m.npz"
    assert processes[1].returncode == 2 and missing_out == ""
    assert "error: hf://datasets/someone/generated/cifar10/2m.npz cannot be fetched" in missing_err
    assert "Traceback" not in missing_err and "404" in missing_err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub0", "hub1", "out0"]


@pytest.fixture
def published_archive(server, monkeypatch, tmp_path):
    """A small CIFAR-10 archive at torchvision's address."""
    from torchvision.datasets import CIFAR10

    batches = _make_batches(tmp_path / "made" / "cifar-10-batches-py", _python3_batch)
    _publish(monkeypatch, tmp_path / "made" / "cifar-10-batches-py")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    server.files["/cifar-10-python.tar.gz"] = content.getvalue()
    monkeypatch.setattr(CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
    md5 = hashlib.md5(content.getvalue(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
    return batches


def test_cifar10_is_downloaded_once(tmp_path, convert, server, published_archive):
    """--download fetches into ROOT, and the second split finds it there."""
    root = tmp_path / "new" / "root"
    assert _same(convert("cifar10", root, "--split", "train", "--download"), *_expected(published_archive, "train"))
    assert sorted(path.name for path in root.iterdir()) == ["cifar-10-batches-py"]
    server.files.clear()
    assert _same(convert("cifar10", root, "--split", "test", "--download"), *_expected(published_archive, "test"))


@pytest.mark.parametrize("damage", ["not there", "other bytes"])
def test_a_failed_download_leaves_nothing(tmp_path, cli, server, published_archive, damage):
    """No network or a wrong archive: a sentence, and no half of CIFAR-10 that a later run would take for whole."""
    (tmp_path / "root").mkdir()
    server.files.clear()
    if damage == "other bytes":
        server.files["/cifar-10-python.tar.gz"] = b"something else"
    before = _tree(tmp_path)
    result = cli("cifar10", tmp_path / "root", "--split", "train", "--download", "--out", tmp_path / "new" / "out")
    assert result.status == 2 and "error: CIFAR-10 cannot be fetched" in result.err and server.url in result.err
    assert _tree(tmp_path) == before


# ---- mistakes -------------------------------------------------------------------------------------------------------


def _npz(path: Path, **members: object) -> Path:
    np.savez(path, **members)
    return path


def _zip(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


IMAGES, LABELS = _data(20)
GREY, GREY_LABELS = _idx(*_data(20, (8, 8, 1)))


def _files(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"file{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def _damaged_member(folder: Path, method: int) -> Path:
    path = _zip(folder / "a.npz", method, image=_npy(IMAGES), label=_npy(LABELS))
    content = bytearray(path.read_bytes())
    content[1500] ^= 1  # in the pixels
    path.write_bytes(content)
    return path


# name -> (folder -> arguments without --out, what the message must say)
MISTAKES: dict[str, tuple[Callable[[Path], list], str]] = {
    "no such npz": (lambda d: ["npz", d / "no.npz"], "no.npz"),
    "a folder": (lambda d: ["npz", d], "Is a directory"),
    "no zip": (lambda d: ["npz", *_files(d, b"PK but not really")], "file0 is damaged or cut short"),
    "empty file": (lambda d: ["npz", *_files(d, b"")], "file0 is damaged or cut short"),
    "npz cut short": (
        lambda d: ["npz", *_files(d, _npz(d / "a.npz", image=IMAGES, label=LABELS).read_bytes()[:-40])], "cut short",
    ),
    "plain npy": (lambda d: ["npz", *_files(d, _npy(IMAGES))], "damaged or cut short"),
    "no image": (lambda d: ["npz", _npz(d / "a.npz", images=IMAGES, label=LABELS)], "no member `image`. It has: images, label"),
    "no label": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES)], "no member `label`"),
    "float images": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES / 255, label=LABELS)], "float64, expected uint8"),
    "int8 images": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES.view("i1"), label=LABELS)], "int8, expected uint8"),
    "flat images": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES.reshape(20, -1), label=LABELS)], "shape [20, 192]"),
    "five axes": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES[None], label=LABELS)], "shape [1, 20, 8, 8, 3]"),
    "four channels": (
        lambda d: ["npz", _npz(d / "a.npz", image=np.zeros((20, 8, 8, 4), "u1"), label=LABELS)], "1 or 3 channels",
    ),
    "no images": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES[:0], label=LABELS[:0])], "empty"),
    "float labels": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS * 1.0)], "expected integers"),
    "bool labels": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS > 1)], "expected integers"),
    "text labels": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS.astype("U1"))], "expected integers"),
    "scalar label": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=np.int64(3))], "expected [20]"),
    "label column": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS[:, None])], "expected [20]"),
    "two-hot labels": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=np.ones((20, 2), int))], "row 0 is not one-hot",
    ),
    "soft labels": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=np.eye(10)[LABELS])], "expected integers",
    ),
    "scores": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=2 * np.eye(10, dtype=int)[LABELS])], "row 0 is not one-hot",
    ),
    "terabytes of labels": (
        lambda d: ["npz", _zip(d / "a.npz", image=_npy(IMAGES), label=_header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }\n"))],
        "needs 8000000000000 bytes",
    ),
    "fewer labels": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS[1:])], "shape [19], expected [20]"),
    "negative label": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS - 1)], "from -1 to 8"),
    "absurd label": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS + 10**12)], "1000000000009"),
    "huge uint64 label": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS.astype("u8") + np.uint64(2**63))], "9223372036854775817",
    ),
    "label out of range": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS + 1), "--dataset", "cifar10"], "from 1 to 10",
    ),
    "wrong channels": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS), "--dataset", "mnist"], "3 channel(s)",
    ),
    "object images": (
        lambda d: ["npz", _npz(d / "a.npz", image=np.array([None] * 20), label=LABELS)], "`image` in",
    ),
    "object labels": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=np.array([_Malicious(os.mkdir, str(d / "trap"))] * 20))],
        "nothing is ever unpickled",
    ),
    "member cut short": (lambda d: ["npz", _zip(d / "a.npz", image=_npy(IMAGES)[:-7], label=_npy(LABELS))], "cut short"),
    "member too long": (lambda d: ["npz", _zip(d / "a.npz", image=_npy(IMAGES) + b"x", label=_npy(LABELS))], "needs 3840"),
    "member empty": (lambda d: ["npz", _zip(d / "a.npz", image=b"", label=_npy(LABELS))], "damaged"),
    "no npy": (lambda d: ["npz", _zip(d / "a.npz", image=b"GIF89a" * 99, label=_npy(LABELS))], ".npy header"),
    "negative shape": (
        lambda d: ["npz", _zip(d / "a.npz", image=_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2, 3), }\n") + b"x" * 12, label=_npy(LABELS))],
        "damaged",
    ),
    "endless shape": (
        lambda d: ["npz", _zip(d / "a.npz", image=_header("{'descr': '|u1', 'fortran_order': False, 'shape': (%s, 8, 3), }\n" % (9**99)), label=_npy(LABELS))],
        "cut short",
    ),
    "header with a call": (
        lambda d: ["npz", _zip(d / "a.npz", image=_header("{'descr': '|u1', 'fortran_order': exit(0), 'shape': (1, 8, 3), }\n"), label=_npy(LABELS))],
        ".npy header",
    ),
    "header without end": (
        lambda d: ["npz", _zip(d / "a.npz", image=b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 50_000, label=_npy(LABELS))],
        ".npy header",
    ),
    "future version": (lambda d: ["npz", _zip(d / "a.npz", image=b"\x93NUMPY\x09\x00" + bytes(99), label=_npy(LABELS))], ".npy header"),
    "damaged stored": (lambda d: ["npz", _damaged_member(d, zipfile.ZIP_STORED)], "checksum of image.npy"),
    "damaged deflated": (lambda d: ["npz", _damaged_member(d, zipfile.ZIP_DEFLATED)], "damaged"),
    "odd packing": (
        lambda d: ["npz", _zip(d / "a.npz", zipfile.ZIP_LZMA, image=_npy(IMAGES), label=_npy(LABELS))], "unusual method",
    ),
    "second part of another shape": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS), _npz(d / "b.npz", image=IMAGES[:, :4], label=LABELS)],
        "b.npz have shape [4, 8, 3]",
    ),
    "second part damaged": (
        lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS), d / "b.npz"], "no npz file at",
    ),
    "https": (lambda d: ["npz", "https://example.org/1m.npz"], "Download it first"),
    "hf of a model": (lambda d: ["npz", "hf://someone/model/1m.npz"], "hf://datasets/USER/REPO/FILE"),
    "hf with a bad name": (lambda d: ["npz", "hf://datasets/--/..bad/1m.npz"], "cannot be fetched"),
    "unknown data set": (lambda d: ["npz", _npz(d / "a.npz", image=IMAGES, label=LABELS), "--dataset", "cifar"], "cifar10"),
    "no CIFAR": (lambda d: ["cifar10", d, "--split", "train"], "There is no CIFAR-10 at"),
    "no CIFAR folder": (lambda d: ["cifar10", d / "nowhere", "--split", "test"], "--download"),
    "missing batch": (
        lambda d: (_files(d, b"x")[0].rename(d / "data_batch_2"), ["cifar10", d, "--split", "train"])[1], "data_batch_1",
    ),
    "CIFAR record cut short": (
        lambda d: (_files(d, bytes(3072))[0].rename(d / "test_batch.bin"), ["cifar10", d, "--split", "test"])[1],
        "3072 bytes, expected a multiple of 3073",
    ),
    "CIFAR label out of range": (
        lambda d: (_files(d, b"\x0a" * 3073)[0].rename(d / "test_batch.bin"), ["cifar10", d, "--split", "test"])[1],
        "from 10 to 10",
    ),
    "no split": (lambda d: ["cifar10", d], "--split"),
    "no idx": (lambda d: ["idx", d / "no", d / "no"], "IDX file of images at"),
    "idx empty": (lambda d: ["idx", *_files(d, b"", GREY_LABELS)], "begins with 0x0"),
    "idx swapped": (lambda d: ["idx", *_files(d, GREY_LABELS, GREY)], "0x801, expected 0x803"),
    "idx images twice": (lambda d: ["idx", *_files(d, GREY, GREY)], "0x803, expected 0x801"),
    "idx too short": (lambda d: ["idx", *_files(d, GREY[:-1], GREY_LABELS)], "only 1279"),
    "idx too long": (lambda d: ["idx", *_files(d, GREY + b"x", GREY_LABELS)], "there are more"),
    "idx header only": (lambda d: ["idx", *_files(d, GREY[:10], GREY_LABELS)], "expected 0x803"),
    "idx endless": (
        lambda d: ["idx", *_files(d, struct.pack(">4I", 0x803, *[2**32 - 1] * 3), GREY_LABELS)], "only 0",
    ),
    "idx without images": (
        lambda d: ["idx", *_files(d, struct.pack(">4I", 0x803, 0, 8, 8), struct.pack(">2I", 0x801, 0))], "damaged",
    ),
    "idx labels too short": (lambda d: ["idx", *_files(d, GREY, GREY_LABELS[:-1])], "only 19"),
    "idx lengths differ": (
        lambda d: ["idx", *_files(d, GREY, struct.pack(">2I", 0x801, 2) + b"\0\1")], "shape [2], expected [20]",
    ),
    "gz cut short": (lambda d: ["idx", *_files(d, gzip.compress(GREY)[:-12], GREY_LABELS)], "cut short"),
    "gz damaged": (lambda d: ["idx", *_files(d, gzip.compress(GREY)[:30] + b"?" * 600, GREY_LABELS)], "damaged"),
    "gz only begun": (lambda d: ["idx", *_files(d, b"\x1f\x8b", GREY_LABELS)], "cut short"),
    "idx label out of range": (
        lambda d: ["idx", *_files(d, GREY, GREY_LABELS[:-1] + b"\x0a"), "--dataset", "mnist"], "from 0 to 10",
    ),
    "no block size": (lambda d: ["digits", "--block-size", "0"], "must be at least 1"),
    "no shard size": (lambda d: ["digits", "--shard-size", "many"], "--shard-size"),
    "no kind": (lambda d: [], "KIND"),
    "unknown kind": (lambda d: ["jpeg", d], "'npz'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_a_sentence_and_leaves_nothing(tmp_path, cli, name):
    """Exit status 2, one message that names what is wrong, no traceback, and the disk as it was."""
    make, words = MISTAKES[name]
    argv = make(tmp_path)
    before = _tree(tmp_path)
    result = cli(*argv, "--out", tmp_path / "new" / "parents" / "out")
    assert result.status == 2 and result.out == ""
    assert words in result.err
    message = result.err[result.err.index("error: ") :]
    assert "Traceback" not in result.err and message.count("\n") == 1 and len(message) < 600 + 3 * len(str(tmp_path))
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("place", ["full folder", "file", "below a file", "name too long", "no permission"])
def test_an_impossible_out_is_a_sentence(tmp_path, cli, monkeypatch, place):
    """--out is never overwritten, and looked at before gigabytes are read."""

    def never(*arguments: object) -> None:
        raise AssertionError("read before --out was looked at")

    monkeypatch.setattr(nrat_scale.prepare.__main__, "read_npz", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    out = {
        "full folder": tmp_path / "full",
        "file": tmp_path / "full" / "file",
        "below a file": tmp_path / "full" / "file" / "out",
        "name too long": tmp_path / "new" / ("x" * 300),
        "no permission": tmp_path / "new" / "out",
    }[place]
    if place == "no permission":
        monkeypatch.setattr("os.access", lambda *arguments: False)
    before = _tree(tmp_path)
    result = cli("npz", tmp_path / "a.npz", "--out", out)
    assert result.status == 2 and result.err.startswith("error: ") and str(out.parent) in result.err
    assert result.err.count("\n") == 1 and _tree(tmp_path) == before


def test_out_may_be_the_empty_current_folder(tmp_path, cli, monkeypatch):
    """`--out .` has no name of its own to make a sibling of."""
    images = _npz(tmp_path / "a.npz", image=IMAGES, label=LABELS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli("npz", images, "--out", ".").status == 0
    assert _same(open_shards(tmp_path / "here"), IMAGES, LABELS)


ENDS = [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)]


@pytest.mark.parametrize(("error", "status"), ENDS)
def test_an_end_after_the_first_shard_keeps_it(tmp_path, cli, monkeypatch, digits, error, status):
    """Ctrl-C and a full disk when one of two splits is written: no --out, and the same command goes on from there."""
    real, calls = prepare_cli.write_into, []

    def fails_the_second_time(work, source, name, **options):
        calls.append(name)
        if len(calls) == 2:
            raise error
        return real(work, source, name, **options)

    out, kept = tmp_path / "new" / "out", tmp_path / "new" / ".out.unfinished"
    monkeypatch.setattr(nrat_scale.prepare.__main__, "write_into", fails_the_second_time)
    result = cli("digits", "--out", out)
    assert result.status == status and len(calls) == 2
    assert f"What is finished stays in {kept}" in result.err and "Traceback" not in result.err
    assert list(out.parent.iterdir()) == [kept]
    first = (kept / "whole" / "train" / "shard-00000.tar").stat()
    assert cli("digits", "--out", out).status == 0
    assert (out / "train" / "shard-00000.tar").stat() == first  # not written again
    assert list(out.parent.iterdir()) == [out]
    for path in [path for path in out.rglob("*") if path.is_file()]:
        assert path.read_bytes() == (digits / path.relative_to(out)).read_bytes()


@pytest.mark.parametrize(("error", "status"), ENDS)
def test_an_end_before_the_first_shard_leaves_nothing(tmp_path, cli, monkeypatch, error, status):
    """Ctrl-C and a full disk while a member is unpacked: nothing is worth keeping."""

    def fails(self, *arguments):
        raise error

    np.savez_compressed(tmp_path / "a.npz", image=IMAGES, label=LABELS)
    before = _tree(tmp_path)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fails)
    result = cli("npz", tmp_path / "a.npz", "--out", tmp_path / "new" / "out")
    assert result.status == status and ("No space left" in result.err) == (status == 2)
    assert _tree(tmp_path) == before


# ---- help -----------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_help_are_right(cli):
    """What the help says can be typed: every example names its kind and options as the parser knows them."""
    examples = []
    for kind in (
        *("", "npz", "cifar10", "cifar100", "svhn", "tiny_imagenet", "reshard", "cifar10n", "idx", "digits"),
        *("verify", "info", "merge", "subset", "push"),
    ):
        result = cli(*[kind][: len(kind)], "--help")
        assert result.status == 0
        here = [
            line.strip() for line in result.out.splitlines() if line.strip().startswith("python tools/shard_dataset.py")
        ]
        assert here and (not kind or "examples:" in result.out)
        examples += here
    for example in examples:
        arguments = prepare_cli._parser().parse_args(shlex.split(example)[2:])
        assert callable(arguments.run) and str(getattr(arguments, "out", "data/")).startswith("data/")


def test_index_is_json_without_local_paths(tmp_path, convert):
    """Shards can be published: the index names files, not where they lay on this machine."""
    shards = convert("npz", _npz(tmp_path / "a.npz", image=IMAGES, label=LABELS))
    index = (shards.folder / "index.json").read_text()
    assert str(tmp_path) not in index and json.loads(index)["source"][0]["name"] == "a.npz"
