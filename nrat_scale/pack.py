"""Images -> shards: write a `Source` as byte-stable tars of blocks, with the index that makes them verifiable."""

import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset
from tqdm import tqdm

from nrat_scale.errors import UserError
from nrat_scale.files import fsync_folder, make_folder, sha256_of, temporary_sibling, write_json
from nrat_scale.seeds import KeyedPermutation
from nrat_scale.shards import FORMAT, INDEX, PERMUTATION, TAR_BLOCK, VERSION

BLOCK_SIZE, SHARD_SIZE = 512, 51_200  # images; a CIFAR shard of 100 blocks is about 157 MB
_MAX_BLOCK_BYTES = 1 << 32  # beyond 8 GiB a tar member gets a longer header; a block must fit into memory several times


class ImageArray(Protocol):
    """What can be converted: anything that gives uint8 [m, H, W, C] for integer ids [m]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, ids: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """Images and labels to convert, in source order.

    Attributes:
        images: uint8 [N, H, W, C], an array or a memory map.
        labels: int64 [N].
        dataset: name of the data set (a key of `DATASETS` where it is known).
        class_names: in label order; their number is K.
        files: name, size and sha256 of each file that was read.
    """

    images: ImageArray
    labels: np.ndarray
    dataset: str
    class_names: tuple[str, ...]
    files: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"Images must have shape [N, H, W, C] with 1 or 3 channels and N > 0, not {list(shape)}.")
        if len(self.labels) != shape[0]:
            raise UserError(f"There are {shape[0]} images but {len(self.labels)} labels.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(
                f"Labels range from {low} to {high}, but the data set '{self.dataset}' has {len(self.class_names)} classes: "
                f"they must lie in 0..{len(self.class_names) - 1}. Name the right data set with --dataset."
            )


# ---- writing --------------------------------------------------------------------------------------------------------


def write_shards(
    source: Source,
    folder: Path,
    *,
    block_size: int = BLOCK_SIZE,
    shard_size: int = SHARD_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write `source` as shards into the new folder `folder`; the same arguments give the same bytes.

    Everything is written into a temporary sibling that is renamed at the end, so `folder` is whole or not there.

    Args:
        block_size: images in a block.
        shard_size: images in a shard, rounded up to whole blocks.
        seed: of the permutation of the samples.

    Returns:
        `folder`.

    Raises:
        UserError: bad sizes, `folder` exists already, or it cannot be written.
    """
    if block_size < 1 or shard_size < 1:
        raise UserError(f"--block-size ({block_size}) and --shard-size ({shard_size}) must be at least 1.")
    block_bytes = min(block_size, source.images.shape[0]) * int(np.prod(source.images.shape[1:], dtype=np.int64))
    if block_bytes > _MAX_BLOCK_BYTES:
        raise UserError(
            f"A block of {block_size} images has {block_bytes} bytes, more than {_MAX_BLOCK_BYTES}. Lower --block-size."
        )
    require_new_folder(folder)
    make_folder(folder.parent)
    temporary = temporary_sibling(folder)
    try:
        temporary.mkdir()
        shards = _write_tars(source, temporary, block_size, shard_size, seed, progress)
        write_json(temporary / INDEX, _index_of(source, shards, block_size, seed))
        if folder.exists():
            folder.rmdir()  # empty, checked above
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"The shards cannot be written to {folder} ({error.strerror}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def require_new_folder(folder: Path) -> None:
    """Raise `UserError` where `folder` is anything but absent or empty: nothing is ever overwritten."""
    try:
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as error:
        raise UserError(f"{folder} cannot be used as --out ({error.strerror}). Choose another place.") from error
    if taken:
        raise UserError(
            f"{folder} exists already and is never overwritten. Choose another --out, or remove it yourself."
        )


def _index_of(source: Source, shards: list[dict[str, Any]], block_size: int, seed: int) -> dict[str, Any]:
    num_images = int(source.images.shape[0])
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": source.dataset,
        "class_names": list(source.class_names),
        "image_shape": [int(n) for n in source.images.shape[1:]],
        "num_images": num_images,
        "class_counts": np.bincount(source.labels, minlength=len(source.class_names)).tolist(),
        "parts": [{"num_images": num_images, "first_id": 0, "num_ids": num_images, "seed": seed}],
        "block_size": block_size,
        "source": list(source.files),
        "shards": shards,
    }


def _write_tars(
    source: Source, folder: Path, block_size: int, shard_size: int, seed: int, progress: bool
) -> list[dict[str, Any]]:
    num_images = int(source.images.shape[0])
    permutation = KeyedPermutation(num_images, seed, PERMUTATION)
    per_shard = block_size * -(-shard_size // block_size)
    shards = []
    with tqdm(total=num_images, desc="writing shards", unit="img", disable=not progress) as bar:
        for number, start in enumerate(range(0, num_images, per_shard)):
            name = f"shard-{number:05d}.tar"
            blocks: list[list[int]] = []
            class_counts = np.zeros(len(source.class_names), np.int64)
            with open(folder / name, "wb") as file:
                writer = webdataset.TarWriter(file, encoder=False, mtime=0)
                offset = 0
                for first in range(start, min(start + per_shard, num_images), block_size):
                    positions = np.arange(first, min(first + block_size, start + per_shard, num_images))
                    ids = permutation(positions)
                    images = _npy(np.ascontiguousarray(source.images[ids], dtype=np.uint8))
                    labels = _npy(np.ascontiguousarray(source.labels[ids], dtype="<i8"))
                    key = f"{first // block_size:08d}"
                    writer.write({"__key__": key, "images.npy": images.data, "labels.npy": labels.data})
                    at_images = offset + TAR_BLOCK + images.header_bytes
                    offset += TAR_BLOCK + _padded(len(images.data))
                    at_labels = offset + TAR_BLOCK + labels.header_bytes
                    offset += TAR_BLOCK + _padded(len(labels.data))
                    blocks.append([at_images, at_labels, len(ids)])
                    class_counts += np.bincount(source.labels[ids], minlength=len(class_counts))
                    bar.update(len(ids))
                writer.close()
                file.flush()
                os.fsync(file.fileno())
            path = folder / name
            shards.append(
                {
                    "name": name,
                    "bytes": path.stat().st_size,
                    "sha256": sha256_of(path),
                    "class_counts": class_counts.tolist(),
                    "blocks": blocks,
                }
            )
    return shards


@dataclass(frozen=True)
class _Npy:
    data: bytes
    header_bytes: int


def _npy(array: np.ndarray) -> _Npy:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return _Npy(stream.getvalue(), len(stream.getvalue()) - array.nbytes)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // TAR_BLOCK) * TAR_BLOCK
