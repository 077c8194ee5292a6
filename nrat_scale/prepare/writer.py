"""Images -> shards: write a `Source` as byte-stable tars of blocks, with the index that makes them verifiable.

Every shard is a piece of its own: written under a temporary name, hashed on the way, fsynced, renamed, and only then
recorded. So several processes can write at once, and a conversion that was killed goes on with the next shard.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import fsync_folder, read_json, sha256_of, write_json
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.data.index import FORMAT, INDEX, PERMUTATION, TAR_BLOCK, VERSION
from nrat_scale.prepare.input import ImageArray, LabelledArrays
from nrat_scale.prepare.staging import Unfinished, unfinished

BLOCK_SIZE, SHARD_SIZE = 512, 51_200  # images; a CIFAR shard of 100 blocks is about 157 MB
_MAX_BLOCK_BYTES = 1 << 32  # beyond 8 GiB a tar member gets a longer header; a block must fit into memory several times


# ---- writing --------------------------------------------------------------------------------------------------------


def write_shards(
    source: LabelledArrays,
    folder: Path,
    *,
    block_size: int = BLOCK_SIZE,
    shard_size: int = SHARD_SIZE,
    seed: int = 0,
    ids: np.ndarray | None = None,
    num_ids: int | None = None,
    jobs: int = 1,
    options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Write `source` as shards into the new folder `folder`; the same arguments give the same bytes.

    Everything is written into a hidden sibling that is renamed at the end, so `folder` is whole or not there.

    Args: see `write_into`.

    Returns:
        `folder`.

    Raises:
        UserError: bad sizes or ids, `folder` exists already, is being written or cannot be written, or finished shards
            of other input are in its unfinished folder.
    """
    with unfinished(folder) as work:
        write_into(
            work, source, block_size=block_size, shard_size=shard_size, seed=seed, ids=ids, num_ids=num_ids,
            jobs=jobs, options=options, progress=progress,
        )  # fmt: skip
    return folder


