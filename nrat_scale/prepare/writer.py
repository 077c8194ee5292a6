"""Write labelled images as shards: tars of image blocks, and the index that makes them verifiable.

The same images, sizes and seed give the same bytes. docs/data.md describes the format.
"""

import hashlib
import io
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import write_json
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.data.index import FORMAT, INDEX, PERMUTATION, TAR_BLOCK, VERSION
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.staging import staged

BLOCK_SIZE, SHARD_SIZE = 512, 51_200  # images; a CIFAR shard of 100 blocks is about 157 MB
_MAX_BLOCK_BYTES = 1 << 32  # a tar member above 8 GiB needs a longer header; a block must fit into memory several times


def convert(read: Callable[[Path], LabelledArrays | Mapping[str, LabelledArrays]], out: Path, **options: Any) -> str:
    """Write what `read` returns as shards into the new folder `out`; returns a summary, one line per folder.

    Args:
        read: scratch folder -> the images, or several data sets by the name of their subfolder in `out`.
        options: see `write_into`.

    Raises:
        UserError: the input, a size or an id is wrong, or `out` is not new, is being written or cannot be written.
    """
    with staged(out) as staging:
        try:
            given = read(staging.scratch)
        except OSError as error:
            raise UserError(f"The input cannot be read, or cannot be unpacked beside {out} ({error}).") from error
        sources = {"": given} if isinstance(given, LabelledArrays) else given
        for name, source in sources.items():
            write_into(staging.whole / name, source, **options)
    return "\n".join(_summary(out / name, source) for name, source in sources.items())


def _summary(folder: Path, source: LabelledArrays) -> str:
    sizes = [path.stat().st_size for path in folder.glob("*.tar")]
    what = f"{len(source.labels)} images of {len(source.class_names)} classes ({source.dataset})"
    summary = f"{folder}: {what} in {len(sizes)} shard{'s'[: len(sizes) != 1]}, {sum(sizes) / 1e6:.1f} MB"
    return f"{summary}; {source.note}" if source.note else summary


def write_shards(source: LabelledArrays, folder: Path, **options: Any) -> Path:
    """Like `convert`, for `source` in memory or in memory maps; returns `folder`."""
    convert(lambda scratch: source, folder, **options)
    return folder


def write_into(
    folder: Path,
    source: LabelledArrays,
    *,
    block_size: int = BLOCK_SIZE,
    shard_size: int = SHARD_SIZE,
    seed: int = 0,
    ids: np.ndarray | None = None,
    num_ids: int | None = None,
    progress: bool = True,
) -> None:
    """Write the shards of `source` and their index into `folder`; `write_shards` does so atomically.

    Args:
        block_size: images per block.
        shard_size: images per shard, rounded up to whole blocks.
        seed: of the permutation of the samples.
        ids: int64 [N]: write the samples in the given order and store these source ids with them. If None, the
            samples are permuted and the index names the permutation.
        num_ids: with `ids`: the ids are in 0..num_ids - 1; if None, one more than the highest.
        progress: show a progress bar.

    Raises:
        UserError: bad sizes or ids.
        OSError: `folder` cannot be written.
    """
    num_images = len(source.labels)
    _check_sizes(source, block_size, shard_size)
    if ids is not None:
        ids = np.ascontiguousarray(ids, "<i8")
        num_ids = num_ids or int(ids.max(initial=-1)) + 1
        if len(ids) != num_images or ids.min() < 0 or ids.max() >= num_ids or len(np.unique(ids)) != num_images:
            raise UserError(f"The ids must be {num_images} different numbers in 0..{num_ids - 1}, one for each image.")
    rows_at = KeyedPermutation(num_images, seed, PERMUTATION) if ids is None else lambda positions: positions
    num_blocks, per_shard = -(-num_images // block_size), -(-shard_size // block_size)
    shards: list[dict[str, Any]] = []
    folder.mkdir(exist_ok=True)
    with tqdm(total=num_images, desc="writing shards", unit="img", disable=not progress) as bar:
        for first in range(0, num_blocks, per_shard):
            blocks = (
                (f"{block:08d}", rows_at(np.arange(block * block_size, min((block + 1) * block_size, num_images))))
                for block in range(first, min(first + per_shard, num_blocks))
            )
            path = folder / f"shard-{len(shards):05d}.tar"
            shards.append(_write_shard(path, source, blocks, ids, bar.update))
    seed_in_index = seed if ids is None else None
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": source.dataset,
        "class_names": list(source.class_names),
        "image_shape": [int(n) for n in source.images.shape[1:]],
        "num_images": num_images,
        "class_counts": np.bincount(source.labels, minlength=len(source.class_names)).tolist(),
        "parts": [{"num_images": num_images, "first_id": 0, "num_ids": num_ids or num_images, "seed": seed_in_index}],
        "block_size": block_size,
        "source": list(source.files),
        "shards": shards,
    }
    write_json(folder / INDEX, index)


