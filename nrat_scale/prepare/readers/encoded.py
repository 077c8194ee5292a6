"""Decode image files of any size and colour mode into images of one shape: for data that people collected themselves."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, check_choice, first_line
from nrat_scale.prepare.readers.checks import COPY_AGAIN
from nrat_scale.prepare.readers.images import MAX_SIDE, gather, webp_size

FITS = ("crop", "stretch")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_INPUT_SIDE, _MAX_PIXELS = 1 << 15, 1 << 27  # 32,768 and 134 million: 400 MB decoded
_GREY, _COLOUR = ("1", "L"), ("RGB", "P", "CMYK", "YCbCr")
_ALPHA = ("LA", "PA", "RGBA")

Encoded = Callable[[], Iterator[tuple[str, bytes]]]  # (name for messages, content of the file), the same on every call


@dataclass(frozen=True)
class Fit:
    """How an image becomes one of the data set.

    Attributes:
        size: pixels of each side, or None: all images must have the same size already.
        how: "crop" scales the shorter side to `size` and cuts out the centre; "stretch" scales both sides to `size`.
        channels: 1, 3, or None: 1 if all images are grey, else 3.
    """

    size: int | None = None
    how: str = "crop"
    channels: int | None = None

    def __post_init__(self) -> None:
        check_choice("--fit", self.how, FITS)
        if self.size is not None and not 1 <= self.size <= MAX_SIDE:
            raise UserError(f"--size is {self.size}, expected 1..{MAX_SIDE} pixels.")


@dataclass(frozen=True)
class Decoded:
    """Images of one shape, and what was done to them.

    Attributes:
        images: uint8 [N, H, W, C], a memory map.
        num_bytes, sha256: of the input; the hash is over one line per file: "SHA256  NAME".
        note: e.g. "312 of 400 images scaled to 64 x 64 (crop)"; empty if every image was kept as it is.
    """

    images: np.ndarray
    num_bytes: int
    sha256: str
    note: str

    def facts(self, name: str) -> dict[str, Any]:
        """The entry of the index: one for all files, because there may be millions."""
        whole = f"{name} ({len(self.images)} files; sha256 of their sha256sum lines)"
        return {"name": f"{whole}; {self.note}" if self.note else whole, "bytes": self.num_bytes, "sha256": self.sha256}


def decode_all(encoded: Encoded, total: int, fit: Fit, scratch: Path) -> Decoded:
    """Decode PNG, JPEG and WebP files (recognised by content) into a file in `scratch`.

    The orientation in the metadata is applied. Opaque alpha is dropped, palettes and CMYK become RGB.

    Raises:
        UserError: a file is none of these, damaged, larger than 134 million pixels, has several frames, more than 8
            bits or transparent pixels; or the sizes differ and `fit.size` is None.
    """
    channels = fit.channels or _common_channels(encoded, fit)
    hashes, num_bytes, num_scaled = hashlib.sha256(), 0, 0

    def decoded() -> Iterator[tuple[np.ndarray, str]]:
        nonlocal num_bytes, num_scaled
        for where, data in encoded():
            hashes.update(f"{hashlib.sha256(data).hexdigest()}  {where}\n".encode("utf-8", "surrogateescape"))
            num_bytes += len(data)
            pixels, scaled = _decode(data, fit, channels, where)
            num_scaled += scaled
            yield pixels, where

    images = gather(decoded(), scratch, total)
    size = f"{fit.size} x {fit.size}"
    note = f"{num_scaled} of {total} images scaled to {size} ({fit.how})" if num_scaled else ""
    return Decoded(images, num_bytes, hashes.hexdigest(), note)


def _common_channels(encoded: Encoded, fit: Fit) -> int:
    """1 if all images are grey, else 3; sizes that differ are refused before the first image is decoded."""
    sizes: dict[tuple[int, int], str] = {}
    all_grey = True
    for where, data in encoded():
        with _opened(data, where) as image:
            with _decoding(where):  # reads to the end of some formats
                turned = image.getexif().get(0x0112, 1) >= 5
            size = image.size[::-1] if turned else image.size
            sizes.setdefault(size, where)
            all_grey = all_grey and image.mode in (*_GREY, "LA")
        if fit.size is None and len(sizes) > 1:
            (first, one), (other, two) = list(sizes.items())[:2]
            raise UserError(
                f"{one} is {first[0]} x {first[1]}, but {two} is {other[0]} x {other[1]}. Scale all to one size with "
                "--size N (and --fit crop or stretch)."
            )
    return 1 if all_grey else 3


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the errors of Pillow's decoders share no base class
        raise UserError(f"{where} is damaged or cut short ({first_line(error)}). {COPY_AGAIN}") from error


def _opened(data: bytes, where: str) -> Any:
    """The image, not decoded yet, after checks of its format and size."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked below
            if data[8:12] == b"WEBP":
                _check_size(webp_size(data), where)  # Pillow allocates the canvas when it opens a WebP
            image = Image.open(io.BytesIO(data), formats=list(_FORMATS))
    except UserError:
        raise
    except Exception as error:  # as in `_decoding`
        raise UserError(f"{where} is not a readable PNG, JPEG or WebP image. {COPY_AGAIN}") from error
    _check_size(image.size, where)
    return image


def _check_size(size: tuple[int, int], where: str) -> None:
    if min(size) < 1 or max(size) > _MAX_INPUT_SIDE or size[0] * size[1] > _MAX_PIXELS:
        raise UserError(
            f"{where} is {size[0]} x {size[1]}, expected at most {_MAX_PIXELS} pixels. Scale it down first."
        )


def _decode(data: bytes, fit: Fit, channels: int, where: str) -> tuple[np.ndarray, bool]:
    """(uint8 [H, W, channels], whether the image was scaled)."""
    from PIL import Image, ImageOps

    with _opened(data, where) as image:
        with _decoding(where):
            num_frames = getattr(image, "n_frames", 1)
            image.load()
            image = ImageOps.exif_transpose(image)
        if num_frames != 1:
            raise UserError(f"{where} has several frames, expected one. Convert it first.")
        if image.mode in _ALPHA or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                raise UserError(f"{where} has transparent pixels. Put it onto a background first.")
        elif image.mode not in (*_GREY, *_COLOUR):
            raise UserError(f"{where} has mode {image.mode}, expected 8 bits grey or colour. Convert it first.")
        if channels == 1 and image.mode not in _GREY:
            raise UserError(f"{where} is a colour image. Omit --channels 1, or convert the images to grey first.")
        image = image.convert("L" if channels == 1 else "RGB")
        if fit.size is None and max(image.size) > MAX_SIDE:
            raise UserError(f"{where} is {image.width} x {image.height}. Scale the images with --size N.")
        target = image.size if fit.size is None else (fit.size, fit.size)
        scaled = image.size != target
        if scaled:
            resize = ImageOps.fit if fit.how == "crop" else Image.Image.resize
            image = resize(image, target, Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(image.height, image.width, channels), scaled
