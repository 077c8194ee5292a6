"""Decode image files, with checks before anything is decoded."""

import io
import re
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.readers.arrays import COPY_AGAIN

MAX_SIDE = 1024  # pixels; this is a program for small images
_CHANNELS = {"L": 1, "RGB": 3}  # Pillow's modes of 8 bits without transparency


# ---- one image ------------------------------------------------------------------------------------------------------


def decode(data: bytes, kind: str, channels: int | None, where: str) -> np.ndarray:
    """uint8 [H, W, C] of an encoded image of 8 bits, grey or RGB. Grey becomes RGB where 3 channels are asked for.

    An orientation in the image's metadata is not applied, as everywhere in training code.

    Args:
        kind: "PNG", "JPEG" or "WEBP"; any other content is refused, whatever the file is called.
        channels: 1, 3, or None for those of the image.

    Raises:
        UserError: not such an image, damaged, larger than 1024 x 1024, of another mode, or in colour where it is to be grey.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large size, which is judged below, and of odd metadata
            if kind == "WEBP":
                check_side(_webp_size(data), where)  # Pillow reserves the canvas as soon as it opens one
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                check_side(image.size, where)
                image.verify()  # a PNG's checksums, which are not looked at while it is decoded
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                _check_mode(image, channels, where)
                grey_or_rgb = image.convert("RGB") if channels == 3 else image
                return np.asarray(grey_or_rgb).reshape(image.height, image.width, -1)
    except UserError:
        raise
    except Exception as error:  # what Pillow's decoders raise shares no base class
        raise UserError(f"{where} is no readable {kind} image ({_reason(error)}). {COPY_AGAIN}") from error


def _reason(error: Exception) -> str:
    return re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)).partition("\n")[0] or type(error).__name__


def check_side(size: tuple[int, int], where: str) -> None:
    """Refuse a (width, height) beyond `MAX_SIDE` or without pixels."""
    width, height = size
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(
            f"{where} is {width} x {height}, expected at most {MAX_SIDE} x {MAX_SIDE}. Images are stored unpacked: scale "
            "them to the size of training first."
        )


def _check_mode(image: Image.Image, channels: int | None, where: str) -> None:
    if image.mode not in _CHANNELS or "transparency" in image.info or getattr(image, "n_frames", 1) != 1:
        what = f"mode {image.mode}" if image.mode not in _CHANNELS else "transparency or several frames"
        raise UserError(f"{where} has {what}, expected 8 bits grey or RGB (Pillow's L or RGB). Convert it first.")
    if channels == 1 and image.mode != "L":
        raise UserError(f"{where} is in colour among grey images. Convert all images to one kind first.")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a WebP's first chunk, of whichever of the three kinds it is."""
    kind = data[12:16]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        raise ValueError("it begins otherwise")
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"its first chunk is {kind!r}")


# ---- many images ----------------------------------------------------------------------------------------------------


class Gathered:
    """Images of one shape, written one after the other into a file, to be mapped at the end: memory stays small.

    Attributes:
        shape: (H, W, C) of the first image; None before it.
        count: images so far.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.shape: tuple[int, ...] | None = None
        self.count = 0

    def add(self, image: np.ndarray, where: str) -> None:
        """Append uint8 [H, W, C].

        Raises:
            UserError: another shape than that of the first image.
        """
        self.shape = self.shape or image.shape
        if image.shape != self.shape:
            raise UserError(
                f"{where} has shape {list(image.shape)}, but the first image has {list(self.shape)}. All images of a data "
                "set must have one shape."
            )
        self._file.write(np.ascontiguousarray(image).data)  # not through a map: a full disk must raise, not kill
        self.count += 1

    def array(self) -> np.ndarray:
        """uint8 [N, H, W, C], a read-only memory map."""
        assert self.shape is not None and self.count
        self._file.flush()
        return np.memmap(self._path, np.uint8, mode="r", shape=(self.count, *self.shape))


@contextmanager
def gathering(scratch: Path) -> Iterator[Gathered]:
    """A `Gathered` whose file lies in the folder `scratch`; a full disk is a `UserError`."""
    path = scratch / "images"
    try:
        with open(path, "wb") as file:
            yield Gathered(file, path)
    except OSError as error:
        raise UserError(
            f"The images cannot be unpacked beside --out ({error.strerror or error}); that takes their full size for a "
            "while. Free some space, or choose another --out."
        ) from error


def progress(total: int, what: str) -> Any:
    """A bar on a terminal."""
    return tqdm(total=total, desc=what, unit="img", disable=not sys.stderr.isatty())
