"""Describe shards: counts, classes, input files, stored order; a contact sheet."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_atomically
from nrat_scale.data.shards import ShardSet, open_shards

_LABELS_AT_A_TIME = 1 << 16
_COLUMNS, _MAX_ROWS, _CELL_PIXELS, _NAME_PIXELS = 16, 200, 64, 140  # of a contact sheet


def info(where: str, sheet: Path | None = None) -> str:
    """A description of the shards at `where`, and a contact sheet in the new file `sheet`.

    If `where` is an address, only the index and the shards of the contact sheet are fetched.

    Raises:
        UserError: no shards, damaged ones, or `sheet` exists already.
    """
    if sheet is not None and (sheet.suffix.lower() != ".png" or sheet.exists() or not sheet.parent.is_dir()):
        why = "already exists" if sheet.exists() else "is not a .png in an existing folder"
        raise UserError(f"The contact sheet {sheet} {why}. Choose another --sheet.")
    shards = open_shards(where, where)
    size, num_shards = sum(shards.shard_bytes) / 1e6, len(shards.names)
    what = f"{len(shards)} images of shape {list(shards.image_shape)} ({shards.dataset})"
    lines = [
        f"{where}: {what} in {num_shards} shard{'s'[: num_shards != 1]}, {size:.1f} MB",
        f"fingerprint: {shards.fingerprint}",
        "classes:",
        *(f"  {name}: {count}" for name, count in zip(shards.class_names, shards.class_counts, strict=True)),
        "source files:",
        *(f"  {_file_line(file)}" for file in shards.source_files),
        "segments:",
    ]
    for segment in shards.segments:
        ids = f"source ids {segment.first_id}..{segment.first_id + segment.num_ids - 1}"
        order = "ids stored" if segment.seed is None else f"permuted with seed {segment.seed}"
        lines.append(f"  {segment.num_images} images, {ids}, {order}")
    if shards.is_remote:
        lines.append("The stored order was not checked: the shards are remote.")
    elif (warning := _order_warning(shards)) is not None:
        lines.append(warning)
    if sheet is not None:
        write_atomically(sheet, _contact_sheet(shards))
        lines.append(f"contact sheet: {sheet}")
    return "\n".join(lines)


def _file_line(file: Any) -> str:
    facts = file if isinstance(file, dict) else {"name": file}
    prefixes = {"name": "", "bytes": "bytes ", "sha256": "sha256 "}
    return ", ".join(f"{prefix}{facts[key]}" for key, prefix in prefixes.items() if key in facts)


def _label_chunks(shards: ShardSet) -> Iterator[np.ndarray]:
    for first in range(0, len(shards), _LABELS_AT_A_TIME):
        yield shards.labels(np.arange(first, min(first + _LABELS_AT_A_TIME, len(shards))))


def _order_warning(shards: ShardSet) -> str | None:
    """A warning if runs of equal labels are far longer than in a random order of these classes."""
    runs, last = 0, -1
    for labels in _label_chunks(shards):
        runs += int((np.diff(labels, prepend=last) != 0).sum())
        last = int(labels[-1])
    num_images, counts = len(shards), np.asarray(shards.class_counts, np.float64)
    expected = 1 + (num_images - 1) * (1 - (counts * (counts - 1)).sum() / max(num_images * (num_images - 1.0), 1.0))
    # Twice as long on average, and beyond chance: the standard deviation of the number of runs is at most sqrt(N) / 2.
    if 2 * runs >= expected or expected - runs <= 2 * num_images**0.5:
        return None
    return (
        f"warning: the stored order is sorted by class: runs of one label have {num_images / runs:.1f} images on average, "
        f"but {num_images / expected:.1f} in a random order. Convert the source files again."
    )


def _contact_sheet(shards: ShardSet) -> bytes:
    """PNG with one row per class (200 at most): its name and its first samples in stored order."""
    from PIL import Image, ImageDraw, ImageFont

    rows = min(shards.num_classes, _MAX_ROWS)
    cell = min(_CELL_PIXELS, max(32, *shards.image_shape[:2]))
    sheet = Image.new("RGB", (_NAME_PIXELS + _COLUMNS * (cell + 2), rows * (cell + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, positions in enumerate(_first_of_each_class(shards, rows)):
        # Pillow's built-in font has only ASCII letters.
        name = shards.class_names[row].encode("ascii", "replace").decode()[:22]
        draw.text((4, row * (cell + 2) + cell // 2 - 6), name, "black", font)
        for column, image in enumerate(shards.images(np.asarray(positions, np.int64))):
            picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).convert("RGB")
            scale = cell / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(size, resampling), (_NAME_PIXELS + column * (cell + 2), row * (cell + 2)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _first_of_each_class(shards: ShardSet, num_classes: int) -> list[list[int]]:
    """The positions of the first samples of each class; labels are read only until every row is full."""
    chosen: list[list[int]] = [[] for _ in range(num_classes)]
    wanted = [min(_COLUMNS, count) for count in shards.class_counts[:num_classes]]
    for number, labels in enumerate(_label_chunks(shards)):
        for label, positions in enumerate(chosen):
            found = number * _LABELS_AT_A_TIME + np.flatnonzero(labels == label)
            positions += found[: wanted[label] - len(positions)].tolist()
        if list(map(len, chosen)) == wanted:
            break
    return chosen