def write_into(
    work: Unfinished,
    source: LabelledArrays,
    name: str = "",
    *,
    block_size: int = BLOCK_SIZE,
    shard_size: int = SHARD_SIZE,
    seed: int = 0,
    ids: np.ndarray | None = None,
    num_ids: int | None = None,
    jobs: int = 1,
    options: dict[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Write `source` as the folder `name` of what is prepared in `work` ("" is all of it).

    Shards that an earlier start finished are verified and kept, where the input is known to be the same: every file of
    the source has a sha256, or `options` names what stands for them.

    Args:
        block_size: images in a block.
        shard_size: images in a shard, rounded up to whole blocks.
        seed: of the permutation of the samples.
        ids: int64 [N]: the samples are written in the order in which they stand, and these source ids with them;
            where None they are permuted and the index names the permutation.
        num_ids: with `ids`, the number of ids there are; where None, one more than the highest.
        jobs: processes that write shards at the same time. Does not change a byte.
        options: JSON; whatever else decided what the images are.
        progress: whether to show a bar.

    Raises:
        UserError: bad sizes or ids.
        OtherPlan: finished shards of other input are there.
        OSError: it cannot be written.
    """
    identified = options is not None or (bool(source.files) and all("sha256" in file for file in source.files))
    records = work.records / (name or "shards") if identified else None
    writer = _writer(source, work.whole / name, records, block_size, shard_size, seed, ids, num_ids)
    plan = {
        "folder": name, "shard_size": shard_size, "seed": writer.part["seed"], "options": options,
        "labels": _sha256(source.labels), "ids": None if ids is None else _sha256(ids),
        **_index_of(source, [], writer.part, block_size),
    }  # fmt: skip
    work.plan(plan)
    writer.prepare()
    numbers = range(-(-len(source.labels) // writer.per_shard))
    with _written(writer, numbers, min(jobs, len(numbers)), progress) as written:
        shards = [record for _, record in sorted(written, key=lambda pair: pair[0])]
    write_json(writer.folder / INDEX, _index_of(source, shards, writer.part, block_size))


def _writer(
    source: LabelledArrays, folder: Path, records: Path | None, block_size: int, shard_size: int, seed: int,
    ids: np.ndarray | None, num_ids: int | None,
) -> "_Writer":  # fmt: skip
    num_images = len(source.labels)
    if block_size < 1 or shard_size < 1:
        raise UserError(f"--block-size ({block_size}) and --shard-size ({shard_size}) must be at least 1.")
    block_bytes = min(block_size, num_images) * int(np.prod(source.images.shape[1:], dtype=np.int64))
    if block_bytes > _MAX_BLOCK_BYTES:
        raise UserError(
            f"A block of {block_size} images has {block_bytes} bytes, more than {_MAX_BLOCK_BYTES}. Lower --block-size."
        )
    if ids is not None:
        ids = np.ascontiguousarray(ids, "<i8")
        num_ids = num_ids or int(ids.max(initial=-1)) + 1
        if len(ids) != num_images or ids.min() < 0 or ids.max() >= num_ids or len(np.unique(ids)) != num_images:
            raise UserError(f"The ids must be {num_images} different numbers in 0..{num_ids - 1}, one for each image.")
    permutation = None if ids is not None else KeyedPermutation(num_images, seed, PERMUTATION)
    return _Writer(
        source, folder, records, block_size, block_size * -(-shard_size // block_size), permutation, ids,
        {"num_images": num_images, "first_id": 0, "num_ids": num_ids or num_images, "seed": seed if ids is None else None},
    )  # fmt: skip


def _index_of(
    source: LabelledArrays, shards: list[dict[str, Any]], part: dict[str, Any], block_size: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": source.dataset,
        "class_names": list(source.class_names),
        "image_shape": [int(n) for n in source.images.shape[1:]],
        "num_images": part["num_images"],
        "class_counts": np.bincount(source.labels, minlength=len(source.class_names)).tolist(),
        "parts": [part],
        "block_size": block_size,
        "source": list(source.files),
        "shards": shards,
    }


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<i8").data).hexdigest()


# ---- one shard ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    """Writes the shards of one folder, in any order and from any process.

    Attributes:
        source: the images.
        folder: where the shards go.
        records: where their records go; None where no later start could tell that the input is the same.
        block_size, per_shard: images in a block and in a shard.
        permutation: position -> row of `source`; None where the rows stand in order.
        ids: int64 [N]: what is stored as the ids; None where the permutation gives them.
        part: the entry of the index.
    """

    source: LabelledArrays
    folder: Path
    records: Path | None
    block_size: int
    per_shard: int
    permutation: KeyedPermutation | None
    ids: np.ndarray | None
    part: dict[str, Any]

    def prepare(self) -> None:
        """Make the folders, and remove whatever a killed writer left there except recorded shards."""
        self.folder.mkdir(exist_ok=True)
        recorded = set()
        if self.records is not None:
            self.records.mkdir(exist_ok=True)
            recorded = {path.stem for path in self.records.glob("shard-*.json")}
        for path in self.folder.iterdir():
            if path.is_file() and path.stem not in recorded:
                path.unlink()

    def shard(self, number: int, progress: Callable[[int], object]) -> dict[str, Any]:
        """The record of shard `number`, which is kept if it is there and whole, and written otherwise.

        Args:
            progress: told the number of images after each block.
        """
        start = number * self.per_shard
        end = min(start + self.per_shard, len(self.source.labels))
        path = self.folder / f"shard-{number:05d}.tar"
        record = None if self.records is None else self.records / f"{path.stem}.json"
        if record is not None and (finished := self._finished(path, record)) is not None:
            progress(end - start)
            return finished
        temporary = path.with_name(f".{path.name}.tmp")
        blocks: list[list[int]] = []
        class_counts = np.zeros(len(self.source.class_names), np.int64)
        with open(temporary, "wb") as file:
            tar = _Tar(file)
            for first in range(start, end, self.block_size):
                positions = np.arange(first, min(first + self.block_size, end))
                blocks.append(self._block(tar, positions, class_counts))
                progress(len(positions))
            tar.close()
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                # Nobody reads it soon. The next shard gets its pages, which costs the kernel far less than new ones,
                # and the input keeps its own.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(temporary, path)
        fsync_folder(path.parent)
        facts = {"name": path.name, "bytes": tar.offset, "sha256": tar.sha256.hexdigest()}
        facts |= {"class_counts": class_counts.tolist(), "blocks": blocks}
        if record is not None:
            write_json(record, facts)
        return facts

    @staticmethod
    def _finished(path: Path, record: Path) -> dict[str, Any] | None:
        if not record.is_file() or not path.is_file():
            return None
        facts = read_json(record, "record of a shard")
        whole = path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"]
        return facts if whole else None

    def _block(self, tar: "_Tar", positions: np.ndarray, class_counts: np.ndarray) -> list[int]:
        """Write the samples at `positions` (int64 [n]) and count their classes; the entry of the index."""
        rows = positions if self.permutation is None else self.permutation(positions)
        key = f"{positions[0] // self.block_size:08d}"
        labels = self.source.labels[rows]
        class_counts += np.bincount(labels, minlength=len(class_counts))
        block = [
            tar.add(f"{key}.images.npy", _gathered(self.source.images, rows)),
            tar.add(f"{key}.labels.npy", labels.astype("<i8")),
            len(rows),
        ]
        if self.ids is not None:
            block.append(tar.add(f"{key}.ids.npy", self.ids[rows]))
        return block


def _gathered(images: ImageArray, rows: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, C] of `rows` (int64 [n]), read in ascending order: the nearer, the fewer pages of a map."""
    order = np.argsort(rows)
    out = np.empty((len(rows), *images.shape[1:]), np.uint8)
    out[order] = images[rows[order]]
    return out


class _Tar:
    """Writes a tar, byte for byte as `webdataset.TarWriter` does, but hashes it on the way and copies nothing.

    Attributes:
        offset: bytes written so far.
        sha256: of these.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0
        self.sha256 = hashlib.sha256()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.offset += len(data)

    def add(self, name: str, array: np.ndarray) -> int:
        """Add a contiguous array as an .npy file; the offset of its data."""
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        header = stream.getvalue()
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(header) + array.nbytes, 0o444
        member.uname = member.gname = "bigdata"  # webdataset's; and no clock: the same input gives the same bytes
        self._write(member.tobuf(tarfile.USTAR_FORMAT) + header)
        at = self.offset
        self._write(array.reshape(-1).view(np.uint8).data)
        self._write(bytes(-member.size % TAR_BLOCK))
        return at

    def close(self) -> None:
        """Write the end: two empty blocks, filled up to a whole record."""
        self._write(bytes(2 * TAR_BLOCK))
        self._write(bytes(-self.offset % tarfile.RECORDSIZE))


# ---- all shards -----------------------------------------------------------------------------------------------------


@contextmanager
def _written(
    writer: _Writer, numbers: range, jobs: int, progress: bool
) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
    """(number, record) of each shard, in the order in which they are finished by `jobs` processes."""
    workers = [] if jobs <= 1 else _start(writer, jobs)  # before the bar, which may start a thread
    try:
        with tqdm(total=len(writer.source.labels), desc="writing shards", unit="img", disable=not progress) as bar:
            if workers:
                yield _distributed(workers, numbers, bar.update)
            else:
                yield ((number, writer.shard(number, bar.update)) for number in numbers)
    finally:
        for process, connection in workers:
            connection.close()
            process.kill()
        for process, _ in workers:
            process.join()


_Workers = list[tuple[multiprocessing.process.BaseProcess, Connection]]


def _start(writer: _Writer, jobs: int) -> _Workers:
    """Processes that write the shards whose numbers they are sent. They inherit maps and labels: nothing is pickled."""
    context = multiprocessing.get_context("fork")
    workers: _Workers = []
    for _ in range(jobs):
        ours, theirs = context.Pipe()
        inherited = [ours, *(connection for _, connection in workers)]
        process = context.Process(target=_work, args=(writer, theirs, inherited, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of threads: those that numpy and torch keep idle are never used by the children.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        workers.append((process, ours))
    return workers


def _work(writer: _Writer, connection: Connection, inherited: list[Connection], parent: int) -> None:
    """A writing process: numbers of shards come in, numbers of images and records go out, or an error."""
    for other in inherited:  # while anybody holds the parent's ends, its death goes unnoticed
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one

    def progress(num_images: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: no orphan goes on writing
        connection.send(num_images)

    try:
        while True:
            number = connection.recv()
            connection.send((number, writer.shard(number, progress)))
    except (EOFError, ConnectionError):  # the parent has ended
        pass
    except (UserError, OSError) as error:
        words = (
            str(error) if isinstance(error, UserError) else f"A shard cannot be written ({error.strerror or error})."
        )
        connection.send(UserError(words))


def _distributed(
    workers: _Workers, numbers: range, progress: Callable[[int], object]
) -> Iterator[tuple[int, dict[str, Any]]]:
    waiting = iter(numbers)
    left = len(numbers)
    try:
        for (_, connection), number in zip(workers, waiting, strict=False):
            connection.send(number)
        while left:
            for ready in wait([connection for _, connection in workers]):
                assert isinstance(ready, Connection)
                message = ready.recv()
                if isinstance(message, int):
                    progress(message)
                elif isinstance(message, UserError):
                    raise message
                else:
                    left -= 1
                    yield message
                    if (number := next(waiting, -1)) >= 0:
                        ready.send(number)
    except (EOFError, ConnectionError):
        raise UserError("A process that wrote shards has ended before its time (too little memory?).") from None