def _check_sizes(source: LabelledArrays, block_size: int, shard_size: int) -> None:
    if block_size < 1 or shard_size < 1:
        raise UserError(f"--block-size ({block_size}) and --shard-size ({shard_size}) must be at least 1.")
    num_bytes = min(block_size, len(source.labels)) * math.prod(source.images.shape[1:])
    if num_bytes > _MAX_BLOCK_BYTES:
        raise UserError(f"A block of {block_size} images has {num_bytes / 1e9:.1f} GB. Lower --block-size.")


def _write_shard(
    path: Path,
    source: LabelledArrays,
    blocks: Iterable[tuple[str, np.ndarray]],
    ids: np.ndarray | None,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Write the blocks (key, rows of `source`); returns the shard's entry in the index."""
    entries = []
    class_counts = np.zeros(len(source.class_names), np.int64)
    with open(path, "wb") as file:
        tar = HashingTar(file)
        for key, rows in blocks:
            order = np.argsort(rows)  # read in ascending order, which touches fewer pages of a memory map
            images = np.empty((len(rows), *source.images.shape[1:]), np.uint8)
            images[order] = source.images[rows[order]]
            labels = source.labels[rows].astype("<i8")
            class_counts += np.bincount(labels, minlength=len(class_counts))
            entry = [tar.add(f"{key}.images.npy", images), tar.add(f"{key}.labels.npy", labels), len(rows)]
            entries.append(entry if ids is None else [*entry, tar.add(f"{key}.ids.npy", ids[rows])])
            progress(len(rows))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # The next shard reuses these page-cache pages, far cheaper than new ones, and the input stays cached.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    facts = {"name": path.name, "bytes": tar.offset, "sha256": tar.sha256.hexdigest()}
    return {**facts, "class_counts": class_counts.tolist(), "blocks": entries}


class HashingTar:
    """Writes a tar, byte for byte as `webdataset.TarWriter` does, but hashes it while writing and copies nothing.

    `offset` is the number of bytes written so far, `sha256` their hash.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.offset, self.sha256 = file, 0, hashlib.sha256()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.offset += len(data)

    def add(self, name: str, array: np.ndarray) -> int:
        """Add a contiguous array as an .npy file; returns the offset of its data."""
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        header = stream.getvalue()
        member = tarfile.TarInfo(name)  # its mtime is 0: the same input gives the same bytes
        member.size, member.mode = len(header) + array.nbytes, 0o444
        member.uname = member.gname = "bigdata"  # as webdataset sets them
        self._write(member.tobuf(tarfile.USTAR_FORMAT) + header)
        offset = self.offset
        self._write(array.reshape(-1).view(np.uint8).data)
        self._write(bytes(-member.size % TAR_BLOCK))
        return offset

    def close(self) -> None:
        """Write the end-of-archive marker, padded to a whole record."""
        self._write(bytes(2 * TAR_BLOCK))
        self._write(bytes(-self.offset % tarfile.RECORDSIZE))
