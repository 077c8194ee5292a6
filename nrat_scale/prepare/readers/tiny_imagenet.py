"""Read Tiny ImageNet: the folder tiny-imagenet-200 of JPEG files, as published."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import file_facts, read_small, reading
from nrat_scale.prepare.readers.images import decode, gather

TINY_PER_CLASS = {"train": 500, "val": 50}  # as published, to detect lost files
_SIDE = 64
_MOST_TEXT = 1 << 24  # bytes; wnids.txt has 2 KB, val_annotations.txt 270 KB
_UNPACK_AGAIN = "Unpack tiny-imagenet-200.zip again."


def read_tiny_imagenet(root: Path, split: str, scratch: Path) -> LabelledArrays:
    """One split of Tiny ImageNet: 200 classes in the order of their WordNet ids, RGB 64 x 64; grey images become RGB.

    Order: `train` by class and then by file name, `val` as in val_annotations.txt.

    Args:
        root: the folder tiny-imagenet-200, or the folder that contains it.
        split: "train" or "val" (the labels of `test` were never published).
    """
    folder = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    names = DATASETS["tiny_imagenet"].class_names
    with reading(wnids := folder / "wnids.txt", "list of classes"):
        classes = sorted(read_small(wnids, "list of classes", _MOST_TEXT).decode("ascii").split())
    if classes != list(names):
        raise UserError(f"{wnids} does not list the {len(names)} classes of Tiny ImageNet. {_UNPACK_AGAIN}")
    listed = _train_images(folder, names) if split == "train" else _val_images(folder, names)
    labels = np.array([label for _, label in listed], np.int64)
    counts = np.bincount(labels, minlength=len(names))
    if (counts != TINY_PER_CLASS[split]).any():
        label = int(np.flatnonzero(counts != TINY_PER_CLASS[split])[0])
        found = f"{counts[label]} images in the split '{split}' of {folder}"
        expected = f"{TINY_PER_CLASS[split]} as published"
        raise UserError(f"The class {names[label]} has {found}, expected {expected}. {_UNPACK_AGAIN}")
    images, facts = _decoded_files(folder, split, [path for path, _ in listed], scratch)
    files = [file_facts(wnids, "list of classes"), facts]
    if split == "val":
        files.append(file_facts(folder / "val" / "val_annotations.txt", "list of labels"))
    return LabelledArrays.of(images, labels, Classes("tiny_imagenet"), files)


def _files_in(folder: Path, what: str) -> list[str]:
    """Sorted names; every entry must be a regular file called .JPEG."""
    with reading(folder, what):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.suffix != ".JPEG" or entry.is_symlink() or not entry.is_file():
            raise UserError(f"{entry} is not a .JPEG file, and nothing else belongs there. Remove it.")
    return [entry.name for entry in entries]


def _train_images(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(path, label) of every image, by class and then by file name."""
    train, what = folder / "train", "folder of training images"
    with reading(train, what):
        odd = sorted({entry.name for entry in train.iterdir()} ^ set(names))
    if odd:
        raise UserError(f"{train} must have one folder for each class; {quoted(odd[0])} is missing or unexpected.")
    folders = [train / name / "images" for name in names]
    return [(folder / file, label) for label, folder in enumerate(folders) for file in _files_in(folder, what)]


def _val_images(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(path, label) of every image, in the order of val_annotations.txt."""
    path, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    existing = set(_files_in(images, "folder of validation images"))
    listed: dict[str, int] = {}
    with reading(path, "list of labels"):
        lines = read_small(path, "list of labels", _MOST_TEXT).decode("ascii").splitlines()
    for number, line in enumerate(lines, 1):
        file, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in names:
            raise UserError(f"Line {number} of {path} names an unknown class {quoted(wnid)}. {_UNPACK_AGAIN}")
        if file not in existing or file in listed:
            wrong = f"names {quoted(file)}, which is missing or listed twice"
            raise UserError(f"Line {number} of {path} {wrong}. {_UNPACK_AGAIN}")
        listed[file] = names.index(wnid)
    if unlisted := sorted(existing - set(listed)):
        raise UserError(f"{images / unlisted[0]} has no line in {path}. {_UNPACK_AGAIN}")
    return [(images / file, label) for file, label in listed.items()]


def _decoded_files(folder: Path, split: str, paths: Sequence[Path], scratch: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(uint8 [N, 64, 64, 3], one entry for the index: a hash over all names and contents, instead of 100,000 entries)."""
    hashes = hashlib.sha256()

    def decoded() -> Iterator[tuple[np.ndarray, str]]:
        for path in paths:
            with reading(path, "image"):
                data = path.read_bytes()
            image = decode(data, "JPEG", 3, str(path))
            if image.shape != (_SIDE, _SIDE, 3):
                raise UserError(f"{path} is {image.shape[1]} x {image.shape[0]}, expected {_SIDE} x {_SIDE}.")
            hashes.update(f"{hashlib.sha256(data).hexdigest()}  {path.relative_to(folder).as_posix()}\n".encode())
            yield image, str(path)

    images = gather(decoded(), scratch, len(paths))
    name = f"tiny-imagenet-200/{split} ({len(paths)} files; sha256 of their sha256sum lines)"
    total = sum(path.stat().st_size for path in paths)
    return images, {"name": name, "bytes": total, "sha256": hashes.hexdigest()}
