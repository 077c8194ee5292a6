"""Data and checks that the tests of data preparation share."""

import hashlib
import io
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from nrat_scale.data.shards import ShardSet
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards

NAMES = ("plane", "cat", "ship")
FILES = ({"name": "made.npz", "bytes": 5, "sha256": "0" * 64},)


def random_images(
    num_images: int = 100, shape: tuple[int, ...] = (8, 8, 3), *, seed: int = 0, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [num_images, *shape], int64 [num_images]), sorted by class as published files are."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    return images, np.sort(generator.permutation(np.arange(num_images) % num_classes))


def random_source(num_images: int = 70, shape: tuple[int, int, int] = (8, 6, 3), *, seed: int = 0) -> LabelledArrays:
    """Random images of three classes."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    return LabelledArrays(images, generator.integers(0, 3, num_images), "custom", NAMES, FILES)


def small_shards(folder: Path, source: LabelledArrays | None = None, **options: object) -> Path:
    """`write_shards` in blocks of 16; the default source gives three shards of 32, 32 and 6 images."""
    return write_shards(
        source or random_source(), folder, **{"block_size": 16, "shard_size": 32, "progress": False, **options}
    )


def holds(shards: ShardSet, images: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the shards are exactly these samples, in source order."""
    order = shards.in_source_order()
    return np.array_equal(shards.images(order), images) and np.array_equal(shards.labels(order), labels)


def facts(*paths: Path) -> list[dict[str, object]]:
    """The entries of input files in an index."""
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    ]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its content, every folder with None; without records of verified shards."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".verified.json"
    }


def is_one_sentence(result: SimpleNamespace, *words: str) -> bool:
    """Whether a command ended with exit status 2 and one printable line that contains `words`, without output."""
    return (
        result.status == 2
        and result.out == ""
        and result.err.startswith("error: ")
        and result.err.endswith("\n")
        and result.err[:-1].isprintable()
        and all(word in result.err for word in words)
    )


def npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def npy_header(shape: str, dtype: str = "|u1", fortran_order: str = "False") -> bytes:
    """The header of an .npy file that states this text."""
    text = f"{{'descr': '{dtype}', 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def encoded(image: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    """An image file of Pillow's format `kind`."""
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


def flip_bit(path: Path, offset: int) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


class CallOnUnpickling:
    """Calls `function` when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def assert_refused(cli: Callable[..., SimpleNamespace], folder: Path, argv: list, *words: str) -> None:
    """A conversion ends with one sentence and leaves `folder`, where its --out is, as it was."""
    before = tree(folder)
    result = cli(*argv, "--out", folder / "new" / "parents" / "out")
    assert is_one_sentence(result, *words), result
    assert len(result.err) < 600 + 3 * len(str(folder))
    assert tree(folder) == before


class FailingImages:
    """The images of `random_source()`, of which reading fails at call number `at`."""

    def __init__(self, error: BaseException, at: int) -> None:
        self._images, self._error, self._calls_left = random_source().images, error, at
        self.shape = self._images.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self._calls_left -= 1
        if self._calls_left < 0:
            raise self._error
        return self._images[rows]
