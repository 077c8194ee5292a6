"""Encoded images, decoded carefully, and the data set that needs it here: Tiny ImageNet's folders.

An image file can claim any size and hold any format that Pillow knows. Here the format is one of those expected, the
size is looked at before a pixel is decoded, and whatever Pillow stumbles over ends in a sentence that names the file.
"""

import hashlib
import io
import re
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from nrat_scale.datasets import DATASETS
from nrat_scale.errors import UserError
from nrat_scale.pack import Source
from readers import COPY_AGAIN, facts_of, make_source, reading

MAX_SIDE = 1024  # pixels; this is a program for small images
_CHANNELS = {"L": 1, "RGB": 3}  # Pillow's modes of 8 bits without transparency

TINY_SPLITS = ("train", "val")
TINY_PER_CLASS = {"train": 500, "val": 50}  # as published: a file that got lost is noticed
_TINY_SIDE = 64
_MAX_TEXT_BYTES = 1 << 24  # of wnids.txt and val_annotations.txt, which have 2 KB and 270 KB


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


# ---- Tiny ImageNet --------------------------------------------------------------------------------------------------


def read_tiny_imagenet(root: Path, split: str, scratch: Path) -> Source:
    """One split of Tiny ImageNet: 200 classes in the order of their sorted WordNet ids, RGB 64 x 64.

    Grey images, of which there are some, become RGB. Order: `train` by class and then by file name, `val` as in
    val_annotations.txt.

    Args:
        root: holds or is the folder tiny-imagenet-200.
        split: "train" or "val" (nobody published the labels of `test`).
        scratch: an existing folder; the images are unpacked there.

    Raises:
        UserError: something is missing, too much, damaged, or not as published.
    """
    folder = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    names = DATASETS["tiny_imagenet"].class_names
    _check_wnids(folder / "wnids.txt", names)
    listed = _train_images(folder, names) if split == "train" else _val_images(folder, names)
    labels = np.array([label for _, label in listed], np.int64)
    counts = np.bincount(labels, minlength=len(names))
    if (counts != TINY_PER_CLASS[split]).any():
        label = int(np.flatnonzero(counts != TINY_PER_CLASS[split])[0])
        raise UserError(
            f"The class {names[label]} has {counts[label]} images in the split '{split}' of {folder}, expected "
            f"{TINY_PER_CLASS[split]} as published. Unpack tiny-imagenet-200.zip again."
        )
    images, facts = _decoded_files(folder, split, [path for path, _ in listed], scratch)
    files = [facts_of(folder / "wnids.txt", "list of classes"), facts]
    if split == "val":
        files.append(facts_of(folder / "val" / "val_annotations.txt", "list of labels"))
    return make_source(images, labels, "tiny_imagenet", files)


def _lines(path: Path, what: str) -> list[str]:
    with reading(path, what), open(path, "rb") as file:
        content = file.read(_MAX_TEXT_BYTES + 1)
        if len(content) > _MAX_TEXT_BYTES:
            raise UserError(f"The {what} {path} has more than {_MAX_TEXT_BYTES} bytes and is none.")
        return content.decode("ascii").splitlines()


def _check_wnids(path: Path, names: Sequence[str]) -> None:
    wnids = [line.strip() for line in _lines(path, "list of classes (wnids.txt of tiny-imagenet-200)") if line.strip()]
    if sorted(wnids) != list(names):
        odd = sorted(set(wnids) ^ set(names))
        raise UserError(
            f"{path} does not list the {len(names)} classes of Tiny ImageNet: {len(wnids)} lines"
            f"{f', among those missing or too many {odd[0]!r}' if odd else ''}. Unpack tiny-imagenet-200.zip again."
        )


def _files_in(folder: Path, what: str) -> list[str]:
    """Sorted names; everything in it must be a regular file called .JPEG."""
    with reading(folder, what):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.suffix != ".JPEG" or entry.is_symlink() or not entry.is_file():
            raise UserError(f"{entry} is no .JPEG file, and nothing else belongs there. Remove it.")
    return [entry.name for entry in entries]


def _train_images(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(path, label) of every image, by class and then by file name."""
    train = folder / "train"
    with reading(train, "folder of training images"):
        odd = sorted({entry.name for entry in train.iterdir()} ^ set(names))
    if odd:
        raise UserError(f"{train} must hold one folder for each class; {odd[0]!r} is missing or too many.")
    return [
        (train / name / "images" / file, label)
        for label, name in enumerate(names)
        for file in _files_in(train / name / "images", "folder of training images")
    ]


def _val_images(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(path, label) of every image, in the order of val_annotations.txt."""
    path, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    label_of = {name: label for label, name in enumerate(names)}
    there = set(_files_in(images, "folder of validation images"))
    listed: dict[str, int] = {}
    for number, line in enumerate(_lines(path, "list of labels"), 1):
        file, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in label_of or file not in there or file in listed:
            wrong = (
                f"an unknown class {wnid!r}" if wnid not in label_of else f"{file!r}, which is missing or listed twice"
            )
            raise UserError(f"Line {number} of {path} names {wrong}. Unpack tiny-imagenet-200.zip again.")
        listed[file] = label_of[wnid]
    if unlisted := sorted(there - set(listed)):
        raise UserError(f"{images / unlisted[0]} has no line in {path}. Unpack tiny-imagenet-200.zip again.")
    return [(images / file, label) for file, label in listed.items()]


def _decoded_files(folder: Path, split: str, paths: Sequence[Path], scratch: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(uint8 [N, 64, 64, 3], their facts as one entry: a hash over names and contents; an index needs no 100,000)."""
    total, hashes = 0, hashlib.sha256()
    with gathering(scratch) as images, progress(len(paths), "decoding") as bar:
        for path in paths:
            with reading(path, "image"):
                data = path.read_bytes()
            image = decode(data, "JPEG", 3, str(path))
            if image.shape != (_TINY_SIDE, _TINY_SIDE, 3):
                raise UserError(f"{path} is {image.shape[1]} x {image.shape[0]}, expected {_TINY_SIDE} x {_TINY_SIDE}.")
            images.add(image, str(path))
            total += len(data)
            hashes.update(f"{hashlib.sha256(data).hexdigest()}  {path.relative_to(folder).as_posix()}\n".encode())
            bar.update()
        name = f"tiny-imagenet-200/{split} ({len(paths)} files; sha256 of their sha256sum lines)"
        return images.array(), {"name": name, "bytes": total, "sha256": hashes.hexdigest()}
