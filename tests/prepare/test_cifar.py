"""The CIFAR readers: both versions of both data sets; no pickle but the published ones, and nothing in them runs."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.readers.cifar import CIFAR10_MD5, CIFAR100_MD5
from tests.support.preparation import CallOnUnpickling, assert_refused, facts, holds, random_images, tree

Samples = tuple[np.ndarray, np.ndarray]
TRAIN_10 = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR = pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
MD5 = {"cifar10": CIFAR10_MD5, "cifar100": CIFAR100_MD5}
PYTHON = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
BINARY = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _rows(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 3072] in CIFAR's order: the red plane, then the green, then the blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def _pickle10(images: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({b"data": _rows(images), b"labels": labels.tolist()}, protocol=4)


def _pickle100(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The coarse labels are wrong on purpose: they must not be read."""
    labels = {b"fine_labels": labels.tolist(), b"coarse_labels": [0] * len(labels)}
    return pickle.dumps({b"data": _rows(images), **labels}, protocol=4)


def _records10(images: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, _rows(images), strict=True))


def _records100(images: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(bytes([3, label]) + row.tobytes() for label, row in zip(labels, _rows(images), strict=True))


PICKLE = {"cifar10": _pickle10, "cifar100": _pickle100}
RECORDS = {"cifar10": _records10, "cifar100": _records100}


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


def _make(
    folder: Path, dataset: str, encode: Callable[[np.ndarray, np.ndarray], bytes], suffix: str = ""
) -> dict[str, Samples]:
    """All batches, of 11, 12, ... images, and the samples of each split."""
    folder.mkdir(parents=True)
    batches: dict[str, list[Samples]] = {"train": [], "test": []}
    for number, name in enumerate(MD5[dataset]):
        samples = random_images(11 + number, (32, 32, 3), seed=number, num_classes=len(DATASETS[dataset].class_names))
        (folder / f"{name}{suffix}").write_bytes(encode(*samples))
        batches["test" if "test" in name else "train"].append(samples)
    return {
        split: (np.concatenate([images for images, _ in samples]), np.concatenate([labels for _, labels in samples]))
        for split, samples in batches.items()
    }


def _publish(monkeypatch: pytest.MonkeyPatch, folder: Path, dataset: str) -> None:
    """Make the md5 of the batches in `folder` the published ones."""
    for path in folder.iterdir():
        monkeypatch.setitem(MD5[dataset], path.name, _md5(path.read_bytes()))


@CIFAR
def test_pickles_come_back_exactly(tmp_path, convert, monkeypatch, dataset):
    """The Python version, whether ROOT contains its folder or is it: colour planes, batches and classes in order."""
    folder = tmp_path / PYTHON[dataset]
    expected = _make(folder, dataset, PICKLE[dataset])
    _publish(monkeypatch, folder, dataset)
    train = convert(dataset, tmp_path, "--split", "train")
    assert holds(train, *expected["train"])
    assert train.dataset == dataset and train.class_names == DATASETS[dataset].class_names
    assert [file["name"] for file in train.source_files] == (TRAIN_10 if dataset == "cifar10" else ["train"])
    assert holds(convert(dataset, folder, "--split", "test"), *expected["test"])


def test_pickles_of_python_2_come_back_exactly(tmp_path, convert, monkeypatch):
    """The published files were written by Python 2 and numpy 1."""
    expected = _make(tmp_path / PYTHON["cifar10"], "cifar10", _python2_batch)
    _publish(monkeypatch, tmp_path / PYTHON["cifar10"], "cifar10")
    for split in ("train", "test"):
        assert holds(convert("cifar10", tmp_path, "--split", split), *expected[split])


@CIFAR
def test_records_come_back_exactly(tmp_path, convert, dataset):
    """The binary version gives the same images as the Python version."""
    folder = tmp_path / BINARY[dataset]
    expected = _make(folder, dataset, RECORDS[dataset], ".bin")
    train = convert(dataset, tmp_path, "--split", "train")
    assert holds(train, *expected["train"])
    names = TRAIN_10 if dataset == "cifar10" else ["train"]
    assert train.source_files == facts(*(folder / f"{name}.bin" for name in names))
    assert holds(convert(dataset, folder, "--split", "test"), *expected["test"])


@CIFAR
@pytest.mark.medium
def test_published_md5_sums(dataset):
    """The tables that guard the unpickling agree with torchvision's."""
    import torchvision

    published = getattr(torchvision.datasets, dataset.upper())
    assert dict(published.train_list + published.test_list) == MD5[dataset]
    assert published.base_folder == PYTHON[dataset]


# ---- pickles that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, np.array], ids=lambda function: function.__name__)
@CIFAR
def test_a_pickle_that_asks_for_a_function_is_refused(tmp_path, cli, monkeypatch, dataset, function):
    """Even with the right md5, nothing but uint8 arrays is rebuilt: neither programs nor other parts of numpy."""
    trap = tmp_path / "trap"
    argument = f"__import__('os').mkdir({str(trap)!r})" if function is eval else str(trap)
    folder = tmp_path / PYTHON[dataset]
    folder.mkdir()
    call = CallOnUnpickling(function, argument)
    name = "test_batch" if dataset == "cifar10" else "test"
    (folder / name).write_bytes(pickle.dumps({b"data": call, b"labels": [0], b"fine_labels": [0]}, protocol=4))
    _publish(monkeypatch, folder, dataset)
    assert_refused(cli, tmp_path, [dataset, tmp_path, "--split", "test"], name, "not allowed")


@CIFAR
def test_a_pickle_with_another_md5_is_not_opened(tmp_path, cli, dataset):
    """The published md5 is the condition for unpickling at all."""
    _make(tmp_path / PYTHON[dataset], dataset, PICKLE[dataset])
    name = next(iter(MD5[dataset]))
    words = f"{name} has md5", MD5[dataset][name], "was not opened"
    assert_refused(cli, tmp_path, [dataset, tmp_path, "--split", "train"], *words)


PIXELS = np.zeros((1, 3072), np.uint8)
NO_BATCHES = {
    "no pickle": b"no pickle",
    **{
        name: pickle.dumps(content, protocol=4)
        for name, content in {
            "a list": [1, 2],
            "no data": {b"labels": [1]},
            "a number": {b"data": 1, b"labels": [1]},
            "other width": {b"data": PIXELS[:, :3], b"labels": [1]},
            "one row": {b"data": PIXELS[0], b"labels": [1]},
            "no rows": {b"data": PIXELS[:0], b"labels": []},
            "floats": {b"data": PIXELS / 255, b"labels": [1]},
            "objects": {b"data": PIXELS.astype(object), b"labels": [1]},
            "too many labels": {b"data": PIXELS, b"labels": [1, 2]},
            "no such class": {b"data": PIXELS, b"labels": [10]},
            "negative class": {b"data": PIXELS, b"labels": [-1]},
            "names": {b"data": PIXELS, b"labels": ["cat"]},
            "a dict of labels": {b"data": PIXELS, b"labels": {1: 2}},
        }.items()
    },
}


@pytest.mark.parametrize("name", NO_BATCHES)
def test_a_batch_of_something_else_is_refused(tmp_path, cli, monkeypatch, name):
    """A published pickle with another layout ends in a sentence."""
    folder = tmp_path / PYTHON["cifar10"]
    folder.mkdir()
    (folder / "test_batch").write_bytes(NO_BATCHES[name])
    _publish(monkeypatch, folder, "cifar10")
    assert_refused(cli, tmp_path, ["cifar10", tmp_path, "--split", "test"])


# ---- missing and damaged files --------------------------------------------------------------------------------------


def test_missing_and_damaged_files_are_named(tmp_path, cli):
    """No folder, a missing batch, records that are cut short, and a label outside the classes."""
    assert_refused(cli, tmp_path, ["cifar10", tmp_path, "--split", "train"], "There is no CIFAR-10 at", "--download")
    assert_refused(cli, tmp_path, ["cifar100", tmp_path / "nowhere", "--split", "test"], "There is no CIFAR-100 at")
    (tmp_path / "data_batch_2").write_bytes(b"x")
    assert_refused(cli, tmp_path, ["cifar10", tmp_path, "--split", "train"], "data_batch_1")
    for dataset, name, content, words in [
        ("cifar10", "test_batch.bin", bytes(3072), "3072 bytes, expected a multiple of 3073"),
        ("cifar10", "test_batch.bin", b"\x0a" * 3073, "from 10 to 10"),
        ("cifar100", "test.bin", bytes(3073), "a multiple of 3074"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert_refused(cli, tmp_path, [dataset, tmp_path, "--split", "test"], words)


# ---- download -------------------------------------------------------------------------------------------------------


def _serve(server, monkeypatch: pytest.MonkeyPatch, folder: Path, dataset: str) -> dict[str, Samples]:
    """A small archive at torchvision's address."""
    import torchvision

    expected = _make(folder / PYTHON[dataset], dataset, PICKLE[dataset])
    _publish(monkeypatch, folder / PYTHON[dataset], dataset)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.add(folder / PYTHON[dataset], PYTHON[dataset])
    published = getattr(torchvision.datasets, dataset.upper())
    server.files[f"/{published.filename}"] = content.getvalue()
    monkeypatch.setattr(published, "url", f"{server.url}/{published.filename}")
    monkeypatch.setattr(published, "tgz_md5", _md5(content.getvalue()))
    return expected


@CIFAR
def test_cifar_is_downloaded_once(tmp_path, convert, server, monkeypatch, dataset):
    """--download downloads into ROOT, and the second split finds it there."""
    expected, root = _serve(server, monkeypatch, tmp_path / "made", dataset), tmp_path / "new" / "root"
    assert holds(convert(dataset, root, "--split", "train", "--download"), *expected["train"])
    assert [path.name for path in root.iterdir()] == [PYTHON[dataset]]
    server.files.clear()
    assert holds(convert(dataset, root, "--split", "test", "--download"), *expected["test"])


@pytest.mark.parametrize("content", [None, b"something else"])
def test_a_failed_download_leaves_nothing(tmp_path, cli, server, monkeypatch, content):
    """No archive or a wrong one: a sentence, and no partial CIFAR-10 that a later run would take for complete."""
    _serve(server, monkeypatch, tmp_path / "made", "cifar10")
    (tmp_path / "root").mkdir()
    server.files.clear()
    if content is not None:
        server.files["/cifar-10-python.tar.gz"] = content
    before = tree(tmp_path)
    argv = ["cifar10", tmp_path / "root", "--split", "train", "--download", "--out", tmp_path / "new" / "out"]
    result = cli(*argv)
    assert result.status == 2 and "error: CIFAR-10 cannot be downloaded" in result.err and server.url in result.err
    assert tree(tmp_path) == before
