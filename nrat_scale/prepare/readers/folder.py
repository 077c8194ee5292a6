"""Read a folder of images with one subfolder for each class, the layout of torchvision's ImageFolder."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError, quoted, warn
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import reading
from nrat_scale.prepare.readers.encoded import Fit, decode_all

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def read_folder(root: Path, fit: Fit, classes: Classes, scratch: Path) -> LabelledArrays:
    """The images below ROOT/CLASS/ (.png, .jpg, .jpeg, .webp), by class and then by path.

    Classes are in the order of `classes`, or of their names; names that are all numbers are ordered as numbers. Hidden
    files are skipped; other files are skipped with a warning.

    Raises:
        UserError: no class folder, a class without images, a class folder that `classes` does not name, and as `decode_all`.
    """
    names = _class_folders(root)
    if known := classes.known_names:
        if unknown := sorted(set(names) - set(known)):
            expected = ", ".join(known[:10])
            raise UserError(f"{root} has a folder {quoted(unknown[0])}, which is none of the classes: {expected}.")
        names = list(known)
    paths, labels, skipped = [], [], []
    for label, name in enumerate(names):
        images, others = _files(root / name)
        skipped += others
        if not images and not known:
            raise UserError(f"{root / name} has no image ({', '.join(EXTENSIONS)}). Remove the folder, or add images.")
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise UserError(f"{root} has no image ({', '.join(EXTENSIONS)}) in its folders. Check the path.")
    if skipped:
        warn(f"{len(skipped)} files that are not images were skipped, e.g. {quoted(skipped[0], 200)}.")

    def encoded() -> Iterator[tuple[str, bytes]]:
        for path in paths:
            with reading(path, "image"):
                yield str(path.relative_to(root)), path.read_bytes()

    decoded = decode_all(encoded, len(paths), fit, scratch)
    named = classes if known else Classes(names=tuple(names))
    facts = [decoded.facts(root.resolve().name)]
    return LabelledArrays.of(decoded.images, np.array(labels, np.int64), named, facts, note=decoded.note)


def _class_folders(root: Path) -> list[str]:
    """The names of the subfolders in label order."""
    with reading(root, "folder"):
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    names = [entry.name for entry in entries if entry.is_dir()]
    if splits := [name for name in names if name.lower() in _SPLITS]:
        raise UserError(f"{root} has the splits {', '.join(splits)}. Convert them one by one: {root / splits[0]}.")
    if not names:
        tars = any(entry.suffix == ".tar" for entry in entries)
        hint = f"For tars: python -m nrat_scale.prepare reshard {root}/*.tar --out DIR. " if tars else ""
        raise UserError(f"{root} has no subfolder. {hint}Expected one folder of images for each class: {root}/CLASS/.")
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """(images below `folder`, paths of other files), sorted, without hidden files and folders."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    files = [path for path in found if path.is_file() and not _hidden(path.relative_to(folder))]
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    return images, [str(path) for path in files if path.suffix.lower() not in EXTENSIONS]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "Thumbs.db" for part in path.parts)
