"""The IDX reader: MNIST's files, plain and gzipped, or one plain sentence."""

import gzip
import struct

import numpy as np
import pytest

from nrat_scale.datasets import DATASETS
from tests.support.preparation import assert_refused, facts, holds, random_images


def _idx(images: np.ndarray, labels: np.ndarray) -> tuple[bytes, bytes]:
    return (
        struct.pack(">4I", 0x803, *images.shape[:3]) + images.tobytes(),
        struct.pack(">2I", 0x801, len(labels)) + bytes(labels.tolist()),
    )


GREY, LABELS = _idx(*random_images(20, (8, 8, 1)))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_comes_back_exactly(tmp_path, convert, packed):
    """[N, H, W] gets its one channel."""
    images, labels = random_images(60, (10, 12, 1))
    paths = [tmp_path / f"{name}{'.gz' * packed}" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for path, content in zip(paths, _idx(images, labels), strict=True):
        path.write_bytes(gzip.compress(content) if packed else content)
    shards = convert("idx", *paths, "--dataset", "fashion_mnist")
    assert holds(shards, images, labels)
    assert shards.class_names == DATASETS["fashion_mnist"].class_names and shards.source_files == facts(*paths)
    assert convert("idx", *paths).dataset == "custom"


def test_images_can_be_scaled(tmp_path, convert, cli):
    """--size scales flat images exactly; the index says so; other shapes are refused."""
    small, labels = random_images(20, (6, 6, 1), seed=1)
    small = np.where(small < 128, 40, 200).astype(np.uint8)
    flat = np.broadcast_to(small[:, :1, :1], (20, 12, 12, 1))
    paths = [tmp_path / "images", tmp_path / "labels"]
    for path, content in zip(paths, _idx(np.ascontiguousarray(flat), labels), strict=True):
        path.write_bytes(content)
    shards = convert("idx", *paths, "--size", 6)
    assert holds(shards, np.broadcast_to(small[:, :1, :1], (20, 6, 6, 1)), labels)
    assert "20 images scaled from 12 x 12 to 6 x 6" in shards.source_files[0]["name"]
    for size, words in ((0, "expected 1..1024"), (5000, "expected 1..1024")):
        assert_refused(cli, tmp_path, ["idx", *paths, "--size", size], words)
    paths[0].write_bytes(_idx(*random_images(20, (8, 10, 1)))[0])
    assert_refused(cli, tmp_path, ["idx", *paths, "--size", 6], "needs square images")


# name -> (content of the two files, words of the message)
MISTAKES = {
    "empty": (b"", LABELS, "begins with 0x0"),
    "swapped": (LABELS, GREY, "0x801, expected 0x803"),
    "images twice": (GREY, GREY, "0x803, expected 0x801"),
    "too short": (GREY[:-1], LABELS, "there are 1279"),
    "too long": (GREY + b"x", LABELS, "there are more"),
    "header only": (GREY[:10], LABELS, "expected 0x803"),
    "endless": (struct.pack(">4I", 0x803, *[2**32 - 1] * 3), LABELS, "there are 0"),
    "without images": (struct.pack(">4I", 0x803, 0, 8, 8), struct.pack(">2I", 0x801, 0), "damaged"),
    "labels too short": (GREY, LABELS[:-1], "there are 19"),
    "lengths differ": (GREY, struct.pack(">2I", 0x801, 2) + b"\0\1", "shape [2], expected [20]"),
    "gz cut short": (gzip.compress(GREY)[:-12], LABELS, "cut short"),
    "gz longer than stated": (gzip.compress(GREY + bytes(1 << 20)), LABELS, "there are more"),
    "gz damaged": (gzip.compress(GREY)[:30] + b"?" * 600, LABELS, "damaged"),
    "gz header only": (b"\x1f\x8b", LABELS, "cut short"),
    "label out of range": (GREY, LABELS[:-1] + b"\x0a", "from 0 to 10"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(tmp_path, cli, name):
    """Wrong files are named; no memory is reserved for what a header states."""
    *contents, words = MISTAKES[name]
    paths = [tmp_path / "images", tmp_path / "labels"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert_refused(cli, tmp_path, ["idx", *paths, "--dataset", "mnist"], words)


def test_missing_files_are_named(tmp_path, cli):
    """The images first."""
    assert_refused(cli, tmp_path, ["idx", tmp_path / "no", tmp_path / "no"], "no IDX file of images at")
