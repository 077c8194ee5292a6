"""What `shard_dataset.py` does with shards that exist: verify, info (with a contact sheet), merge, subset.

Each subcommand is one function that returns the line or lines to print, and raises `UserError` where the user erred or the
shards are damaged. None changes the shards that it is given.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nrat_scale.errors import UserError
from nrat_scale.files import read_json, write_atomically, write_json
from nrat_scale.pack import Source, write_shards
from nrat_scale.seeds import derive, hash64
from nrat_scale.shards import INDEX, TAR_BLOCK, Block, ShardSet, ShardUnusable, open_shards

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")  # as `shards` admits
_MAX_NAMED = 10  # problems in one message
_CHUNK = 1 << 16  # samples looked at together
_SHEET_COLUMNS, _SHEET_CELL, _SHEET_NAME, _SHEET_ROWS = 16, 64, 140, 200  # images, pixels, pixels, classes


# ---- verify ---------------------------------------------------------------------------------------------------------


def verify(where: str) -> str:
    """Check every byte of the shards at `where`, and that tar, arrays, labels and ids are what the index says.

    Raises:
        UserError: names the first problems, and every unusable shard up to ten.
    """
    shards = open_shards(where, where)
    problems = _problems(shards)
    if problems:
        more = f" ... and {len(problems) - _MAX_NAMED} more." if len(problems) > _MAX_NAMED else ""
        raise UserError(
            f"{where} has {len(problems)} problem{'s'[: len(problems) != 1]}: {' '.join(problems[:_MAX_NAMED])}{more}"
        )
    size = shards.bytes_of(range(len(shards.names))) / 1e6
    return f"{where}: all {len(shards.names)} shards ({len(shards)} images, {size:.1f} MB) are what the index says"


def _problems(shards: ShardSet) -> list[str]:
    """A sentence for each shard that is damaged or not what the index says, and for ids that name two samples."""
    unusable = shards.check(full=True)
    problems: list[str] = []
    for number, name in enumerate(shards.names):
        try:
            if number in unusable:
                raise unusable[number]
            path = shards.fetch(number)
            _check_content(np.memmap(path, np.uint8, mode="r"), shards, number)
        except ShardUnusable as error:
            problems.append(f"{name}: {error.reason}.")
        except (UserError, OSError, ValueError) as error:
            problems.append(f"{name}: {error}.")
    if not problems:  # ids are in the shards
        ids = shards.source_ids(np.arange(len(shards)))
        if len(np.unique(ids)) != len(ids):
            problems.append("Some source ids name two samples.")
    return problems


def _check_content(data: np.ndarray, shards: ShardSet, number: int) -> None:
    """Compare the bytes of a shard (uint8 [m]) with the index, member by member."""
    offset, keys = 0, set()
    counts = np.zeros(shards.num_classes, np.int64)
    for block in shards.blocks_of(number):
        key = ""
        for kind, at, shape, dtype in _members(block, shards.image_shape):
            name, array, offset = _member(data, offset, at, shape, dtype)
            key = key or name.partition(".")[0]
            if name != f"{key}.{kind}.npy":
                raise ValueError(f"it has a member {name} where {key or 'KEY'}.{kind}.npy should be")
            if kind == "labels":
                if array.min() < 0 or array.max() >= shards.num_classes:
                    raise ValueError(f"{name} has labels outside 0..{shards.num_classes - 1}")
                counts += np.bincount(array, minlength=shards.num_classes)
            elif kind == "ids" and (array.min() < 0 or array.max() >= block.num_ids):
                raise ValueError(f"{name} has ids outside 0..{block.num_ids - 1}")
        if key in keys:
            raise ValueError(f"it has two blocks {key}")
        keys.add(key)
    if len(data) < offset + 2 * TAR_BLOCK or data[offset:].any():
        raise ValueError("it does not end where the index says")
    if (counts != shards.class_counts_of(number)).any():
        raise ValueError("its labels are not those that the index counts")


def _members(block: Block, image_shape: tuple[int, ...]) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
    """(kind, offset, shape, dtype) of each member of a block."""
    yield "images", block.image_offset, (block.num_images, *image_shape), "|u1"
    yield "labels", block.label_offset, (block.num_images,), "<i8"
    if block.id_offset >= 0:
        yield "ids", block.id_offset, (block.num_images,), "<i8"


def _member(data: np.ndarray, offset: int, at: int, shape: tuple[int, ...], dtype: str) -> tuple[str, np.ndarray, int]:
    """(name, array, offset of the next member) of the member at `offset`, whose data should stand at `at`."""
    try:
        member = tarfile.TarInfo.frombuf(data[offset : offset + TAR_BLOCK].tobytes(), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"there is no tar header at byte {offset} ({error})") from None
    start = offset + TAR_BLOCK
    stream = io.BytesIO(data[start:at].tobytes())
    try:
        assert np.lib.format.read_magic(stream) == (1, 0)
        header = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{member.name} has no readable .npy header ({error})") from None
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if header != (shape, False, np.dtype(dtype)) or start + stream.tell() != at or start + member.size != at + size:
        raise ValueError(f"{member.name} is not the array of shape {list(shape)} that the index says")
    array = data[at : at + size].view(dtype).reshape(shape)
    return member.name, array, start + -(-member.size // TAR_BLOCK) * TAR_BLOCK


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
            for part in shards.parts
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


def _label_chunks(shards: ShardSet) -> Iterator[np.ndarray]:
    for first in range(0, len(shards), _CHUNK):
        yield shards.labels(np.arange(first, min(first + _CHUNK, len(shards))))


def _order_warning(shards: ShardSet) -> str | None:
    """A warning where runs of equal labels are far longer than a random order of these classes would have them."""
    changes, last = 0, -1
    for labels in _label_chunks(shards):
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
    for labels in _label_chunks(shards):
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


# ---- merge ----------------------------------------------------------------------------------------------------------


def merge(folders: Sequence[Path], out: Path) -> str:
    """Write the index `out` (PARENT/index.json) over shard folders that lie in PARENT; no shard is copied or changed.

    The ids of each set are shifted by the id spaces of those before it.

    Raises:
        UserError: a folder is not in PARENT, is given twice, is damaged or differs in shape or classes; `out` exists.
    """
    if out.name != INDEX:
        raise UserError(f"--out must be PARENT/{INDEX}, where PARENT holds the shard folders, not {out}.")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already and is never overwritten. Remove it yourself.")
    names = [_name_in(folder, out.parent) for folder in folders]
    if len(set(names)) != len(names):
        raise UserError("A folder is given twice. Every set can be merged once.")
    sets = [open_shards(folder, str(folder)) for folder in folders]
    for folder, shards in zip(folders, sets, strict=True):
        for what, mine, other in (
            ("image shape", list(shards.image_shape), list(sets[0].image_shape)),
            ("classes", list(shards.class_names), list(sets[0].class_names)),
        ):
            if mine != other:
                raise UserError(
                    f"{folder} has other {what} than {folders[0]}: {_short(mine)} instead of {_short(other)}."
                )
        shards.verify()
    merged = _merged(names, sets)
    ShardSet(out.parent, merged, str(out))  # what is written can be opened
    write_json(out, merged)
    return f"{out}: {merged['num_images']} images in {len(merged['shards'])} shards of {len(sets)} folders"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _name_in(folder: Path, parent: Path) -> str:
    """The path of `folder` below `parent`, as the names of shards begin."""
    here, there = Path(os.path.abspath(folder)), Path(os.path.abspath(parent))
    if not here.is_relative_to(there) or here == there:
        raise UserError(f"{folder} does not lie in {parent}. Merged folders must lie below the index that names them.")
    name = here.relative_to(there).as_posix()
    if not _FOLDER_NAME.fullmatch(name):
        raise UserError(f"{name} cannot stand in an index. Rename it: letters, digits, '.', '_' and '-' only.")
    return name


def _merged(names: Sequence[str], sets: Sequence[ShardSet]) -> dict[str, Any]:
    indices = [read_json(Path(shards.folder) / INDEX, "index") for shards in sets]
    parts, first_id = [], 0
    for index, shards in zip(indices, sets, strict=True):
        parts += [{**part, "first_id": part["first_id"] + first_id} for part in index["parts"]]
        first_id += shards.num_ids
    datasets = {shards.dataset for shards in sets}
    return {
        **indices[0],
        "dataset": datasets.pop() if len(datasets) == 1 else "custom",
        "num_images": sum(len(shards) for shards in sets),
        "class_counts": np.sum([shards.class_counts for shards in sets], axis=0).tolist(),
        "parts": parts,
        "source": [file for index in indices for file in index["source"]],
        "shards": [
            {**shard, "name": f"{name}/{shard['name']}"}
            for name, index in zip(names, indices, strict=True)
            for shard in index["shards"]
        ],
    }


# ---- subset ---------------------------------------------------------------------------------------------------------


class _Chosen:
    """The images at some positions of shards, as an array that is read only where it is indexed."""

    def __init__(self, shards: ShardSet, positions: np.ndarray) -> None:
        self._shards, self._positions = shards, positions
        self.shape = (len(positions), *shards.image_shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._shards.images(self._positions[rows])


def subset(
    where: str,
    out: Path,
    *,
    per_class: int | None = None,
    ids: Path | None = None,
    scores: Path | None = None,
    keep: str | None = None,
    seed: int = 0,
    **sizes: Any,
) -> str:
    """Write some samples of the shards at `where` as shards of their own, in their order and under their source ids.

    Args:
        per_class: that many of each class, the first in an order drawn with `seed`.
        ids: file of source ids, .npy (integers [m]) or .txt (one a line).
        scores: .npy of numbers [number of source ids]; the samples with the highest are kept, of equal ones the first.
        keep: with `scores`, how many: a number, or a fraction such as 0.8.
        sizes: see `write_shards`.

    Raises:
        UserError: not exactly one selection, or an impossible one.
    """
    if [per_class, ids, scores].count(None) != 2 or (scores is None) != (keep is None):
        raise UserError("Give exactly one selection: --per-class N, --ids FILE, or --scores FILE with --keep.")
    shards = open_shards(where, where)
    shards.verify()
    here = shards.source_ids(np.arange(len(shards)))
    if per_class is not None:
        positions, how = _first_of_each_class(shards, here, per_class, seed), {"per_class": per_class, "seed": seed}
    elif ids is not None:
        positions, how = _positions_of_ids(shards, _read_ids(ids), ids), {}
    else:
        assert scores is not None and keep is not None
        positions, how = _highest(_read_scores(scores, shards)[here], here, keep), {}
    positions = np.sort(positions)  # in stored order, which is mixed already
    source = Source(
        _Chosen(shards, positions), shards.labels(positions), shards.dataset, shards.class_names,
        tuple(shards.source_files),
    )  # fmt: skip
    options = {"shards": shards.fingerprint, **how}
    write_shards(source, out, ids=here[positions], num_ids=shards.num_ids, options=options, **sizes)
    return f"{out}: {len(positions)} of the {len(shards)} images of {where}"


def _first_of_each_class(shards: ShardSet, ids: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    rank = hash64(derive(seed, "subset"), ids)  # of the id, so that it does not depend on the order of the shards
    labels = np.concatenate(list(_label_chunks(shards)))
    chosen = []
    for label, name in enumerate(shards.class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise UserError(f"The class '{name}' has only {len(members)} images. Lower --per-class ({per_class}).")
        chosen.append(members[np.argsort(rank[members], kind="stable")[:per_class]])
    return np.concatenate(chosen)


def _load_npy(path: Path, what: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"The {what} {path} is no .npy file of numbers ({error}).") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1:
        raise UserError(f"The {what} {path} must be an .npy file with one array of one dimension.")
    return array


def _read_ids(path: Path) -> np.ndarray:
    """int64 [m] of a .npy or .txt file."""
    what = "file of ids"
    if path.suffix == ".npy":
        ids = _load_npy(path, what)
        if ids.dtype.kind not in "iu":
            raise UserError(f"The {what} {path} has dtype {ids.dtype}, expected integers.")
    else:
        try:
            lines = path.read_text(encoding="utf-8").split()
            ids = np.asarray([int(line) for line in lines], np.int64)
        except OSError as error:
            raise UserError(f"The {what} {path} cannot be read ({error.strerror}).") from error
        except (ValueError, OverflowError) as error:
            raise UserError(f"The {what} {path} must have one integer on each line ({error}).") from error
    if not len(ids):
        raise UserError(f"The {what} {path} is empty.")
    if int(ids.max()) > np.iinfo(np.int64).max:
        raise UserError(f"There is no sample with the source id {int(ids.max())}, which {path} names.")
    return ids.astype(np.int64)


def _positions_of_ids(shards: ShardSet, ids: np.ndarray, path: Path) -> np.ndarray:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise UserError(f"{path} names the source id {unique[counts > 1][0]} more than once.")
    positions = shards.positions_of(ids)
    if (positions < 0).any():
        raise UserError(
            f"There is no sample with the source id {ids[positions < 0][0]}, which {path} names "
            f"({int((positions < 0).sum())} unknown ids)."
        )
    return positions


def _read_scores(path: Path, shards: ShardSet) -> np.ndarray:
    """float [number of source ids]."""
    scores = _load_npy(path, "file of scores")
    if scores.dtype.kind not in "iuf":
        raise UserError(f"The file of scores {path} has dtype {scores.dtype}, expected numbers.")
    if len(scores) != shards.num_ids:
        raise UserError(
            f"The file of scores {path} has {len(scores)} numbers, expected {shards.num_ids}: one for each source id."
        )
    if np.isnan(scores).any():
        raise UserError(
            f"The file of scores {path} holds NaN, for instance for the source id {np.isnan(scores).argmax()}."
        )
    return scores


def _highest(scores: np.ndarray, ids: np.ndarray, keep: str) -> np.ndarray:
    """int64 [m]: the places of the highest of `scores` [N]; of equal ones those with the lowest `ids` [N] come first."""
    try:
        number = int(keep) if keep.isdecimal() else max(1, round(float(keep) * len(scores)))
        possible = 1 <= number <= len(scores) and (keep.isdecimal() or 0 < float(keep) <= 1)
    except (ValueError, OverflowError):
        possible = False
    if not possible:
        raise UserError(f"--keep {keep} is neither a number in 1..{len(scores)} nor a fraction such as 0.8.")
    return np.lexsort((ids, -scores.astype(np.float64)))[:number]
