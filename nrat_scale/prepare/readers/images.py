"""Decode image files into one memory-mapped array.

An image file can state any size and contain any format that Pillow knows. The format must be the expected one, and the
size is checked before any pixel is decoded.
"""

import io
import re
import struct
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.checks import COPY_AGAIN

MAX_SIDE = 1024  # pixels
_MODES = ("L", "RGB")  # Pillow's modes of 8 bits without transparency


def decode(data: bytes, kind: str, channels: int | None, where: str) -> np.ndarray:
    """uint8 [H, W, C] of an encoded 8-bit image, grey or RGB; grey becomes RGB if `channels` is 3.

    The orientation in the metadata is not applied, as is usual in training code.

    Args:
        kind: "PNG", "JPEG" or "WEBP"; other content is refused, whatever the file is called.
        channels: 1, 3, or None to keep those of the image.

    Raises:
        UserError: not such an image, damaged, above 1024 x 1024, of another mode, or RGB although `channels` is 1.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large sizes, which are checked below, and odd metadata
            if kind == "WEBP":
                check_side(webp_size(data), where)  # Pillow allocates the canvas when it opens a WebP
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                check_side(image.size, where)
                image.verify()  # the checksums of a PNG, which decoding ignores
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                if image.mode not in _MODES or "transparency" in image.info or getattr(image, "n_frames", 1) != 1:
                    found = "transparency or several frames" if image.mode in _MODES else f"mode {image.mode}"
                    raise UserError(f"{where} has {found}, expected 8 bits grey or RGB (L or RGB). Convert it first.")
                if channels == 1 and image.mode != "L":
                    raise UserError(f"{where} is RGB among grey images. Convert all images to one mode first.")
                grey_or_rgb = image.convert("RGB") if channels == 3 else image
                return np.asarray(grey_or_rgb).reshape(image.height, image.width, -1)
    except UserError:
        raise
    except Exception as error:  # the errors of Pillow's decoders share no base class
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", first_line(error))
        raise UserError(f"{where} is not a readable {kind} image ({reason}). {COPY_AGAIN}") from error


def check_side(size: tuple[int, int], where: str) -> None:
    """Refuse a (width, height) above `MAX_SIDE`, or without pixels."""
    if not all(1 <= side <= MAX_SIDE for side in size):
        expected = f"expected at most {MAX_SIDE} x {MAX_SIDE}"
        raise UserError(f"{where} is {size[0]} x {size[1]}, {expected}. Scale the images to the training size first.")


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the first chunk of a WebP, of any of the three kinds."""
    kind = data[12:16]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        raise ValueError("it has no WebP header")
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"its first chunk is {kind!r}")


def gather(images: Iterable[tuple[np.ndarray, str]], scratch: Path, total: int | None) -> np.ndarray:
    """Write images of one shape to a file in `scratch` one by one, and map it: uint8 [N, H, W, C].

    Args:
        images: (uint8 [H, W, C], name for messages) each.
        total: for the progress bar.
    """
    path, shape = scratch / "images", None
    with open(path, "wb") as file:
        for image, where in tqdm(images, total=total, desc="decoding", unit="img", disable=not sys.stderr.isatty()):
            shape = shape or image.shape
            if image.shape != shape:
                raise UserError(f"{where} has shape {list(image.shape)}, but the first image has {list(shape)}.")
            file.write(np.ascontiguousarray(image).data)  # with a memory map, a full disk would end in SIGBUS
    if shape is None:
        raise UserError("The data set is empty.")
    return np.memmap(path, np.uint8, mode="r").reshape(-1, *shape)


def scaled(source: LabelledArrays, size: int | None, scratch: Path) -> LabelledArrays:
    """`source` with square images of `size` pixels a side (bicubic, with the antialiasing of Pillow); None keeps them.

    The new images lie in a file in `scratch`; the index says what was done.

    Raises:
        UserError: `size` is not in 1..1024, or the images are not square.
    """
    from PIL import Image

    if size is None:
        return source
    if not 1 <= size <= MAX_SIDE:
        raise UserError(f"--size is {size}, expected 1..{MAX_SIDE} pixels.")
    num_images, height, width, channels = source.images.shape
    if height != width:
        raise UserError(f"--size needs square images, but these are {height} x {width}. Crop them first.")
    note = f"{num_images} images scaled from {width} x {width} to {size} x {size}"

    def resized() -> Iterable[tuple[np.ndarray, str]]:
        for number in range(num_images):
            pixels = np.asarray(source.images[number])
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            image = image.resize((size, size), Image.Resampling.BICUBIC)
            yield np.asarray(image).reshape(size, size, channels), f"image {number}"

    files = tuple(
        {**facts, "name": f"{facts['name']}; {note}"} if i == 0 else facts for i, facts in enumerate(source.files)
    )
    return replace(source, images=gather(resized(), scratch, num_images), files=files, note=note)
