"""Decoding images: exactly Pillow's pixels, or one plain sentence before anything large is allocated."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.readers.images import decode
from tests.support.preparation import encoded


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
    """A silent conversion would lose transparency, colours, 16 bits or frames."""
    with pytest.raises(UserError, match=r"has (mode|transparency)"):
        decode(encoded(Image.new(mode, (8, 8)), kind, **options), kind, None, "it")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decoding_is_pillows(kind, mode):
    """8 bits grey and RGB, and grey as RGB on request."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)))
    decoded = decode(data, kind, None, "it")
    channels = expected.shape[2] if expected.ndim == 3 else 1
    assert np.array_equal(decoded, expected.reshape(6, 9, channels))
    assert np.array_equal(decode(data, kind, 3, "it"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    if channels == 3:
        with pytest.raises(UserError, match="RGB among grey"):
            decode(data, kind, 1, "it")


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
    """Refused by its header: no pixel is decoded, nothing is allocated, and Pillow's own warning is not printed."""
    with pytest.raises(UserError, match=r"expected at most 1024 x 1024|not a readable PNG"):
        decode(_png_claiming(side, side), "PNG", None, "it")


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_a_webp_that_claims_a_huge_size(kind):
    """Pillow would allocate the canvas on opening it."""
    with pytest.raises(UserError, match="expected at most 1024 x 1024"):
        decode(_webp_claiming(kind), "WEBP", None, "it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_any_damaged_byte_of_an_image(kind):
    """Any damage ends in a sentence or an array (JPEG and WebP have no checksum); a damaged PNG is never accepted."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = decode(whole, kind, None, "it")
    generator, noticed = np.random.default_rng(0), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.integers(8)
        try:
            image = decode(bytes(damaged), kind, 3, "it")
        except UserError:
            noticed += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3
            assert kind != "PNG" or np.array_equal(image, expected)
    for length in range(len(whole)):
        if kind == "PNG" and length >= len(whole) - 12:
            continue  # the last chunk is empty: without it the image is complete
        try:
            decode(whole[:length], kind, 3, "it")
        except UserError:
            noticed += 1
    assert noticed > len(whole) // 2
