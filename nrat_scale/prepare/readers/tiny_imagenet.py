"""Encoded images, decoded carefully, and the data set that needs it here: Tiny ImageNet's folders.

An image file can claim any size and hold any format that Pillow knows. Here the format is one of those expected, the
size is looked at before a pixel is decoded, and whatever Pillow stumbles over ends in a sentence that names the file.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.arrays import facts_of, labelled_arrays, reading
from nrat_scale.prepare.readers.images import decode, gathering, progress

TINY_SPLITS = ("train", "val")
TINY_PER_CLASS = {"train": 500, "val": 50}  # as published: a file that got lost is noticed
_TINY_SIDE = 64
_MAX_TEXT_BYTES = 1 << 24  # of wnids.txt and val_annotations.txt, which have 2 KB and 270 KB


# ---- Tiny ImageNet --------------------------------------------------------------------------------------------------


def read_tiny_imagenet(root: Path, split: str, scratch: Path) -> LabelledArrays:
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
    return labelled_arrays(images, labels, "tiny_imagenet", files)


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
