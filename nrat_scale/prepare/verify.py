"""Verify shards: every byte, every tar member, every label and id."""

import io
import tarfile

import numpy as np

from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.data.index import TAR_BLOCK
from nrat_scale.data.shards import ShardSet, ShardUnusable, open_shards

_MAX_NAMED = 10  # problems in one message


def verify(where: str) -> str:
    """Check that the shards at `where` are intact and agree with their index; returns a summary line.

    Raises:
        UserError: names the first ten problems.
    """
    shards = open_shards(where, where)
    if problems := _problems(shards):
        more = f" ... and {len(problems) - _MAX_NAMED} more." if len(problems) > _MAX_NAMED else ""
        number = f"{len(problems)} problem{'s'[: len(problems) != 1]}"
        raise UserError(f"{where} has {number}: {' '.join(problems[:_MAX_NAMED])}{more}")
    size = sum(shards.shard_bytes) / 1e6
    return f"{where}: all {len(shards.names)} shards ({len(shards)} images, {size:.1f} MB) match the index"


def _problems(shards: ShardSet) -> list[str]:
    """A sentence for each shard that is damaged or contradicts the index, and for duplicate ids."""
    shards.check(full=True)  # `fetch` raises on the shards that it marks as unusable; they are reported below
    problems: list[str] = []
    for number, name in enumerate(shards.names):
        try:
            _check_content(np.memmap(shards.fetch(number), np.uint8, mode="r"), shards, number)
        except ShardUnusable as error:
            problems.append(f"{name}: {error.reason}.")
        except (UserError, OSError, ValueError) as error:
            problems.append(f"{name}: {error}.")
    if not problems:  # stored ids can only be read from intact shards
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
        members = [("images", block.image_offset, shards.image_shape, "|u1"), ("labels", block.label_offset, (), "<i8")]
        if block.id_offset >= 0:
            members.append(("ids", block.id_offset, (), "<i8"))
        for kind, at, sample_shape, dtype in members:
            shape = block.num_images, *sample_shape
            name, array, offset = _member(data, offset, at, shape, dtype)
            key = key or name.partition(".")[0]
            if name != f"{key}.{kind}.npy":
                raise ValueError(f"it has a member {quoted(name)}, expected {quoted(f'{key}.{kind}.npy')}")
            if kind == "labels":
                if array.min() < 0 or array.max() >= shards.num_classes:
                    raise ValueError(f"{name} has labels outside 0..{shards.num_classes - 1}")
                counts += np.bincount(array, minlength=shards.num_classes)
            elif kind == "ids" and (array.min() < 0 or array.max() >= shards.segments[block.segment].num_ids):
                raise ValueError(f"{name} has ids outside 0..{shards.segments[block.segment].num_ids - 1}")
        if key in keys:
            raise ValueError(f"it has two blocks {quoted(key)}")
        keys.add(key)
    if len(data) < offset + 2 * TAR_BLOCK or data[offset:].any():
        raise ValueError("it does not end where the index says")
    if (counts != shards.shard_class_counts[number]).any():
        raise ValueError("its labels do not have the class counts of the index")


def _member(data: np.ndarray, offset: int, at: int, shape: tuple[int, ...], dtype: str) -> tuple[str, np.ndarray, int]:
    """(name, array, offset of the next member) of the member at `offset`, whose data should begin at `at`."""
    try:
        member = tarfile.TarInfo.frombuf(data[offset : offset + TAR_BLOCK].tobytes(), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"there is no tar header at byte {offset} ({error})") from None
    start = offset + TAR_BLOCK
    stream = io.BytesIO(data[start:at].tobytes())
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not version 1.0")
        header = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise ValueError(f"{quoted(member.name)} has no readable .npy header ({first_line(error)})") from None
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if header != (shape, False, np.dtype(dtype)) or start + stream.tell() != at or start + member.size != at + size:
        raise ValueError(f"{quoted(member.name)} is not the array of shape {list(shape)} that the index describes")
    array = data[at : at + size].view(dtype).reshape(shape)
    return member.name, array, start + -(-member.size // TAR_BLOCK) * TAR_BLOCK
