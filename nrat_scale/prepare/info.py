"""Describe shards: counts, input files, a contact sheet."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_atomically
from nrat_scale.data.shards import ShardSet, open_shards

CHUNK = 1 << 16  # samples looked at together
_SHEET_COLUMNS, _SHEET_CELL, _SHEET_NAME, _SHEET_ROWS = 16, 64, 140, 200  # images, pixels, pixels, classes


# ---- info -----------------------------------------------------------------------------------------------------------


def info(where: str, sheet: Path | None = None) -> str:
    """What the index says of the shards at `where`, and whether their order is mixed; a contact sheet into `sheet`.

    Of shards behind an address nothing is fetched but what the sheet shows.

    Raises:
        UserError: no shards, damaged ones, or `sheet` exists already.
    """
    if sheet is not None and (sheet.suffix.lower() != ".png" or sheet.exists() or not sheet.parent.is_dir()):
        why = "exists already" if sheet.exists() else "is no .png in a folder that exists"
        raise UserError(f"The contact sheet {sheet} {why}. Choose another --sheet.")
    shards = open_shards(where, where)
    size = shards.bytes_of(range(len(shards.names))) / 1e6
    lines = [
        f"{where}: {len(shards)} images of shape {list(shards.image_shape)} ({shards.dataset}) in "
        f"{len(shards.names)} shard{'s'[: len(shards.names) != 1]}, {size:.1f} MB",
        f"fingerprint: {shards.fingerprint}",
        "classes:",
        *(f"  {name}: {count}" for name, count in zip(shards.class_names, shards.class_counts, strict=True)),
        "source files:",
        *(f"  {_file_line(file)}" for file in shards.source_files),
        "parts:",
        *(
            f"  {part.num_images} images, source ids {part.first_id}..{part.first_id + part.num_ids - 1}, "
            + ("ids stored" if part.seed is None else f"permuted with seed {part.seed}")
            for part in shards.segments
        ),
    ]
    if shards.is_remote:
        lines.append("The stored order was not looked at: the shards are not here.")
    elif (warning := _order_warning(shards)) is not None:
        lines.append(warning)
    if sheet is not None:
        write_atomically(sheet, _contact_sheet(shards))
        lines.append(f"contact sheet: {sheet}")
    return "\n".join(lines)


def _file_line(file: Any) -> str:
    facts = file if isinstance(file, dict) else {"name": file}
    return ", ".join(
        f"{facts[key]}" if key == "name" else f"{key} {facts[key]}"
        for key in ("name", "bytes", "sha256")
        if key in facts
    )


def label_chunks(shards: ShardSet) -> Iterator[np.ndarray]:
    for first in range(0, len(shards), CHUNK):
        yield shards.labels(np.arange(first, min(first + CHUNK, len(shards))))


def _order_warning(shards: ShardSet) -> str | None:
    """A warning where runs of equal labels are far longer than a random order of these classes would have them."""
    changes, last = 0, -1
    for labels in label_chunks(shards):
        changes += int((np.diff(labels, prepend=last) != 0).sum())
        last = int(labels[-1])
    runs, num_images, counts = changes, len(shards), np.asarray(shards.class_counts, np.float64)
    expected = 1 + (num_images - 1) * (1 - (counts * (counts - 1)).sum() / max(num_images * (num_images - 1.0), 1.0))
    # Twice as long on average, and beyond chance: the number of runs varies by at most half of sqrt(N).
    if 2 * runs >= expected or expected - runs <= 2 * num_images**0.5:
        return None
    return (
        f"warning: the stored order is sorted by class: labels stay the same for {num_images / runs:.1f} images on "
        f"average, in a random order it would be {num_images / expected:.1f}. Convert the source files again."
    )


def _contact_sheet(shards: ShardSet) -> bytes:
    """PNG: a row of samples for each class (200 at most) with its name, the first in stored order."""
    rows = min(shards.num_classes, _SHEET_ROWS)
    chosen: list[list[int]] = [[] for _ in range(rows)]
    missing = [min(_SHEET_COLUMNS, count) for count in shards.class_counts[:rows]]
    first = 0
    for labels in label_chunks(shards):
        for label in range(rows):
            if len(chosen[label]) < missing[label]:
                found = first + np.flatnonzero(labels == label)
                chosen[label] += found[: missing[label] - len(chosen[label])].tolist()
        first += len(labels)
        if all(len(there) >= wanted for there, wanted in zip(chosen, missing, strict=True)):
            break
    cell = min(_SHEET_CELL, max(32, *shards.image_shape[:2]))
    sheet = Image.new("RGB", (_SHEET_NAME + _SHEET_COLUMNS * (cell + 2), rows * (cell + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, positions in enumerate(chosen):
        # The font that comes with Pillow knows no other letters.
        name = shards.class_names[row].encode("ascii", "replace").decode()[:22]
        draw.text((4, row * (cell + 2) + cell // 2 - 6), name, "black", font)
        for column, image in enumerate(shards.images(np.asarray(positions, np.int64))):
            picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).convert("RGB")
            scale = cell / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(size, filter_), (_SHEET_NAME + column * (cell + 2), row * (cell + 2)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()
